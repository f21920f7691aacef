"""Damaged corpora, tokenizers and sources are refused by name, or are valid."""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from datasets import Dataset
from support.fuzzing import FuzzError, fuzz, num_cases
from support.mutations import mutate_bytes, mutate_json
from support.tiny_documents import make_documents, write_json_lines
from support.token_files import write_megatron, write_nanogpt
from support.word_tokenizer import save_tokenizer

from switchtitan.data import (
    DATASETS,
    DataConfig,
    open_corpus,
    open_prepared,
)
from switchtitan.data.corpus_files import CorpusIndex, fingerprint_of
from switchtitan.data.segments import Limits, text_batches
from switchtitan.data.sources import SourceKeys, TokenizedSource
from switchtitan.data.tokenizer import read_tokenizer

DOCUMENTS = make_documents(30)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_json_lines(folder / "a.jsonl", DOCUMENTS)
    config = DataConfig(dataset="jsonl", path=folder, vocab_size=270, cache_dir=folder / "corpora")
    return open_corpus(config, show_progress=False).folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "corpus"))


def use(folder: Path) -> None:
    """Reads everything that a run reads."""
    opened = open_prepared(folder)
    opened.check_vocabulary(1 << 40)
    opened.tokenizer().encode_documents(["a b"])
    for split in ("train", "validation"):
        sequences = opened.split(split, 4)  # type: ignore[arg-type]
        tokens = sequences[len(sequences) - 1].tokens
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < opened.vocab_size


def with_own_fingerprint(text: str) -> str:
    """The index with the fingerprint of its contents, as an attacker would write it."""
    try:
        index = CorpusIndex.model_validate_json(text)
        own = fingerprint_of(index.tokenizer.sha256, index.dtype, index.splits)
        return index.model_copy(update={"fingerprint": own}).model_dump_json()
    except (ValueError, AttributeError, TypeError):
        return text


def damage_index(folder: Path) -> Callable[[random.Random], str]:
    """Changes an index without a checksum: in most cases its own would show the damage."""
    valid = (folder / "index.json").read_text()
    (folder / "index.json.sha256").unlink()

    def damage(draw: random.Random) -> str:
        if draw.random() < 0.3:
            data = mutate_bytes(valid.encode(), draw)
            (folder / "index.json").write_bytes(data)
            return repr(data)
        text = with_own_fingerprint(mutate_json(json.loads(valid), draw))
        (folder / "index.json").write_text(text)
        return text

    return damage


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_index(folder: Path, part: int, bounded_memory: None) -> None:
    number = num_cases(2500, 50)
    cases = range(part * number, (part + 1) * number)
    fuzz("corpus: index.json", damage_index(folder), lambda: use(folder), cases)


def test_damaged_files_of_a_corpus(folder: Path, bounded_memory: None) -> None:
    valid = {file: file.read_bytes() for file in folder.iterdir()}

    def damage(draw: random.Random) -> bytes:
        for file, data in valid.items():
            file.write_bytes(data)
        file = draw.choice(sorted(valid))
        file.write_bytes(mutate_bytes(valid[file], draw))
        return file.read_bytes()

    cases = range(num_cases(2000, 50))
    fuzz("corpus: any file", damage, lambda: use(folder), cases)


