"""`switchtitan generate` continues a prompt as transformers does, and streams text."""

import io
import json
import sys

import pytest
import torch
from support.trained import save_qwen, save_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchtitan.cli import export, generate

PROMPT = "def größe(self):\n    return "


@pytest.fixture(scope="module")
def run(corpora):
    """A tiny run with a checkpoint and an export of it."""
    folder = save_run(corpora / "generate")
    export.main(["--checkpoint", str(folder)])
    return folder


@pytest.fixture(scope="module")
def qwen(run, tmp_path_factory):
    """A folder that transformers saved: random weights, another architecture, the run's words."""
    folder = tmp_path_factory.mktemp("qwen")
    save_qwen(folder, exported(run))
    return folder


def exported(run):
    return run / "exports" / "step-000000007"


def generated(capsys, *arguments):
    """The result, as JSON."""
    capsys.readouterr()
    generate.main([*map(str, arguments), "--json", "-"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["run", "export", "qwen"])
def test_greedy_text_is_that_of_transformers(kind, run, qwen, request, capsys):
    folder = qwen if kind == "qwen" else exported(run)
    target = run if kind == "run" else folder
    options = ("--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "40")
    ours = generated(capsys, target, *options, "--dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(PROMPT, return_tensors="pt")
    theirs = model.generate(
        given.input_ids,
        attention_mask=given.attention_mask,
        do_sample=False,
        max_new_tokens=40,
        pad_token_id=0,
    )[0, given.input_ids.shape[1] :]
    assert ours["prompt_tokens"] == given.input_ids[0].tolist()
    assert ours["tokens"] == theirs.tolist()
    assert ours["text"] == tokenizer.decode(theirs, skip_special_tokens=True)


def test_prompt_and_text_go_to_stdout_and_the_speed_to_stderr(run, capsys):
    options = ("--prompt", PROMPT, "--max-new-tokens", "12", "--seed", "3")
    text = generated(capsys, run, *options)["text"]
    generate.main([str(run), *options])
    shown = capsys.readouterr()
    assert shown.out == PROMPT + text + "\n"
    assert "tokens/s after the first" in shown.err


def test_a_seed_repeats_the_text_and_another_does_not(run, capsys):
    options = (run, "--prompt", "import ", "--max-new-tokens", "20")
    first, again, other = (generated(capsys, *options, "--seed", seed) for seed in (1, 1, 2))
    assert first["tokens"] == again["tokens"] != other["tokens"]


def test_the_text_ends_where_a_document_ends(run, tmp_path, capsys):
    """The end token is changed to one that the model chooses."""
    options = ("--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "9")
    tokens = generated(capsys, exported(run), *options)["tokens"]
    for file in exported(run).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[4]]}))
    result = generated(capsys, tmp_path, *options)
    end = tokens.index(tokens[4])
    assert (result["tokens"], result["stopped_by"]) == (tokens[: end + 1], "end of text")


def test_the_prompt_can_come_from_a_file_or_from_standard_input(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompt").write_text(PROMPT)
    options = ("--max-new-tokens", "3", "--temperature", "0")
    given = generated(capsys, run, "--prompt", PROMPT, *options)
    assert (
        generated(capsys, run, "--prompt-file", tmp_path / "prompt", *options)["text"]
        == (given["text"])
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert generated(capsys, run, "--prompt-file", "-", *options)["text"] == given["text"]


def test_an_empty_prompt_begins_a_document(run, capsys):
    eos = AutoTokenizer.from_pretrained(exported(run)).eos_token_id
    assert generated(capsys, run, "--prompt", "")["prompt_tokens"] == [eos]


def test_a_long_text_is_allowed_with_a_warning(run, capsys):
    generate.main([str(run), "--prompt", "x", "--max-new-tokens", "20"])
    assert "the model knows sequences of 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/run", "--prompt", "x"], "no complete checkpoint at no/such/run"),
        (["RUN"], "one of the arguments --prompt --prompt-file is required"),
        (["RUN", "--prompt-file", "no/file"], "--prompt-file no/file: cannot be read"),
        (["RUN", "--prompt", "x", "--top-p", "1.5"], "--top-p: 1.5: expected a number above 0"),
        (["RUN", "--prompt", "x", "--temperature", "nan"], "nan: expected a number >= 0"),
        (["RUN", "--prompt", "x", "--seed", "-1"], "expected an integer >= 0"),
        (
            ["RUN", "--prompt", "x", "--temperature", "0", "--top-k", "3"],
            "--top-k has no effect with --temperature 0",
        ),
        (["RUN", "--prompt", "x", "--tokenizer", "no/file"], "--tokenizer no/file: no file"),
        (["RUN", "--prompt", "x", "--json", "no/folder/file"], "--json no/folder/file: no folder"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(arguments, message, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(run) if word == "RUN" else word for word in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_an_error(run, tmp_path, capsys):
    save_qwen(tmp_path, exported(run), vocab_size=200)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    options = ["--prompt", PROMPT, "--tokenizer", str(exported(run))]
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(tmp_path), *options])
    assert stopped.value.code == 2
    assert "has a vocabulary of 200; pass --tokenizer FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main([str(tmp_path), *options[:2]])
    assert f"no tokenizer of {tmp_path}" in capsys.readouterr().err
