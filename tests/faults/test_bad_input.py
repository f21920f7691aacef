"""Bad configurations, corpora, tokenizers, weights and manifests, each given to a command.

Every one ends with status 2 and one message that names the key or the file. Nothing is written.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import annotated_types
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.commands import run
from support.fault_report import record
from support.fuzzing import limited_cpu_time, num_cases
from support.held_weights import HeldWeights
from support.tiny import TINY, tiny_config, tiny_trainer
from support.tiny_documents import make_documents
from support.word_tokenizer import save_tokenizer

from switchtitan.config.fields import is_section_type
from switchtitan.data.sources import files
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.huggingface import parameter_shapes
from switchtitan.job.config import JobConfig, parse_arguments

DOCUMENTS = make_documents(20)
VALID = TINY.format(folder="runs", method="full_rank", method_keys="")


def cases(long: int, short: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same cases in every run, so that a failure can be repeated."""
    return settings(
        max_examples=num_cases(long, short),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {
        path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def check_refused(kind: str, folder: Path, words: tuple[object, ...], *parts: str) -> None:
    """Runs a command in 60 s of CPU time; checks its message, and that `folder` is unchanged."""
    before = contents(folder)
    with limited_cpu_time(60):
        run(*words).check_refused(*parts)
    assert contents(folder) == before
    record("bad input", kind=kind, refused=1)


# Configurations.


def _fields() -> list[tuple[str, str, Any]]:
    config = parse_arguments([], num_ranks=1)
    return [
        (section, name, field)
        for section in JobConfig.model_fields
        for name, field in type(getattr(config, section)).model_fields.items()
        if not is_section_type(field.annotation) and name != "name"
    ]


FIELDS = _fields()
BOUNDED = [
    (section, name, bound.ge - 1 if isinstance(bound, annotated_types.Ge) else bound.gt)
    for section, name, field in FIELDS
    for bound in field.metadata
    if isinstance(bound, annotated_types.Ge | annotated_types.Gt)
]
WRONG_FOR_ALL = ("1979-05-27", "{ x = 1 }", "[[[1]]]", "[{ x = 1 }]", "07:32:00", "[true, [1]]")


@st.composite
def bad_configurations(draw: st.DrawFn) -> tuple[str, str]:
    """A configuration, and what its message must name."""
    kind = draw(st.sampled_from(["type", "range", "unknown", "section", "syntax", "name"]))
    section, name, _ = draw(st.sampled_from(FIELDS))
    value = draw(st.sampled_from(WRONG_FOR_ALL))
    if kind == "range":
        section, name, bad = draw(st.sampled_from(BOUNDED))
        value = repr(bad - draw(st.integers(0, 10**6)))
    if kind == "unknown":
        name += draw(st.sampled_from(["x", "_", "2", "_size"]))
        value = "1"
    if kind == "section":
        return f"{VALID}\n[{section}x]\n{name} = 1\n", f"[{section}x]"
    if kind == "name":
        section = draw(st.sampled_from(["model", "method", "optimizer"]))
        name, value = "name", json.dumps(draw(st.text("abcdef", min_size=9, max_size=12)))
    if kind == "syntax":
        before = VALID.splitlines(keepends=True)[: draw(st.integers(0, 30))]
        junk = draw(st.sampled_from(["=", "[", '"', "]]", "a b", "\\"]))
        return "".join(before) + junk + "\n", ".toml"
    lines = [line for line in VALID.splitlines() if not line.startswith(f"{name} = ")]
    if f"[{section}]" not in lines:
        lines.append(f"[{section}]")
    lines.insert(lines.index(f"[{section}]") + 1, f"{name} = {value}")
    return "\n".join(lines), name


@cases(140, 8)
@given(case=bad_configurations())
def test_bad_configurations(
    case: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text, named = case
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.toml").write_text(text)
    check_refused("configuration", folder, ("train", "--config", folder / "config.toml"), named)


NUMBERS = [
    (section, name)
    for section, name, field in FIELDS
    if field.annotation in (int, float, bool, int | None, float | None)
]


@cases(40, 4)
@given(
    key=st.sampled_from(NUMBERS),
    word=st.sampled_from(["abc", "[[1]]", "{x=1}", "1-2", "1,2", "--", "9e"]),
    is_unknown=st.booleans(),
)
def test_bad_options(
    key: tuple[str, str],
    word: str,
    is_unknown: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("options")
    (folder / "config.toml").write_text(VALID)
    option = f"--{key[0]}.{key[1]}{'x' * is_unknown}"
    words = ("train", "--config", folder / "config.toml", option, word)
    check_refused("command line", folder, words, option)


# Corpora.


def _write_corpus(folder: Path, dataset: str, draw: Callable[[st.SearchStrategy], Any]) -> str:
    """Writes a corpus that cannot be read; returns what the message must name."""
    place = draw(st.integers(0, len(DOCUMENTS) - 1))
    if dataset == "text":
        line = draw(st.binary(min_size=1, max_size=9)).replace(b"\n", b"") + b"\xff"
        for number, text in enumerate(DOCUMENTS):
            data = text.encode() + (line if number == place else b"")
            (folder / f"{number:02d}.txt").write_bytes(data)
        return f"{place:02d}.txt, line "
    name = f"a.{dataset}"
    if dataset == "parquet":
        texts: list[str | None] = list(DOCUMENTS)
        is_cut = draw(st.booleans())
        if not is_cut:
            texts[place] = None
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / name)
        if not is_cut:
            return f"{name}, row {place + 1}"
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: draw(st.integers(0, len(data) - 1))])
        return name
    lines = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
    lines[place] = draw(
        st.sampled_from(
            [b"{", b"[]", b"null", b"3", b'{"text": null}', b'{"other": "a"}', b"\xff", b"[" * 9999]
        )
    )
    data = b"\n".join(lines)
    if dataset == "jsonl":
        (folder / name).write_bytes(data)
        return f"{name}, line {place + 1}"
    data = gzip.compress(data)
    if draw(st.booleans()):
        (folder / name).write_bytes(data)
        return f"{name}, line {place + 1}"
    good = gzip.compress(b"\n".join(json.dumps({"text": text}).encode() for text in DOCUMENTS))
    (folder / name).write_bytes(good[: draw(st.integers(1, len(good) - 1))])
    return name


@cases(60, 6)
@given(data=st.data(), dataset=st.sampled_from(["text", "jsonl", "json.gz", "parquet"]))
def test_bad_corpora(
    data: st.DataObject, dataset: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "in").mkdir()
    named = _write_corpus(folder / "in", dataset, data.draw)
    command = ("prepare", "--dataset", dataset, "--path", folder / "in", "--vocab_size", 270)
    words = (*command, "--cache_dir", folder / "out")
    check_refused(f"source: {dataset}", folder / "in", words, named)
    # What a stopped preparation leaves, but no corpus.
    assert all(path.suffix in (".lock", ".partial") for path in (folder / "out").iterdir())


# Tokenizers.


def _break_tokenizer(folder: Path, draw: Callable[[st.SearchStrategy], Any]) -> str:
    file = save_tokenizer(folder / "tokenizer.json", "</s>")
    text = file.read_text()
    kind = draw(st.sampled_from(["cut", "key", "json", "end", "missing", "folder", "settings"]))
    if kind == "cut":
        file.write_text(text[: draw(st.integers(0, len(text) - 2))])
    elif kind == "key":
        table = json.loads(text)
        table["model"][draw(st.sampled_from(["type", "vocab"]))] = draw(
            st.sampled_from([None, 3, [], "x", {"a": -1}, {"a": 2**40}, {"a": "b"}])
        )
        table["added_tokens"] = []
        file.write_text(json.dumps(table))
    elif kind == "json":
        file.write_text(json.dumps(draw(st.sampled_from([None, [], {}, 3, "x", {"model": {}}]))))
    elif kind == "end":
        table = json.loads(text)
        table["added_tokens"] = []
        file.write_text(json.dumps(table))
    elif kind == "missing":
        file.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        (folder / "tokenizer_config.json").write_text(
            draw(st.sampled_from(["", "{", "[" * 99_999, "\ufeff{]"]))
        )
    return "tokenizer"


@cases(50, 5)
@given(data=st.data())
def test_bad_tokenizers(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl").write_text("".join('{"text": "a b"}\n' for _ in range(9)))
    (folder / "tokenizer").mkdir()
    named = _break_tokenizer(folder / "tokenizer", data.draw)
    command = ("prepare", "--dataset", "jsonl", "--path", folder / "in", "--cache_dir")
    words = (*command, folder / "out", "--tokenizer", folder / "tokenizer")
    check_refused("tokenizer", folder, words, named)


# Weights and manifests.


@pytest.fixture(scope="module")
def home(corpora: Path) -> Path:
    """A folder with a configuration, weights in two layouts and a checkpoint."""
    folder = corpora / "bad-input"
    trainer = tiny_trainer(folder, "full_rank")
    trainer.checkpointer.save(0, trainer.tensors(), asdict(trainer.stepper.state))
    trainer.stepper.close()
    config = tiny_config(folder, "full_rank")
    next(folder.glob("full_rank-*.toml")).rename(folder / "run.toml")
    weights = {name: torch.ones(shape) for name, shape in parameter_shapes(config.model).items()}
    export_dense(HeldWeights(weights), config.model, folder / "hf", torch.float32)
    export_dense(
        HeldWeights(weights),
        config.model,
        folder / "sharded",
        torch.float32,
        max_shard_bytes=20_000,
    )
    return folder


def _break_weights(folder: Path, draw: Callable[[st.SearchStrategy], Any]) -> str:
    file = draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    kind = draw(st.sampled_from(["cut", "shape", "missing", "extra", "config", "no-file"]))
    if kind == "cut":
        size = file.stat().st_size
        file.write_bytes(file.read_bytes()[: draw(st.integers(0, size - 1))])
        return file.name
    if kind == "no-file":
        file.unlink()
        return str(folder)
    if kind == "config":
        table = json.loads((folder / "config.json").read_text())
        key = draw(st.sampled_from(["num_attention_heads", "rms_norm_eps", "hidden_act"]))
        table[key] = draw(st.sampled_from([99, "x", [], -1, 0.5]))
        (folder / "config.json").write_text(json.dumps(table))
        return key
    tensors = load_file(file)
    name = draw(st.sampled_from(sorted(tensors)))
    if kind == "shape":
        tensors[name] = torch.ones(draw(st.lists(st.integers(1, 3), max_size=3)))
    elif kind == "missing":
        del tensors[name]
    else:
        name = f"{name}x"
        tensors[name] = torch.ones(1)
    save_file(tensors, file)
    return name


@cases(60, 6)
@given(data=st.data(), layout=st.sampled_from(["hf", "sharded"]))
def test_bad_weights(
    data: st.DataObject, layout: str, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("weights") / "model"
    shutil.copytree(home / layout, folder)
    named = _break_weights(folder, data.draw)
    words = ("evaluate", folder, "--config", home / "run.toml")
    check_refused(f"weights: {layout}", folder.parent, words, named)


@cases(60, 6)
@given(
    data=st.data(),
    name=st.sampled_from(["metadata.json", "metadata.json.sha256", "tensors.json", "__0_0.distcp"]),
    kind=st.sampled_from(["cut", "flip", "missing", "folder", "other"]),
    command=st.sampled_from(["evaluate", "export", "train"]),
)
def test_bad_manifests(
    data: st.DataObject,
    name: str,
    kind: str,
    command: str,
    home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoint = folder / "step-000000000"
    shutil.copytree(home / "run" / "checkpoints" / checkpoint.name, checkpoint)
    file = checkpoint / name
    valid = file.read_bytes()
    if kind == "cut":
        file.write_bytes(valid[: data.draw(st.integers(0, len(valid) - 1))])
    elif kind == "flip":
        place = data.draw(st.integers(0, len(valid) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        file.write_bytes(valid[:place] + bytes([valid[place] ^ bit]) + valid[place + 1 :])
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()
        if kind == "other":
            file.write_bytes(data.draw(st.binary(max_size=200)))
    words: tuple[object, ...] = {
        "evaluate": ("evaluate", checkpoint),
        "export": ("export", "--checkpoint", checkpoint, "--folder", folder / "exported"),
        "train": (
            "train", "--config", home / "run.toml", "--checkpoint.resume", checkpoint,
            "--job.output_dir", folder / "run",
        ),
    }[command]  # fmt: skip
    check_refused(f"checkpoint: {name}", folder, words, str(checkpoint))


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object) -> str:
        raise KeyError("text")

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("{")
    command = ("prepare", "--dataset", "jsonl", "--path", tmp_path / "in", "--vocab_size", 270)
    monkeypatch.setattr(files, "text_of_line", fail)
    words = (*command, "--cache_dir", tmp_path / "out")
    with pytest.raises(KeyError):
        check_refused("planted", tmp_path / "in", words, "a.jsonl")