def test_a_planted_fault_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index whose values are not validated."""

    def read_without_validation(cls: type[CorpusIndex], data: bytes) -> CorpusIndex:
        return cls.model_construct(**json.loads(data))

    damage = damage_index(folder)
    monkeypatch.setattr(CorpusIndex, "model_validate_json", classmethod(read_without_validation))
    with pytest.raises(FuzzError, match=r"AttributeError at data/corpus_files\.py"):
        fuzz("planted", damage, lambda: use(folder), range(25))


@pytest.mark.parametrize("part", range(2))
def test_a_damaged_tokenizer(tmp_path: Path, part: int, prepared: Path) -> None:
    # A broken file may make the library reserve memory lazily: no bound here.
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>")
    settings = tmp_path / "tokenizer_config.json"
    valid = [file.read_text(), (prepared / "tokenizer.json").read_text()]

    def damage(draw: random.Random) -> str:
        settings.unlink(missing_ok=True)
        chosen = draw.random()
        text = draw.choice(valid)
        if chosen < 0.3:
            file.write_bytes(mutate_bytes(text.encode(), draw))
        elif chosen < 0.8:
            file.write_text(mutate_json(json.loads(text), draw))
        else:
            file.write_text(text)
            settings.write_bytes(
                mutate_bytes(b'{"eos_token": {"content": "</s>", "lstrip": false}}', draw)
            )
        return file.read_text(errors="replace")

    number = num_cases(1000, 40)
    fuzz(
        "tokenizer",
        damage,
        lambda: read_tokenizer(tmp_path).encode_documents(["a b </s>", "日本"]),
        range(part * number, (part + 1) * number),
    )


def write_parquet(file: Path) -> None:
    table = pyarrow.table({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, file, row_group_size=8)


def write_text(file: Path) -> None:
    file.write_bytes("".join(DOCUMENTS).encode())


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": write_text,
    "jsonl": lambda file: write_json_lines(file, DOCUMENTS),
    "json.gz": lambda file: write_json_lines(file, DOCUMENTS),
    "jsonl.zst": lambda file: write_json_lines(file, DOCUMENTS),
    "parquet": write_parquet,
}


@pytest.mark.parametrize("dataset", WRITERS)
def test_a_damaged_source(dataset: str, tmp_path: Path, bounded_memory: None) -> None:
    file = tmp_path / ("a.txt" if dataset == "text" else f"a.{dataset}")
    WRITERS[dataset](file)
    valid = file.read_bytes()

    def damage(draw: random.Random) -> bytes:
        if dataset == "jsonl.zst" and draw.random() < 0.3:
            data = zstandard.compress(mutate_bytes(zstandard.decompress(valid), draw))
        elif dataset == "json.gz" and draw.random() < 0.3:
            data = gzip.compress(mutate_bytes(gzip.decompress(valid), draw))
        else:
            data = mutate_bytes(valid, draw)
        file.write_bytes(data)
        return data

    def read() -> None:
        stream = DATASETS[dataset].open(SourceKeys(tmp_path)).open(None)
        for batch in text_batches(stream, Limits(None, None), 0, 0, "stop"):
            assert all(text.encode() for text in batch.documents)

    fuzz(f"source: {dataset}", damage, read, range(num_cases(1500, 30)), min_refused=0.05)


IDS = [[4 + number % 5] * (1 + number % 7) for number in range(60)]
VOCAB_SIZE = 10


def write_arrow(folder: Path) -> None:
    Dataset.from_dict({"input_ids": IDS}).save_to_disk(str(folder))


TOKEN_WRITERS: dict[str, Callable[[Path], None]] = {
    "nanogpt": lambda folder: write_nanogpt(folder / "a.bin", IDS, 3),
    "megatron": lambda folder: write_megatron(folder / "a", IDS, 3),
    "arrow": write_arrow,
}


@pytest.mark.parametrize("dataset", TOKEN_WRITERS)
def test_a_damaged_source_of_tokens(dataset: str, tmp_path: Path, bounded_memory: None) -> None:
    folder = tmp_path / "in"
    TOKEN_WRITERS[dataset](folder)
    valid = {file: file.read_bytes() for file in sorted(folder.iterdir())}

    def damage(draw: random.Random) -> bytes:
        for file, data in valid.items():
            file.write_bytes(data)
        file = draw.choice(list(valid))
        file.write_bytes(mutate_bytes(valid[file], draw))
        return file.read_bytes()

    def read() -> None:
        source = DATASETS[dataset].open(SourceKeys(folder))
        assert isinstance(source, TokenizedSource)
        stream = source.open_tokens(None, 3)
        for batch in text_batches(stream, Limits(None, None), 0, 0, "stop", VOCAB_SIZE):
            assert all(0 <= ids.min() <= ids.max() < VOCAB_SIZE for ids in batch.tokens)

    fuzz(f"source: {dataset}", damage, read, range(num_cases(600, 30)), min_refused=0.05)
