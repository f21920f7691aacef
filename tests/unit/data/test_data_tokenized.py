"""Sources of token ids: nanoGPT's and Megatron's files, and saved datasets with `input_ids`."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from support.token_files import write_megatron, write_nanogpt
from support.word_tokenizer import save_tokenizer

from switchtitan.cli.prepare import summary
from switchtitan.data import DATASETS, Corpus, DataConfig, open_corpus, plan_corpus
from switchtitan.data.sources import SourceKeys, TokenDocument, TokenizedSource, TokenStream
from switchtitan.data.sources import tokenized as tokenized_module
from switchtitan.data.tokenizer import read_tokenizer
from switchtitan.errors import CorpusError

DRAW = random.Random(5)
EOS = 3
DOCUMENTS = [[DRAW.randrange(4, 9) for _ in range(DRAW.randint(1, 30))] for _ in range(61)]
FLAT = [token for ids in DOCUMENTS for token in (*ids, EOS)]
PACKED = [FLAT[first : first + 7] for first in range(0, len(FLAT) // 7 * 7, 7)]


def write_arrow(folder: Path, rows: list[list[int]], **columns: list[list[int]]) -> None:
    Dataset.from_dict({"input_ids": rows, **columns}).save_to_disk(str(folder))


def write_padded(folder: Path) -> None:
    """Rows of one length, as a tokenizer pads them."""
    padded = [[*ids, EOS] + [0] * (30 - len(ids)) for ids in DOCUMENTS]
    masks = [[1] * (len(ids) + 1) + [0] * (30 - len(ids)) for ids in DOCUMENTS]
    write_arrow(folder, padded, attention_mask=masks)


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "nanogpt": ("nanogpt", lambda folder: write_nanogpt(folder / "a.bin", DOCUMENTS, EOS)),
    "megatron uint16": ("megatron", lambda folder: write_megatron(folder / "a", DOCUMENTS, EOS)),
    "megatron int32": ("megatron", lambda folder: write_megatron(folder / "a", DOCUMENTS, EOS, 4)),
    "arrow documents": ("arrow", lambda folder: write_arrow(folder, [*DOCUMENTS])),
    "arrow padded": ("arrow", write_padded),
    "arrow packed": ("arrow", lambda folder: write_arrow(folder, PACKED)),
}


def make_source(dataset: str, folder: Path) -> TokenizedSource:
    source = DATASETS[dataset].open(SourceKeys(folder))
    assert isinstance(source, TokenizedSource)
    return source


def ids_of(stream: TokenStream) -> list[list[int]]:
    found = list(stream)
    assert all(isinstance(document, TokenDocument) for document in found)
    return [document.ids.tolist() for document in found]


def expected_of(name: str) -> list[list[int]]:
    if name != "arrow packed":
        return DOCUMENTS
    kept = len(PACKED) * 7
    whole, at = [], 0
    for ids in DOCUMENTS:
        if kept - at > 0:
            whole.append(FLAT[at : min(at + len(ids), kept)])
        at += len(ids) + 1
    return whole


@pytest.mark.parametrize("block", [5, 1 << 20])
@pytest.mark.parametrize("name", WRITERS)
def test_the_documents_are_read_in_order(
    name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenized_module, "_BLOCK_TOKENS", block)
    dataset, write = WRITERS[name]
    write(tmp_path)
    assert ids_of(make_source(dataset, tmp_path).open_tokens(None, EOS)) == expected_of(name)


@pytest.mark.parametrize("taken", [1, 20, 60])
@pytest.mark.parametrize("name", WRITERS)
def test_a_stream_resumes_at_its_position(name: str, taken: int, tmp_path: Path) -> None:
    dataset, write = WRITERS[name]
    write(tmp_path)
    source = make_source(dataset, tmp_path)
    stream = source.open_tokens(None, EOS)
    for _ in range(taken):
        next(stream)
    position = json.loads(json.dumps(stream.position()))
    assert ids_of(source.open_tokens(None, EOS, position)) == expected_of(name)[taken:]


def config_of(dataset: str, folder: Path, **keys: object) -> DataConfig:
    tokenizer = save_tokenizer(folder.parent / "tokenizer.json", "</s>")
    given = {"dataset": dataset, "path": folder, "tokenizer": str(tokenizer)}
    return DataConfig.model_validate({**given, "cache_dir": folder.parent / "corpora", **keys})


def eos_of(config: DataConfig) -> int:
    return read_tokenizer(Path(config.tokenizer)).eos_id


def tokens_of(corpus: Corpus, split: str) -> list[int]:
    files = [corpus.folder / shard.file for shard in corpus.index.splits[split]]
    return np.concatenate([np.fromfile(file, corpus.index.dtype) for file in files]).tolist()


def test_a_prepared_corpus_has_the_tokens_as_they_were(tmp_path: Path) -> None:
    config = config_of("nanogpt", tmp_path / "bin")
    eos = eos_of(config)
    documents = [[token % 3 for token in ids] for ids in DOCUMENTS]
    assert eos == 3
    write_nanogpt(tmp_path / "bin" / "train.bin", documents, eos)
    write_nanogpt(tmp_path / "bin" / "val.bin", documents[:9], eos)
    corpus = open_corpus(config, show_progress=False)
    for split, expected in (("train", documents), ("validation", documents[:9])):
        assert tokens_of(corpus, split) == [token for ids in expected for token in (*ids, eos)]
    assert corpus.index.splits["train"][0].bytes_of_text == 0


def test_own_splits_refuse_a_fraction_to_hold_out(tmp_path: Path) -> None:
    config = config_of("nanogpt", tmp_path / "bin", validation_fraction=0.1)
    for name in ("train", "val"):
        write_nanogpt(tmp_path / "bin" / f"{name}.bin", DOCUMENTS, EOS)
    with pytest.raises(CorpusError, match=r"validation_fraction = 0.1 has no effect.*own splits"):
        open_corpus(config, show_progress=False)


def test_a_saved_dictionary_has_its_own_splits(tmp_path: Path) -> None:
    rows = {"train": DOCUMENTS, "validation": DOCUMENTS[:7]}
    DatasetDict(
        {split: Dataset.from_dict({"input_ids": ids}) for split, ids in rows.items()}
    ).save_to_disk(str(tmp_path / "saved"))
    source = make_source("arrow", tmp_path / "saved")
    assert source.splits == ("train", "validation")
    for split, ids in rows.items():
        assert ids_of(source.open_tokens(split, EOS)) == ids


def test_what_the_published_script_saved_is_read_by_name(tmp_path: Path) -> None:
    DatasetDict(
        {split: Dataset.from_dict({"input_ids": PACKED}) for split in ("train", "validation")}
    ).save_to_disk(str(tmp_path / "c4_en_t5-base_512"))
    source = make_source("c4_512", tmp_path / "c4_en_t5-base_512")
    assert "packed rows of 7 tokens" in source.description
    assert ids_of(source.open_tokens("train", EOS)) == expected_of("arrow packed")
    config = config_of("c4_512", tmp_path / "c4_en_t5-base_512")
    assert plan_corpus(config).max_documents == 46_000_000


@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
@pytest.mark.parametrize("name", ["nanogpt", "megatron uint16", "arrow documents"])
def test_a_token_outside_of_the_vocabulary_is_named_or_skipped(
    name: str, on_bad_record: str, tmp_path: Path
) -> None:
    dataset, _ = WRITERS[name]
    config = config_of(dataset, tmp_path / "in", on_bad_record=on_bad_record)
    documents = [[0, 1], [1], [2, 60_000], [0]]
    if dataset == "nanogpt":
        write_nanogpt(tmp_path / "in" / "a.bin", documents, eos_of(config))
    elif dataset == "megatron":
        write_megatron(tmp_path / "in" / "a", documents, eos_of(config))
    else:
        write_arrow(tmp_path / "in", documents)
    if on_bad_record == "stop":
        with pytest.raises(
            CorpusError, match=r"in.*(token 5|document 3|row 3).*holds the token 60000.*set \[data"
        ):
            open_corpus(config, show_progress=False)
    else:
        corpus = open_corpus(config, show_progress=False)
        assert corpus.index.skipped_records == 1
        assert corpus.index.num_documents("train") == 2


def test_token_ids_need_their_tokenizer(tmp_path: Path) -> None:
    write_arrow(tmp_path / "in", DOCUMENTS)
    config = config_of("arrow", tmp_path / "in", tokenizer="train")
    with pytest.raises(CorpusError, match=r"tokenizer = 'train': .* holds token ids"):
        plan_corpus(config)


def test_a_tokenizer_whose_end_token_never_comes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenized_module, "MAX_DOCUMENT_TOKENS", 50)
    write_nanogpt(tmp_path / "a.bin", DOCUMENTS, EOS)
    with pytest.raises(CorpusError, match=r"no end-of-document token 999 in .* set \[data\]"):
        list(make_source("nanogpt", tmp_path).open_tokens(None, 999))


def write_nanogpt_uint32(file: Path, documents: list[list[int]], eos_id: int) -> None:
    flat = [token for ids in documents for token in (*ids, eos_id)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(np.array(flat, dtype="<u4").tobytes())


def test_tokens_of_a_large_vocabulary_are_read_as_uint32(tmp_path: Path) -> None:
    large = [[token * 20_000 for token in ids] for ids in DOCUMENTS]
    write_nanogpt_uint32(tmp_path / "a.bin", large, EOS)
    source = make_source("nanogpt", tmp_path)
    assert ids_of(source.for_vocabulary(160_001).open_tokens(None, EOS)) == large
    # Negative control: as uint16 they are other documents.
    assert source.for_vocabulary(1 << 16) is source
    assert ids_of(source.open_tokens(None, EOS)) != large
    with (tmp_path / "a.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(CorpusError, match=r"a\.bin: has .*expected uint32 tokens, since the token"):
        source.for_vocabulary((1 << 16) + 1)


def test_a_corpus_of_a_large_vocabulary_has_its_tokens(tmp_path: Path) -> None:
    config = config_of("nanogpt", tmp_path / "bin")
    # Tokens 0 to 3 of the tokenizer get these ids.
    tokenizer = save_tokenizer(Path(config.tokenizer), "</s>", ids_from=70_000)
    eos = read_tokenizer(tokenizer).eos_id
    documents = [[70_000 + token % 3 for token in ids] for ids in DOCUMENTS]
    for name in ("train", "val"):
        write_nanogpt_uint32(tmp_path / "bin" / f"{name}.bin", documents, eos)
    corpus = open_corpus(config, show_progress=False)
    assert corpus.index.dtype == "uint32"
    expected = [token for ids in documents for token in (*ids, eos)]
    assert tokens_of(corpus, "train") == expected


@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
def test_a_null_in_packed_rows_is_a_malformed_record(on_bad_record: str, tmp_path: Path) -> None:
    config = config_of("arrow", tmp_path / "in", on_bad_record=on_bad_record)
    eos = eos_of(config)
    rows: list[list[int | None]] = [[0, 1, eos], [1, None, eos], [2, 2, eos], [1, 1, eos]]
    Dataset.from_dict({"input_ids": rows}).save_to_disk(str(tmp_path / "in"))
    if on_bad_record == "stop":
        with pytest.raises(CorpusError, match=r"token 3 ff\.: a token is missing \(null\)"):
            open_corpus(config, show_progress=False)
        return
    corpus = open_corpus(config, show_progress=False)
    assert corpus.index.skipped_records == 1
    assert tokens_of(corpus, "validation") == [0, 1, eos]
    assert tokens_of(corpus, "train") == [2, 2, eos, 1, 1, eos]


def test_joined_rows_without_an_end_token_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_arrow(tmp_path / "in", [[4, 5, 6, 7]] * 20)
    assert ids_of(make_source("arrow", tmp_path / "in").open_tokens(None, EOS)) == [
        [4, 5, 6, 7] * 20
    ]
    (message,) = (record.getMessage() for record in caplog.records)
    assert "joined rows of 4 tokens: " in message
    assert f"no end-of-document token {EOS} in 80 tokens, so they are one document" in message
    assert "add a column 'attention_mask' if each row is a document" in message
    # Negative control: one end token is enough, also after a position.
    caplog.clear()
    write_arrow(tmp_path / "ended", [[4, 5, EOS, 7]] + [[4, 5, 6, 7]] * 20)
    stream = make_source("arrow", tmp_path / "ended").open_tokens(None, EOS)
    next(stream)
    ids_of(make_source("arrow", tmp_path / "ended").open_tokens(None, EOS, stream.position()))
    list(stream)
    assert not caplog.records


def test_the_size_of_text_is_left_out_for_token_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="switchtitan")
    config = config_of("nanogpt", tmp_path / "bin")
    documents = [[token % 3 for token in ids] for ids in DOCUMENTS]
    write_nanogpt(tmp_path / "bin" / "a.bin", documents, eos_of(config))
    shown = summary(open_corpus(config, show_progress=False))
    assert "61 documents so far" in caplog.text
    assert "MB of text" not in caplog.text + shown
    # Negative control: a corpus of text has one.
    (tmp_path / "text.jsonl").write_text('{"text": "a b a"}\n' * 20)
    caplog.clear()
    shown = summary(open_corpus(config_of("jsonl", tmp_path / "text.jsonl"), show_progress=False))
    assert "MB of text so far" in caplog.text
    assert shown.count("MB of text") == 2


def damaged_index(field: int, value: int) -> bytes:
    """A Megatron header with one changed field."""
    fields: list[object] = [b"MMIDIDX\0\0", 1, 8, 0, 1]
    fields[field] = value
    return struct.pack("<9sQBQQ", *fields) + bytes(8)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.bin", b"\1\2\3", r"a\.bin: has 3 bytes, expected uint16"),
        ("a.bin", struct.pack("<3I", 20240520, 1, 1), "has llm.c's header"),
        ("a.idx", b"MMIDIDX", "truncated index"),
        ("a.idx", b"x" * 60, "expected an index of Megatron-LM"),
        ("a.idx", damaged_index(1, 2), "version 2"),
        ("a.idx", damaged_index(2, 7), "code 7 of the dtype"),
        ("a.idx", damaged_index(3, 1 << 62), "too few for"),
    ],
)
def test_damaged_files_are_named(name: str, contents: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0\0")
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(CorpusError, match=message):
        make_source("megatron" if name == "a.idx" else "nanogpt", tmp_path)


def test_a_sequence_outside_of_the_file_is_a_bad_record(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS, EOS)
    tokens = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(tokens[:-2])
    *whole, last = make_source("megatron", tmp_path).open_tokens(None, EOS)
    assert [document.ids.tolist() for document in whole] == DOCUMENTS[:-1]
    assert f"document {len(DOCUMENTS)}" in last.what
    assert "not in the .bin file" in last.what


def test_rows_that_are_no_longer_packed_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("switchtitan.data.sources.arrow._PEEKED_ROWS", 5)
    write_arrow(tmp_path, [*PACKED, [1, 2]])
    with pytest.raises(CorpusError, match="expected 7 tokens in each row"):
        list(make_source("arrow", tmp_path).open_tokens(None, EOS))


def test_a_saved_dataset_with_files_elsewhere_is_refused(tmp_path: Path) -> None:
    write_arrow(tmp_path / "other", DOCUMENTS)
    write_arrow(tmp_path / "in", DOCUMENTS)
    file = tmp_path / "in" / "state.json"
    state = json.loads(file.read_text())
    (entry,) = state["_data_files"]
    entry["filename"] = f"../other/{entry['filename']}"
    file.write_text(json.dumps(state))
    with pytest.raises(CorpusError, match=r"state\.json: names the file '\.\./other/data"):
        make_source("arrow", tmp_path / "in")


def test_a_folder_that_is_no_saved_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"cannot be loaded .* save_to_disk"):
        make_source("arrow", tmp_path)
