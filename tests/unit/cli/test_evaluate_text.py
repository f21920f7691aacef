"""`switchtitan evaluate` on texts and corpora: loss and bits per byte as transformers has them."""

import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from support.tiny import tiny_config
from support.trained import save_qwen, save_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchtitan.cli import evaluate, export
from switchtitan.data import open_corpus
from switchtitan.data.tokenizer import train_tokenizer

TEXT = "def größe(self, 日本):\n    return self.x  # €\n" * 9


@pytest.fixture(scope="module")
def run(corpora):
    """A tiny run with a checkpoint and an export of it."""
    folder = save_run(corpora / "evaluate-text")
    export.main(["--checkpoint", str(folder)])
    return folder


@pytest.fixture(scope="module")
def corpus(corpora):
    """The run's prepared corpus."""
    return open_corpus(tiny_config(corpora / "evaluate-text", "full_rank").data)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder that transformers saved, with another tokenizer than the run's."""
    folder = tmp_path_factory.mktemp("other")
    trained = train_tokenizer([TEXT, "import json\nfrom typing import Any\n"], 262)
    (folder / "tokenizer.json").write_text(trained.serialized)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": trained.eos_token})
    )
    save_qwen(folder, folder)
    return folder


def exported(run):
    return run / "exports" / "step-000000007"


@pytest.fixture
def evaluated(tmp_path, capsys):
    def run_evaluate(*arguments):
        evaluate.main([*map(str, arguments), "--json", str(tmp_path / "result.json")])
        return json.loads((tmp_path / "result.json").read_text())

    return run_evaluate


def nats(folder, stream, seq_len):
    """The sum of transformers' losses over windows of a stream, each token a target once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    for start in range(0, len(stream) - 1, seq_len):
        window = torch.tensor(stream[start : start + seq_len + 1])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    return total


FLOAT32 = ("--seq-len", 16, "--dtype", "float32")
# Differences of fp32 logits between implementations, which are about 1e-6 of them.
CLOSE = {"rel": 1e-5}


@pytest.mark.parametrize("kind", ["run", "export", "other"])
def test_a_text_has_the_loss_and_bits_per_byte_of_transformers(
    kind, run, other, tmp_path, evaluated
):
    (tmp_path / "text").write_text(TEXT)
    folder = other if kind == "other" else exported(run)
    target = run if kind == "run" else folder
    result = evaluated(target, "--text", tmp_path / "text", "--dtype", "float32", "--seq-len", 16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXT)["input_ids"]
    expected = nats(folder, [tokenizer.eos_token_id, *tokens], 16)
    assert (result["tokens"], result["bytes"]) == (len(tokens), len(TEXT.encode()))
    assert result["loss"] == pytest.approx(expected / len(tokens), **CLOSE)
    assert result["perplexity"] == pytest.approx(math.exp(expected / len(tokens)), **CLOSE)
    bits_per_byte = expected / math.log(2) / len(TEXT.encode())
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte, **CLOSE)
    # Shows that the check can fail: characters are not bytes.
    assert result["bits_per_byte"] != pytest.approx(expected / math.log(2) / len(TEXT), **CLOSE)


def test_a_part_of_a_text_has_the_bytes_of_its_tokens(run, tmp_path, evaluated):
    (tmp_path / "text").write_text(TEXT)
    result = evaluated(run, "--text", tmp_path / "text", "--tokens", 20)
    tokenizer = AutoTokenizer.from_pretrained(exported(run))
    tokens = tokenizer(TEXT)["input_ids"][:20]
    assert (result["tokens"], result["bytes"]) == (20, len(tokenizer.decode(tokens).encode()))


def test_a_corpus_has_the_loss_and_bits_per_byte_of_transformers(run, corpus, evaluated):
    sequences = corpus.split("validation", 16)
    stream = [token for index in range(10) for token in sequences[index].tokens[:-1].tolist()]
    stream.append(sequences[9].tokens[-1].item())
    text = corpus.tokenizer().tokenizer.decode([t for t in stream[1:] if t != corpus.eos_id])
    expected = nats(exported(run), stream, 16)
    for target in (run, exported(run)):
        result = evaluated(target, "--corpus", corpus.folder, "--tokens", 160, *FLOAT32)
        assert (result["tokens"], result["bytes"]) == (160, len(text.encode()))
        assert result["loss"] == pytest.approx(expected / 160, **CLOSE)
        bits_per_byte = expected / math.log(2) / len(text.encode())
        assert result["bits_per_byte"] == pytest.approx(bits_per_byte, **CLOSE)
        assert (result["tokenizer"], result["split"]) == ("the corpus's", "validation")


def test_a_model_with_another_tokenizer_reads_the_text_of_a_corpus(corpus, other, evaluated):
    arguments = ("--corpus", corpus.folder, "--tokens", 400, "--seq-len", 32, "--dtype", "float32")
    result = evaluated(other, *arguments)
    num_tokens = corpus.index.num_tokens("validation")
    tokens = corpus.split("validation", 1).read(0, num_tokens).tolist()
    tokenizer = AutoTokenizer.from_pretrained(other)
    eos = tokenizer.eos_token_id
    stream, num_bytes = [eos], 0
    while len(stream) - 1 < 400:
        end = tokens.index(corpus.eos_id)
        document = corpus.tokenizer().tokenizer.decode(tokens[:end])
        stream += [*tokenizer(document)["input_ids"], eos]
        num_bytes += len(document.encode())
        del tokens[: end + 1]
    expected = nats(other, stream, 32)
    assert (result["tokens"], result["bytes"]) == (len(stream) - 1, num_bytes)
    assert result["tokenizer"] == "the model's"
    assert result["loss"] == pytest.approx(expected / (len(stream) - 1), **CLOSE)


def test_json_on_stdout_replaces_the_summary(run, capsys):
    capsys.readouterr()
    evaluate.main([str(run), "--json", "-"])
    result = json.loads(capsys.readouterr().out)
    evaluate.main([str(run)])
    shown = capsys.readouterr()
    assert f"bits/byte   {result['bits_per_byte']:.4f}\n" in shown.out
    assert f"validation, 160 tokens, {result['bytes']} bytes of text" in shown.out
    assert shown.err == ""  # no progress bar without a terminal


def test_a_terminal_shows_a_progress_bar(run, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    evaluate.main([str(run)])
    assert "evaluating:   0%|          | 0/5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OTHER"], "is no checkpoint, so it names no text to evaluate on; pass --corpus FOLDER"),
        (["RUN", "--text", "no/file"], "--text no/file: cannot be read"),
        (["RUN", "--text", "EMPTY"], "has no text"),
        (["RUN", "--text", "LATIN"], "expected a UTF-8 file"),
        (["RUN", "--corpus", "no/corpus"], "--corpus no/corpus: no file no/corpus/index.json"),
        (["RUN", "--text", "x", "--corpus", "y"], "not allowed with argument"),
        (["RUN", "--text", "x", "--split", "test"], "--split test has no effect with --text"),
        (["BARE", "--text", "LATIN"], "no tokenizer of"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(
    arguments, message, run, other, tmp_path, capsys
):
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes("größe".encode("latin-1"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(other / name, bare)
    names = {
        "RUN": run,
        "OTHER": other,
        "EMPTY": tmp_path / "empty",
        "LATIN": tmp_path / "latin",
        "BARE": bare,
    }
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(names.get(word, word)) for word in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
