"""Commands that read a trained model give the numbers of transformers, of the run, of formulas."""

import json
import math
import re
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import rewrite_metadata
from support.commands import result_of, run, succeed
from support.folders import save_random_model
from support.preparation import tokens_of
from support.tiny import tiny_config
from support.trained import TOKENS, train_and_save
from tokenizers import Tokenizer, processors

from switchtitan.data.prepare import open_corpus
from switchtitan.data.tokenizer import train_tokenizer
from switchtitan.observability.tensorboard import read_curves
from switchtitan.registry import toml_value
from switchtitan.workbench.report.page import curve_panels
from switchtitan.workbench.spectra.weight_change import checkpoint_spectra, mean_effective_rank

TEXT = "def größe(self, 日本):\n    return self.x  # €\n" * 9
PROMPT = "def größe(self):\n    return "
FLOAT32 = ("--dtype", "float32")
# Differences of fp32 logits between implementations, which are about 1e-6 of them; merging rounds
# each weight once.
CLOSE = {"rel": 1e-5}
generated = partial(result_of, "generate")


@pytest.fixture(scope="module")
def corpus(trained):
    """The run's prepared corpus."""
    return open_corpus(tiny_config(trained.run.parent, "full_rank").data)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder that transformers saved: another architecture and tokenizer than the run's."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = train_tokenizer([TEXT, "import json\nfrom typing import Any\n"], 262)
    (folder / "tokenizer.json").write_text(tokenizer.serialized)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    keys = {"vocab_size": 270, "eos_token_id": tokenizer.eos_id}
    return save_random_model("qwen2, tied", folder, **keys)


@pytest.fixture(params=["run", "export", "other"])
def target(request, trained, other):
    """A model as a command takes it, and as transformers takes it."""
    return {
        "run": (trained.run, trained.exported),
        "export": (trained.exported, trained.exported),
        "other": (other, other),
    }[request.param]


def theirs(folder):
    """transformers' model and tokenizer of a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def nats(folder, stream, seq_len):
    """The sum of transformers' losses over windows of a stream, each token a target once."""
    model, _ = theirs(folder)
    total = 0.0
    for start in range(0, len(stream) - 1, seq_len):
        window = torch.tensor(stream[start : start + seq_len + 1])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    return total


def test_a_checkpoint_and_its_export_have_the_loss_of_the_run(trained, corpus):
    result = result_of("evaluate", trained.run)
    assert result["loss"] == pytest.approx(trained.loss, **CLOSE)
    assert (result["split"], result["tokens"]) == ("validation", 160)
    shown = run("evaluate", trained.run)
    assert f"{trained.loss:.4f}" in shown.output
    assert f"{result['bits_per_byte']:.4f}" in shown.output
    assert shown.errors == ""  # no progress bar without a terminal
    of_export = result_of("evaluate", trained.exported, "--config", trained.config)
    assert of_export["loss"] == pytest.approx(trained.loss, **CLOSE)
    words = ("--corpus", corpus.folder, "--seq-len", 16, "--tokens", 160)
    of_export = result_of("evaluate", trained.exported, *words, *FLOAT32)
    assert of_export["loss"] == pytest.approx(trained.loss, **CLOSE)
    # Four sequences of 16.
    assert result_of("evaluate", trained.run, "--tokens", 70)["tokens"] == 64


def test_all_of_a_mixture_has_the_loss_of_its_run(corpora, tmp_path):
    for name, count in (("short", 30), ("long", 300)):
        (tmp_path / name).mkdir()
        for number in range(count):
            text = f"{name} rows of matrix {number}\n" * (3 + number % 7)
            (tmp_path / name / f"{number}.txt").write_text(text)
    sources = [
        {"weight": weight, "dataset": "text", "path": str(tmp_path / name)}
        for weight, name in ((1, "short"), (9, "long"))
    ]
    keys = (
        *("--data.max_bytes", "none", "--data.sources", toml_value(sources)),
        *("--data.validation_fraction", "0.2", "--evaluation.tokens", "1000000"),
    )
    folder = corpora / "evaluate-mixture"
    trainer = train_and_save(folder, "lora", *keys, num_steps=2)
    own = trainer.validation(trainer.stepper.model)
    result = result_of("evaluate", folder / "run")
    assert result["loss"] == pytest.approx(own, **CLOSE)
    first, _ = open_corpus(tiny_config(folder, "lora", *keys).data).sources
    assert result["tokens"] > first.index.num_tokens("validation")


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of the run's last one, in a run of its own."""
    folder = tmp_path / "run" / "checkpoints" / "step-000000015"
    return shutil.copytree(trained.run / "checkpoints" / folder.name, folder)


