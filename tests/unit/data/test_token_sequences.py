import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from switchtitan.data.token_sequences import TokenSequences, document_ids
from switchtitan.errors import CorpusError

EOS = 0


def write_shards(folder: Path, tokens: np.ndarray, cuts: list[int], dtype: str) -> TokenSequences:
    pieces = np.split(tokens, cuts)
    files = [folder / f"{number}.bin" for number in range(len(pieces))]
    for file, piece in zip(files, pieces, strict=True):
        piece.astype(np.dtype(dtype).newbyteorder("<")).tofile(file)
    counts = [len(piece) for piece in pieces]
    return TokenSequences(files, counts, dtype=dtype, seq_len=7, eos_id=EOS)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("cuts", [[], [10, 11, 30], [1, 2, 3, 4, 5, 6]])
def test_sequences_are_slices_of_the_joined_shards(
    tmp_path: Path, dtype: str, cuts: list[int]
) -> None:
    tokens = np.random.default_rng(0).integers(
        0, 65_000 if dtype == "uint16" else 4_000_000_000, 50
    )
    sequences = write_shards(tmp_path, tokens, cuts, dtype)
    assert len(sequences) == 7  # (50 - 1) // 7
    for index in range(7):
        assert sequences[index].tokens.dtype == torch.int64
        assert sequences[index].tokens.tolist() == tokens[index * 7 : index * 7 + 8].tolist()
    with pytest.raises(IndexError):
        sequences[7]


def test_document_ids_count_the_eos_before_a_token() -> None:
    ids = document_ids(torch.tensor([5, EOS, 6, 7, EOS, EOS, 8]), EOS)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [0, 0, 1, 1, 1, 2, 3]


def test_pickling_reopens_the_files_instead_of_copying_the_tokens(tmp_path: Path) -> None:
    tokens = np.arange(100_000) % 1000
    sequences = write_shards(tmp_path, tokens, [40_000], "uint16")
    pickled = pickle.dumps(sequences)
    assert len(pickled) < 2000
    assert torch.equal(pickle.loads(pickled)[9].tokens, sequences[9].tokens)


def test_a_corpus_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"seq_len = 7: .* 7 tokens, .* needs 8"):
        write_shards(tmp_path, np.arange(7), [], "uint16")
    assert len(write_shards(tmp_path, np.arange(8), [], "uint16")) == 1


def test_a_truncated_or_missing_shard_is_named(tmp_path: Path) -> None:
    sequences = write_shards(tmp_path, np.arange(50), [20], "uint16")
    (tmp_path / "1.bin").write_bytes(b"\0" * 10)
    with pytest.raises(CorpusError, match=r"1\.bin: .* 10 bytes, expected 60; delete the folder"):
        TokenSequences(
            sequences.files, sequences.token_counts, dtype="uint16", seq_len=7, eos_id=EOS
        )
    (tmp_path / "1.bin").unlink()
    with pytest.raises(CorpusError, match=r"1\.bin: .*cannot be read"):
        TokenSequences(
            sequences.files, sequences.token_counts, dtype="uint16", seq_len=7, eos_id=EOS
        )
