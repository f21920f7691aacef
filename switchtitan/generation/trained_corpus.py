"""Find the corpus that a run was trained on, which holds its tokenizer."""

from pathlib import Path

from switchtitan.checkpoint import CheckpointMetadata
from switchtitan.config.toml_files import parse_toml
from switchtitan.config.toml_text import flatten
from switchtitan.data.corpus_files import CorpusIndex, read_index
from switchtitan.errors import CheckpointError, CorpusError
from switchtitan.files import is_plain_name


def find_corpus(metadata: CheckpointMetadata) -> Path:
    """Returns the folder of the run's corpus, which need not exist."""
    config = flatten(parse_toml(metadata.config, "the saved configuration"))
    cache_dir, name = config.get("data.cache_dir"), str(metadata.identity_value("corpus", "name"))
    if not isinstance(cache_dir, str) or "\0" in cache_dir or not is_plain_name(name):
        raise CheckpointError(
            f"the checkpoint names no folder of a corpus: data.cache_dir = {cache_dir!r}, "
            f"corpus.name = {name!r}"
        )
    return Path(cache_dir) / name


def trained_corpus(folder: Path, metadata: CheckpointMetadata) -> CorpusIndex | None:
    """Returns the index of the corpus in `folder`, or None if there is no such folder.

    Raises:
        CorpusError: if it is damaged, or not the corpus of the run.
    """
    if not folder.is_dir():
        return None
    index = read_index(folder)
    corpus = metadata.identity.get("corpus")
    # Of a mixture, the first source has the tokenizer.
    is_mixture = isinstance(corpus, dict) and "first_source" in corpus
    expected = metadata.identity_value("corpus", "first_source" if is_mixture else "fingerprint")
    if index.fingerprint != expected:
        raise CorpusError(
            f"{folder}: its fingerprint is {index.fingerprint}, but the run trained on {expected}; "
            "move that folder away to do without its tokenizer"
        )
    return index
