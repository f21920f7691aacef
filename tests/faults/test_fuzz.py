"""Every reader of files reads a damaged file, or refuses it by one message; nothing else.

Each target prepares valid files in a folder; it returns a function that damages them, and one that
reads them.
"""

import gzip
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from support.folders import HeldWeights
from support.fuzzing import EXTREME_NUMBERS, STRANGE_STRINGS, fuzz, mutate_bytes, mutate_json
from support.long_form import IS_LONG, num_cases
from support.tiny import METHOD_KEYS, tiny_config, tiny_toml
from support.tiny_documents import make_documents, save_tokenizer, write_json_lines, write_nanogpt

from switchtitan.config import toml_value
from switchtitan.data import DATASETS, DataConfig, open_corpus, open_prepared
from switchtitan.data.config import SourceConfig
from switchtitan.data.corpus import CorpusIndex, fingerprint_of
from switchtitan.data.prepare import read_batches
from switchtitan.data.tokenizer import read_tokenizer
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.huggingface import parameter_shapes
from switchtitan.hub.initial_weights import read_initial_weights, read_model_folder
from switchtitan.job.config import parse_arguments
from switchtitan.models import MODELS

DOCUMENTS = make_documents(30)


def damage_one_of(folder, change):
    """Restores all files of a folder, and changes the bytes of one of them.

    Args:
        change: of a name, valid bytes and a source of random numbers to other bytes.
    """
    valid = {file: file.read_bytes() for file in sorted(folder.iterdir())}

    def damage(draw):
        for file, data in valid.items():
            if not file.exists() or file.read_bytes() != data:
                file.write_bytes(data)
        file = draw.choice(list(valid))
        changed = change(file.name, valid[file], draw)
        file.write_bytes(changed)
        return f"{file.name}: {changed[:300]!r}"

    return damage


def change_bytes(name, data, draw):
    return mutate_bytes(data, draw)


def change_json(name, data, draw):
    """Changes values of JSON, rarely bytes of it; bytes of other files."""
    if not name.endswith(".json") or draw.random() < 0.2:
        return mutate_bytes(data, draw)
    return mutate_json(json.loads(data), draw).encode("utf-8", "surrogatepass")


# Configurations.


VALID = [tiny_toml("here", method) for method in METHOD_KEYS]


def configuration(folder, home):
    file = folder / "config.toml"
    file.write_text(VALID[0])
    strings = [text.encode(errors="ignore").decode() for text in STRANGE_STRINGS]
    values = [*map(toml_value, [*EXTREME_NUMBERS, *strings, [], [[1]], True]), "{}", "1979-05-27"]

    def damage(draw):
        """Changes bytes, or the value of a key."""
        text = draw.choice(VALID)
        if draw.random() < 0.5:
            data = mutate_bytes(text.encode(), draw)
        else:
            line = draw.choice([line for line in text.splitlines() if " = " in line])
            changed = f"{line.partition(' = ')[0]} = {draw.choice(values)}"
            data = text.replace(line, changed, 1).encode()
        file.write_bytes(data)
        return data

    return damage, lambda: parse_arguments(["--config", str(file)], num_ranks=1)


def command_line(folder, home):
    (folder / "config.toml").write_text(VALID[0])
    given = ["--config", str(folder / "config.toml")]
    config = parse_arguments(given, num_ranks=1)
    keys = [f"--{section}.{key}" for section, values in config for key in type(values).model_fields]
    values = [
        *map(str, EXTREME_NUMBERS[:-6]),
        "inf",
        "nan",
        *STRANGE_STRINGS,
        "[[1]]",
        "1979-05-27",
    ]
    words = list(given)

    def damage(draw):
        words[:] = given
        for _ in range(draw.choice((1, 1, 2))):
            words.extend((draw.choice((*keys, "--", "-x", "--a", "--job.")), draw.choice(values)))
        return list(words)

    return damage, lambda: parse_arguments(words, num_ranks=1)


# Weights.


def random_weights(model):
    generator = torch.Generator().manual_seed(1)
    shapes = parameter_shapes(model)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def change_safetensors(name, valid, draw):
    """Changes bytes, the header's length or the header's values."""
    if not name.endswith(".safetensors"):
        return change_json(name, valid, draw)
    length = int.from_bytes(valid[:8], "little")
    header, data = valid[8 : 8 + length], valid[8 + length :]
    chosen = draw.random()
    if chosen < 0.3:
        return mutate_bytes(valid, draw)
    if chosen < 0.4:
        extreme = draw.choice((0, 1, length - 1, length + 1, 10**8, 2**31, 2**63, 2**64 - 1))
        return extreme.to_bytes(8, "little") + header + data
    if chosen < 0.5:
        changed = mutate_bytes(header, draw)
    else:
        changed = mutate_json(json.loads(header), draw).encode()
    return len(changed).to_bytes(8, "little") + changed + data


def hugging_face_folder(folder, home):
    model, exported = home.model, folder / "exported"
    weights = HeldWeights(random_weights(model)).read
    export_dense(weights, model, exported, torch.float32, max_shard_bytes=20_000)
    return damage_one_of(exported, change_safetensors), lambda: read_initial_weights(
        exported, model
    )


def architecture(folder, home):
    """A config.json that gives the model's shapes."""
    model = home.model
    (folder / "config.json").write_text(json.dumps(model.huggingface_config(512)))

    def read():
        config = MODELS.restore(read_model_folder(folder))
        assert parameter_shapes(config)

    return damage_one_of(folder, change_json), read


