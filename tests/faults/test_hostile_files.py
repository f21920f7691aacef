"""Files made to run code, to leave their folder or to exhaust memory.

Each is given to a command, as a user would: it ends with status 2 and one message that names the
file, and changes nothing.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.checkpoints import rewrite_index, rewrite_metadata, update_checksums
from support.commands import run, succeed
from support.folders import change_json, contents, random_weights, with_header
from support.fuzzing import limited_cpu_time
from support.preparation import write_documents
from support.tiny import tiny_config, tiny_trainer
from support.tiny_documents import make_documents

from switchtitan.checkpoint.load import read_metadata
from switchtitan.data.prepare import open_corpus
from switchtitan.hub.export_folder import export_dense


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, trace):
        self._trace = trace

    def __reduce__(self):
        return (Path.touch, (self._trace,))


@pytest.fixture
def trace(tmp_path):
    """A file that must not be written."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def payload(trace):
    """A pickle with an effect, which is checked and taken back."""
    data = pickle.dumps(Payload(trace), protocol=2)
    pickle.loads(data)
    assert trace.exists()
    trace.unlink()
    return data


@pytest.fixture(scope="module")
def home(corpora):
    """A folder with a run's configuration, a checkpoint, and weights in one file and in shards."""
    folder = corpora / "hostile"
    trainer = tiny_trainer(folder, "full_rank")
    trainer.checkpointer.save(0, trainer.tensors(), asdict(trainer.stepper.state))
    trainer.stepper.close()
    model = tiny_config(folder, "full_rank").model
    next(folder.glob("full_rank-*.toml")).rename(folder / "run.toml")
    read = random_weights(model).__getitem__
    export_dense(read, model, folder / "hf", torch.float32)
    export_dense(read, model, folder / "sharded", torch.float32, max_shard_bytes=20_000)
    return folder


class Given:
    """A folder that somebody else made, and the command that uses it."""

    def __init__(self, folder, *words):
        self.folder = folder
        self.words = words

    def __truediv__(self, name):
        return self.folder / name

    def use(self):
        with limited_cpu_time(60):
            return run(*self.words)

    def check_refused(self, *parts):
        before = contents(self.folder)
        self.use().check_refused(*map(str, parts))
        assert contents(self.folder) == before


@pytest.fixture
def checkpoint(home, tmp_path):
    source = home / "run" / "checkpoints" / "step-000000000"
    folder = shutil.copytree(source, tmp_path / "given" / source.name)
    return Given(folder, "evaluate", folder)


def given_model(home, name, tmp_path):
    folder = shutil.copytree(home / name, tmp_path / name)
    return Given(folder, "evaluate", folder, "--config", home / "run.toml")


@pytest.fixture
def weights(home, tmp_path):
    return given_model(home, "hf", tmp_path)


@pytest.fixture
def shards(home, tmp_path):
    return given_model(home, "sharded", tmp_path)


@pytest.fixture
def corpus(tmp_path):
    """A prepared corpus."""
    config = write_documents(tmp_path, make_documents(30), vocab_size=270)
    words = ("--cache_dir", config.cache_dir, "--vocab_size", 270)
    return Given(
        open_corpus(config).folder, "prepare", "--dataset=jsonl", "--path", config.path, *words
    )


FILES = [
    ("checkpoint", ".metadata"),
    ("checkpoint", "metadata.json"),
    ("checkpoint", "__0_0.distcp"),
    ("weights", "model.safetensors"),
    ("weights", "config.json"),
    ("corpus", "index.json"),
    ("corpus", "tokenizer.json"),
    ("corpus", "train-00000.bin"),
]


@pytest.mark.parametrize("kind", ["checkpoint", "weights", "shards", "corpus"])
def test_the_files_are_valid_before_they_are_changed(kind, request):
    assert request.getfixturevalue(kind).use().status == 0


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_pickle_in_place_of_a_file_does_not_run(kind, name, payload, request):
    given = request.getfixturevalue(kind)
    (given / name).write_bytes(payload)
    if kind == "checkpoint":
        update_checksums(given.folder)
    given.check_refused(given.folder if kind == "checkpoint" else given / name)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        # Names with dots are looked up as attributes of allowed modules.
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "Size.__class__"),
    ],
)
def test_an_index_of_tensors_finds_nothing_but_its_own_classes(checkpoint, module, name):
    strings = b"".join(pickle.dumps(text, protocol=4)[11:-2] for text in (module, name))
    (checkpoint / ".metadata").write_bytes(b"\x80\x04" + strings + b"\x93.")
    update_checksums(checkpoint.folder)
    checkpoint.check_refused(checkpoint.folder, "do not trust it", name)


def test_a_pickle_in_a_tensor_of_a_checkpoint_does_not_run(checkpoint, payload):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("archive/data.pkl", payload)
        packed.writestr("archive/version", "3\n")
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(archive.getvalue().ljust(file.stat().st_size, b"\0"))

    def point_to_it(index):
        for piece in index.storage_data.values():
            piece.offset, piece.length = 0, len(archive.getvalue())

    rewrite_index(checkpoint.folder, point_to_it)
    checkpoint.check_refused(checkpoint.folder, "do not trust it")