def test_a_model_trained_with_flash_attention_is_evaluated_without_it(
    trained, checkpoint, tmp_path
):
    def set_attention(metadata):
        metadata["identity"]["model"]["attention"] = "flash_attn"
        config = metadata["run"]["config"]
        assert 'attention = "sdpa"' in config
        metadata["run"]["config"] = config.replace('attention = "sdpa"', 'attention = "flash_attn"')

    rewrite_metadata(checkpoint, set_attention)
    result = result_of("evaluate", tmp_path / "run")
    assert result["loss"] == pytest.approx(trained.loss, **CLOSE)


def test_a_text_has_the_loss_and_bits_per_byte_of_transformers(target, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    words = ("evaluate", target[0], "--text", tmp_path / "text", "--seq-len", 16, *FLOAT32)
    result = result_of(*words)
    _, tokenizer = theirs(target[1])
    tokens = tokenizer(TEXT)["input_ids"]
    expected = nats(target[1], [tokenizer.eos_token_id, *tokens], 16)
    assert (result["tokens"], result["bytes"]) == (len(tokens), len(TEXT.encode()))
    assert result["loss"] == pytest.approx(expected / len(tokens), **CLOSE)
    assert result["perplexity"] == pytest.approx(math.exp(expected / len(tokens)), **CLOSE)
    bits = expected / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / len(TEXT.encode()), **CLOSE)
    part = result_of(*words, "--tokens", 20)
    assert (part["tokens"], part["bytes"]) == (20, len(tokenizer.decode(tokens[:20]).encode()))


def test_transformers_has_the_logits_and_the_tokenizer_of_the_run_from_an_export(trained, corpus):
    model, tokenizer = theirs(trained.exported)
    torch.testing.assert_close(model(TOKENS).logits, trained.logits, rtol=1e-5, atol=1e-5)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    eos_id = corpus.index.tokenizer.eos_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == eos_id


def test_commands_of_a_run_whose_corpus_is_gone_name_it_and_the_command_that_makes_it(
    checkpoint, corpus, tmp_path
):
    def move_corpus(metadata):
        saved = metadata["run"]
        saved["config"] = re.sub('cache_dir = "[^"]*"', 'cache_dir = "elsewhere"', saved["config"])
        saved["sources"][0]["folder"] = "/gone/pystdlib-1"

    rewrite_metadata(checkpoint, move_corpus)
    command = f"switchtitan prepare --config {tmp_path / 'run' / 'config.toml'}"
    out = ("--folder", tmp_path / "out")
    for words in (("evaluate",), ("generate", "--prompt", "x"), ("export", *out)):
        outcome = run(words[0], checkpoint, *words[1:])
        outcome.check_refused("/gone/pystdlib-1", corpus.fingerprint, command)
    succeed("export", checkpoint, *out, "--no-tokenizer")
    assert not list((tmp_path / "out").glob("tokenizer*"))