# Corpora.


def reader_of_corpus(folder):
    """Returns what reads all that a run reads."""

    def read():
        opened = open_prepared(folder)
        opened.check_vocabulary(1 << 40)
        opened.tokenizer().encode_documents(["a b"])
        for split in ("train", "validation"):
            sequences = opened.split(split, 4)
            assert len(sequences[len(sequences) - 1].tokens) == 5

    return read


def corpus(folder, home):
    copy = shutil.copytree(home.corpus, folder / "corpus")
    return damage_one_of(copy, change_bytes), reader_of_corpus(copy)


def crafted_corpus(folder, home):
    """Values of the index change; it has no checksum, and its own fingerprint, as an attacker's."""
    copy = shutil.copytree(home.corpus, folder / "corpus")
    (copy / "index.json.sha256").unlink()
    valid = (copy / "index.json").read_bytes()

    def damage(draw):
        data = change_json("index.json", valid, draw)
        try:
            index = CorpusIndex.model_validate_json(data)
            own = fingerprint_of(index.tokenizer.sha256, index.dtype, index.splits)
            data = index.model_copy(update={"fingerprint": own}).model_dump_json().encode()
        except (ValueError, AttributeError, TypeError):
            pass
        (copy / "index.json").write_bytes(data)
        return data

    return damage, reader_of_corpus(copy)


def tokenizer(folder, home):
    save_tokenizer(folder / "tokenizer.json", "</s>")
    settings = {"eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    def read():
        read_tokenizer(folder).encode_documents(["a b </s>", "日本"])

    return damage_one_of(folder, change_json), read


# Sources of documents and of tokens.


def write_text(folder):
    (folder / "a.txt").write_bytes("".join(DOCUMENTS).encode())


def write_parquet(folder):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=8)


def write_lines_as(suffix):
    return lambda folder: write_json_lines(folder / f"a.{suffix}", DOCUMENTS)


IDS = [[4 + number % 5] * (1 + number % 7) for number in range(60)]
TOKENIZER = SimpleNamespace(vocab_size=10, eos_id=3, dtype="uint16")
SOURCES = {
    "text": write_text,
    "jsonl": write_lines_as("jsonl"),
    "jsonl, gz": write_lines_as("json.gz"),
    "jsonl, zst": write_lines_as("jsonl.zst"),
    "parquet": write_parquet,
    "nanogpt": lambda folder: write_nanogpt(folder / "a.bin", IDS, 3),
}
"""Name of a dataset, and its variant -> what writes its files to a folder."""


def change_compressed(name, data, draw):
    """Changes the contents or the compressed bytes."""
    if name.endswith(".gz") and draw.random() < 0.3:
        return gzip.compress(mutate_bytes(gzip.decompress(data), draw))
    if name.endswith(".zst") and draw.random() < 0.3:
        import zstandard

        return zstandard.compress(mutate_bytes(zstandard.decompress(data), draw))
    return mutate_bytes(data, draw)


def source(name):
    def target(folder, home):
        SOURCES[name](folder)

        def read():
            config = SourceConfig(dataset=name.partition(",")[0], path=folder)
            opened = DATASETS[config.dataset].open(config, None)
            stream = opened.read(None, None, TOKENIZER)
            for batch in read_batches(stream, None, None):
                for document in batch.documents:
                    assert isinstance(document, str) or 0 <= document.min() <= document.max() < 10

        return damage_one_of(folder, change_compressed), read

    return target


@pytest.fixture(scope="module")
def home(corpora):
    """A model's section and the folder of a corpus, which several targets copy."""
    folder = corpora / "fuzzed"
    model = tiny_config(folder, "full_rank").model
    write_json_lines(folder / "in" / "a.jsonl", DOCUMENTS)
    keys = {"dataset": "jsonl", "path": folder / "in", "vocab_size": 270}
    opened = open_corpus(DataConfig(**keys, cache_dir=folder / "corpora"))
    return SimpleNamespace(model=model, corpus=opened.folder)


TARGETS = {
    "configuration": (configuration, 10_000, 60, 0.3),
    "command line": (command_line, 2500, 40, 0.3),
    "Hugging Face's layout": (hugging_face_folder, 10_000, 30, 0.3),
    "architecture": (architecture, 10_000, 25, 0.1),
    "corpus": (corpus, 2000, 30, 0.3),
    "crafted corpus": (crafted_corpus, 10_000, 50, 0.3),
    "tokenizer": (tokenizer, 2000, 30, 0.2),
    **{f"source of {name}": (source(name), 1500, 20, 0.05) for name in SOURCES},
}
"""What is read -> numbers of cases in the long and in the short form, and the least share that must
be refused."""
UNBOUNDED = ("tokenizer",)
"""A broken tokenizer's file may make the library reserve memory lazily."""


@pytest.mark.parametrize("part", range(num_cases(4, 1)))
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_or_refused_by_a_message(name, part, tmp_path, home, request):
    target, long, short, min_refused = TARGETS[name]
    number = long // 4 if IS_LONG else short
    damage, read = target(tmp_path, home)
    if name not in UNBOUNDED:
        request.getfixturevalue("bounded_memory")
    read()
    fuzz(damage, read, range(part * number, (part + 1) * number), min_refused)
