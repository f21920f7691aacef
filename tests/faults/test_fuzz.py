"""Every reader of files reads a damaged file, or refuses it by one message; nothing else.

Each target prepares valid files in a folder; it returns a function that damages them, and one that
reads them.
"""

import json

import pytest
import torch
from support.folders import random_weights, read_weights, with_header
from support.fuzzing import EXTREME_NUMBERS, STRANGE_STRINGS, fuzz, mutate_bytes, mutate_json
from support.long_form import num_cases
from support.tiny import METHOD_KEYS, tiny_config, tiny_toml
from support.tiny_documents import ROWS, TOKENIZER, save_tokenizer

from switchtitan.data.config import SourceConfig
from switchtitan.data.prepare import read_chunks
from switchtitan.data.sources import DATASETS
from switchtitan.data.tokenizer import read_tokenizer
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.huggingface import parameter_shapes
from switchtitan.hub.initial_weights import read_model_folder
from switchtitan.job.config import parse_arguments
from switchtitan.models import MODELS
from switchtitan.registry import toml_value


def damage_one_of(folder, change):
    """Restores all files of a folder, and changes the bytes of one of them to `change` of its name,
    valid bytes and a source of random numbers."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    valid = {file: file.read_bytes() for file in files}

    def damage(draw):
        for file, data in valid.items():
            if not file.exists() or file.read_bytes() != data:
                file.write_bytes(data)
        file = draw.choice(list(valid))
        changed = change(file.name, valid[file], draw)
        file.write_bytes(changed)
        return f"{file.name}: {changed[:300]!r}"

    return damage


def change_json(name, data, draw):
    """Changes values of JSON, rarely bytes of it; bytes of other files."""
    if not name.endswith(".json") or draw.random() < 0.2:
        return mutate_bytes(data, draw)
    return mutate_json(json.loads(data), draw).encode("utf-8", "surrogatepass")


VALID = [tiny_toml("here", method) for method in METHOD_KEYS]


def configuration(folder):
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


def change_safetensors(name, valid, draw):
    """Changes bytes or the header's values."""
    if not name.endswith(".safetensors") or draw.random() < 0.4:
        return change_json(name, valid, draw)
    return with_header(valid, lambda header: mutate_json(header, draw))


def hugging_face_folder(folder):
    model, exported = tiny_config(folder / "home", "full_rank").model, folder / "exported"
    weights = random_weights(model).__getitem__
    export_dense(weights, model, exported, torch.float32, max_shard_bytes=20_000)

    def read():
        assert parameter_shapes(MODELS.restore(read_model_folder(exported)))
        read_weights(exported, model)

    return damage_one_of(exported, change_safetensors), read


def tokenizer(folder):
    save_tokenizer(folder / "tokenizer.json", "</s>")
    settings = {"eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    def read():
        read_tokenizer(folder).encode_documents(["a b </s>", "日本"])

    return damage_one_of(folder, change_json), read


def source(row):
    def target(folder):
        row.write(folder)

        def read():
            config = SourceConfig(dataset=row.dataset, path=folder, **row.keys)
            opened = DATASETS[config.dataset].open(config, None)
            stream = opened.read(None, None, TOKENIZER)
            for documents, *_ in read_chunks(stream, None, None):
                for document in documents:
                    assert isinstance(document, str) or 0 <= document.min() <= document.max() < 10

        return damage_one_of(folder, lambda name, data, draw: mutate_bytes(data, draw)), read

    return target


TARGETS = {
    "configuration": (configuration, 10_000, 60, 0.3),
    "Hugging Face's layout": (hugging_face_folder, 10_000, 30, 0.3),
    "tokenizer": (tokenizer, 2000, 30, 0.2),
    **{
        f"source of {name}": (source(row), 1500, 20, 0.05)
        for name, row in ROWS.items()
        if row.split is None and row.dataset != "hub"
    },
}
"""What is read -> numbers of cases in the long and in the short form, and the least share that must
be refused."""
UNBOUNDED = ("tokenizer",)
"""A broken tokenizer's file may make the library reserve memory lazily."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_or_refused_by_a_message(name, tmp_path, request):
    target, long, short, min_refused = TARGETS[name]
    damage, read = target(tmp_path)
    if name not in UNBOUNDED:
        request.getfixturevalue("bounded_memory")
    read()
    fuzz(damage, read, range(num_cases(long, short)), min_refused)