@pytest.fixture(scope="module")
def beginning(corpora, trained):
    """A `tokenizer.json` like LLaMA 3's, which begins a text with a token."""
    tokenizer = Tokenizer.from_file(str(trained.exported / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    special = [("<s>", tokenizer.token_to_id("<s>"))]
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([byte_level, template])
    tokenizer.save(str(corpora / "beginning.json"))
    return corpora / "beginning.json"


@pytest.mark.parametrize("bos", ["none", "false"])
def test_prompts_texts_and_exports_begin_as_the_documents_of_the_run(
    corpora, beginning, bos, tmp_path
):
    folder = corpora / f"bos-{bos}"
    keys = ("--data.tokenizer", str(beginning), "--data.vocab_size", "none", "--data.bos", bos)
    train_and_save(folder, "lora", *keys, num_steps=1)
    exported, text = tmp_path / "exported", tmp_path / "text"
    text.write_text(TEXT)
    succeed("export", folder / "run", "--folder", exported)
    corpus = open_corpus(tiny_config(folder, "lora", *keys).data)
    _, tokenizer = theirs(exported)
    tokens = tokenizer(TEXT)["input_ids"]
    starts = [270] if bos == "none" else []
    assert tokens == starts + corpus.tokenizer().tokenizer.encode(TEXT).ids[len(starts) :]
    stored = tokens_of(corpus, "train")
    eos_id = corpus.index.tokenizer.eos_id
    ends = [place for place, token in enumerate(stored[:-1]) if token == eos_id]
    assert {stored[end + 1] == 270 for end in ends} == {bool(starts)}
    for weights in (folder / "run", exported):
        words = ("--prompt", TEXT, "--max-new-tokens", 1, *FLOAT32)
        assert generated(weights, *words)["prompt_tokens"] == tokens
        words = ("--text", text, "--seq-len", 16, *FLOAT32)
        result = result_of("evaluate", weights, *words)
        targets = len(tokens) - len(starts)
        expected = nats(exported, tokens if starts else [tokenizer.eos_token_id, *tokens], 16)
        assert (result["tokens"], result["bytes"]) == (targets, len(TEXT.encode()))
        assert result["loss"] == pytest.approx(expected / targets, **CLOSE)
    result = result_of("evaluate", folder / "run", "--tokens", 160)
    # The corpus is that of the tokenizer that it was prepared with.
    words = ("--corpus", corpus.folder, "--tokenizer", beginning, "--tokens", 160)
    assert result_of("evaluate", exported, *words)["bytes"] == result["bytes"]
    words = ("--tokenizer", beginning, "--prompt", TEXT, "--max-new-tokens", 1)
    assert generated(folder / "run", *words)["prompt_tokens"] == tokens
    sequences = corpus.split("validation", 16)
    read = [t for index in range(10) for t in sequences[index][:-1].tolist()]
    read = [*read[1:], sequences[9][-1].item()]
    assert result["bytes"] == len(corpus.tokenizer().tokenizer.decode(read).encode())


def test_greedy_text_is_that_of_transformers(target):
    words = ("--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 40, *FLOAT32)
    ours = generated(target[0], *words)
    model, tokenizer = theirs(target[1])
    given = tokenizer(PROMPT, return_tensors="pt")
    keys = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
    tokens = model.generate(**given, **keys)[0, given.input_ids.shape[1] :]
    assert ours["prompt_tokens"] == given.input_ids[0].tolist()
    assert ours["tokens"] == tokens.tolist()
    assert ours["text"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_prompt_and_text_go_to_stdout_and_the_rest_to_stderr(trained):
    words = (trained.run, "--prompt", PROMPT, "--max-new-tokens", 20)
    shown = run("generate", *words, "--seed", 3)
    assert shown.output == PROMPT + generated(*words, "--seed", 3)["text"] + "\n"
    assert "tokens; stopped by: " in shown.errors
    assert "the model knows sequences of 16" in shown.errors


def test_a_seed_repeats_the_text_and_options_of_drawing_change_it(trained):
    words = (trained.run, "--prompt", "import ", "--max-new-tokens", 20)
    first, again, other = (generated(*words, "--seed", seed)["tokens"] for seed in (1, 1, 2))
    assert first == again != other
    greedy = generated(*words, "--temperature", 0)["tokens"]
    assert generated(*words, "--top-k", 1)["tokens"] == greedy != first
    assert generated(*words, "--top-p", 1e-6)["tokens"] == greedy


def test_the_text_ends_where_a_document_ends(trained, tmp_path):
    """The end token is changed to one that the model chooses."""
    words = ("--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 9)
    tokens = generated(trained.exported, *words)["tokens"]
    shutil.copytree(trained.exported, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[4]]}))
    result = generated(tmp_path, *words)
    end = tokens.index(tokens[4])
    assert (result["tokens"], result["stopped_by"]) == (tokens[: end + 1], "end of text")


def test_a_drawn_rank_is_the_one_that_the_run_measured(trained, tmp_path):
    picture = tmp_path / "new" / "spectra.png"
    outcome = succeed("report", trained.run, "--spectrum", "--output", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "page.html"
    assert succeed("report", trained.run, "--output", page).output == f"{page}\n"
    assert "switchlora" in page.read_text()
    succeed("report", trained.run, "--output", tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().count("</svg>") == 1
    curves = read_curves(trained.run)
    rank = mean_effective_rank(checkpoint_spectra(trained.run)[1])
    steps, measured = curves["rank/effective_mean"]
    assert steps == [5, 10, 15]
    # The checkpoint's weights are merged again: roundings of an fp32 product.
    assert rank == pytest.approx(measured[-1], rel=1e-4)
    (line,) = curve_panels({"run": curves})["Effective rank of the change by step"]
    assert line[2:] == (steps, measured)
    assert f"{rank:.1f}" in outcome.output