@pytest.mark.parametrize(("kind", "name"), [*FILES, ("checkpoint", "SHA256SUMS")])
def test_a_file_is_no_link_out_of_its_folder(kind, name, request, tmp_path):
    given = request.getfixturevalue(kind)
    (given / name).rename(tmp_path / name)
    (given / name).symlink_to(tmp_path / name)
    named = "index.json" if kind == "corpus" else name
    given.check_refused(named, "outside of the folder")


def test_a_tokenizer_is_no_link_out_of_its_folder(corpus, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").symlink_to(corpus / "tokenizer.json")
    words = (*corpus.words[:-2], "--tokenizer", tmp_path / "tokenizer")
    run(*words).check_refused("[data] tokenizer", "outside of the folder")


def change_corpus_index(corpus, change):
    """Changes the index of a corpus, and deletes its checksum."""
    (corpus / "index.json.sha256").unlink()
    index = json.loads((corpus / "index.json").read_text())
    change(index)
    (corpus / "index.json").write_text(json.dumps(index))


def name_in_corpus(corpus, name):
    change_corpus_index(corpus, lambda index: index["splits"]["train"][0].update(file=name))


def name_in_shards(shards, name):
    file = shards / "model.safetensors.index.json"
    names = json.loads(file.read_text())["weight_map"]
    change_json(file, {"weight_map": dict.fromkeys(names, name)})


def name_in_checkpoint(checkpoint, name):
    def change(index):
        for piece in index.storage_data.values():
            piece.relative_path = name

    rewrite_index(checkpoint.folder, change)


INDICES = {
    "corpus": (name_in_corpus, "train-00000.bin"),
    "shards": (name_in_shards, "model-00001-of-*.safetensors"),
    "checkpoint": (name_in_checkpoint, "__0_0.distcp"),
}
"""What names a file in an index of a folder, and such a file."""


@pytest.mark.parametrize(
    ("kind", "place"),
    # The checksums of a checkpoint list no link. tests/unit/test_files.py has other names.
    [*((kind, "relative") for kind in INDICES), ("corpus", "link"), ("shards", "link")],
)
def test_an_index_names_no_file_outside_of_its_folder(kind, place, request, tmp_path):
    given, (write_name, pattern) = request.getfixturevalue(kind), INDICES[kind]
    outside = tmp_path / "outside"
    (file,) = given.folder.glob(pattern)
    shutil.copyfile(file, outside)
    name = "link" if place == "link" else os.path.relpath(outside, given.folder)
    if place == "link":
        (given / "link").symlink_to(outside)
    write_name(given, name)
    given.check_refused(name[:40])  # messages shorten it


@pytest.mark.parametrize("name", ["..", "/etc", "a\0b"])
def test_an_export_reads_no_tokenizer_but_that_of_the_run_s_corpus(checkpoint, tmp_path, name):
    (recorded,) = read_metadata(checkpoint.folder).run["sources"]
    rewrite_metadata(
        checkpoint.folder, lambda metadata: metadata["run"]["sources"][0].update(folder=name)
    )
    # It is found in the run's cache_dir.
    succeed("export", checkpoint.folder, "--folder", tmp_path / "out")
    own, exported = (
        folder / "tokenizer.json" for folder in (Path(recorded["folder"]), tmp_path / "out")
    )
    assert own.read_bytes() == exported.read_bytes()


def test_a_stopped_preparation_with_links_writes_nothing_outside(corpus, tmp_path):
    partial = corpus.folder.with_name(corpus.folder.name + ".partial")
    corpus.folder.rename(partial)
    (partial / "train-00000.bin").unlink()
    (tmp_path / "victim").write_text("untouched")
    (partial / "train-00000.bin").symlink_to(tmp_path / "victim")
    (partial / "progress.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "splits": {}}))
    assert corpus.use().status == 0
    assert (tmp_path / "victim").read_text() == "untouched"
    assert not (corpus / "train-00000.bin").is_symlink()


def set_length_of_header(weights, length):
    file = weights / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])


def set_shape_in_header(weights, shape):
    def change(header):
        header["model.norm.weight"]["shape"] = shape
        return json.dumps(header)

    file = weights / "model.safetensors"
    file.write_bytes(with_header(file.read_bytes(), change))


def set_shape_in_index(checkpoint, shape):
    def change(index):
        index.state_dict_metadata["model.model.norm.weight"].size = torch.Size(shape)

    rewrite_index(checkpoint.folder, change)


def set_number_of_tokens(corpus, tokens):
    change_corpus_index(corpus, lambda index: index["splits"]["train"][0].update(tokens=tokens))


def nest_deeply(given, name):
    (given / name).write_text('{"a":' * 100_000)


ABSURD = [
    *(("weights", set_length_of_header, n) for n in (2**40, 2**64 - 1)),
    *(("weights", set_shape_in_header, shape) for shape in ([2**62, 2**62], [10**6, 10**6])),
    *(("checkpoint", set_shape_in_index, shape) for shape in ([2**62, 2**62], [10**6, 10**6])),
    *(("corpus", set_number_of_tokens, n) for n in (2**40, 2**47, 2**62, 2**64, -1)),
    ("checkpoint", nest_deeply, "metadata.json"),
    ("weights", nest_deeply, "config.json"),
    ("corpus", nest_deeply, "index.json"),
]


@pytest.mark.parametrize(("kind", "change", "value"), ABSURD)
def test_an_absurd_size_takes_no_memory(kind, change, value, request, bounded_memory):
    given = request.getfixturevalue(kind)
    change(given, value)
    given.check_refused(given.folder)
