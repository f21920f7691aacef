"""Files made to run code, to leave their folder or to exhaust memory, and mistakes in files.

Each is given to a command, as a user would: it ends with status 2 and one message that names the
file, and changes nothing.
"""

import hashlib
import io
import json
import pickle
import shutil
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.checkpoints import rewrite_index, rewrite_metadata, update_checksums
from support.commands import run
from support.folders import HeldWeights
from support.fuzzing import limited_cpu_time
from support.tiny import tiny_config, tiny_trainer
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.data import DataConfig, open_corpus
from switchtitan.data.corpus import CorpusIndex, fingerprint_of
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.huggingface import parameter_shapes


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
    generator = torch.Generator().manual_seed(1)
    shapes = parameter_shapes(model)
    weights = HeldWeights(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )
    export_dense(weights.read, model, folder / "hf", torch.float32)
    export_dense(weights.read, model, folder / "sharded", torch.float32, max_shard_bytes=20_000)
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


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def checkpoint(home, tmp_path):
    source = home / "run" / "checkpoints" / "step-000000000"
    folder = shutil.copytree(source, tmp_path / "given" / source.name)
    return Given(folder, "evaluate", folder)


@pytest.fixture
def evaluate(home):
    """Returns the use of a folder of weights."""
    return lambda folder: Given(folder, "evaluate", folder, "--config", home / "run.toml")


@pytest.fixture
def weights(home, tmp_path, evaluate):
    return evaluate(shutil.copytree(home / "hf", tmp_path / "weights"))


@pytest.fixture
def shards(home, tmp_path, evaluate):
    return evaluate(shutil.copytree(home / "sharded", tmp_path / "shards"))


@pytest.fixture
def corpus(tmp_path):
    """A prepared corpus."""
    write_json_lines(tmp_path / "texts" / "a.jsonl", make_documents(30))
    keys = {"path": tmp_path / "texts", "cache_dir": tmp_path / "corpora", "vocab_size": 270}
    folder = open_corpus(DataConfig(dataset="jsonl", **keys)).folder
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    return Given(folder, "prepare", "--dataset", "jsonl", *words)


GIVEN = ("checkpoint", "weights", "shards", "corpus")


@pytest.mark.parametrize("kind", GIVEN)
def test_the_files_are_valid_before_they_are_changed(kind, request):
    assert request.getfixturevalue(kind).use().status == 0


# Code.


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("checkpoint", ".metadata"),
        ("checkpoint", "metadata.json"),
        ("checkpoint", "__0_0.distcp"),
        ("weights", "model.safetensors"),
        ("weights", "config.json"),
        ("corpus", "index.json"),
        ("corpus", "tokenizer.json"),
        ("corpus", "train-00000.bin"),
    ],
)
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


def test_code_in_a_hugging_face_folder_is_not_imported(weights, trace):
    """What transformers calls remote code."""
    (weights / "modeling.py").write_text(f"open({str(trace)!r}, 'w')\n")
    config = json.loads((weights / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    (weights / "config.json").write_text(json.dumps(config))
    assert weights.use().status == 0


def test_a_pickle_in_a_parquet_file_does_not_run(payload, tmp_path):
    """Old versions of pyarrow unpickled the type of an extension column (CVE-2023-47248)."""
    import pyarrow
    import pyarrow.parquet

    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": payload,
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=metadata)
    table = pyarrow.table([make_documents(9)], schema=pyarrow.schema([field]))
    (tmp_path / "texts").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "texts" / "a.parquet")
    words = ("--path", tmp_path / "texts", "--cache_dir", tmp_path / "out", "--vocab_size", 270)
    assert run("prepare", "--dataset", "parquet", *words).status == 0


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.mkdir [x]", "__import__('os').mkdir('x')", "{x!r}"]
)
def test_nothing_in_a_configuration_is_evaluated(home, tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    valid = (home / "run.toml").read_text()
    (tmp_path / "run.toml").write_text(valid.replace("steps = 40", f'steps = "{text}"'))
    Given(tmp_path, "train", "--config", tmp_path / "run.toml").check_refused("[training] steps")
    assert list(tmp_path.iterdir()) == [tmp_path / "run.toml"]


# Paths and links that leave the folder.


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("checkpoint", "metadata.json"),
        ("checkpoint", "SHA256SUMS"),
        ("checkpoint", ".metadata"),
        ("checkpoint", "__0_0.distcp"),
        ("weights", "model.safetensors"),
        ("weights", "config.json"),
        ("corpus", "index.json"),
        ("corpus", "tokenizer.json"),
    ],
)
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


def test_a_snapshot_of_the_hugging_face_cache_can_be_used(home, tmp_path, evaluate):
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in (home / "sharded").iterdir():
        shutil.copyfile(file, repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert evaluate(snapshot).use().status == 0


def change_corpus_index(corpus, change):
    """Changes the index of a corpus and its fingerprint, and deletes its checksum."""
    (corpus / "index.json.sha256").unlink()
    data = json.loads((corpus / "index.json").read_text())
    change(data)
    index = CorpusIndex.model_validate(data)
    own = fingerprint_of(index.tokenizer.sha256, index.dtype, index.splits)
    text = index.model_copy(update={"fingerprint": own}).model_dump_json()
    (corpus / "index.json").write_text(text)


@pytest.mark.parametrize("kind", ["relative", "absolute", "link", "link-to-folder"])
def test_a_corpus_reads_no_file_outside_of_its_folder(corpus, tmp_path, kind):
    shard, outside = corpus / "train-00000.bin", tmp_path / "outside.bin"
    shard.rename(outside)
    name = {
        "relative": "../../outside.bin",
        "absolute": str(outside),
        "link": shard.name,
        "link-to-folder": "inner/outside.bin",
    }[kind]
    if kind == "link":
        shard.symlink_to(outside)
    if kind == "link-to-folder":
        (corpus / "inner").symlink_to(tmp_path)
    change_corpus_index(corpus, lambda index: index["splits"]["train"][0].update(file=name))
    corpus.check_refused(corpus / "index.json", name[:40])  # the message shortens it


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "link"])
def test_an_index_of_weights_reads_no_file_outside_of_its_folder(shards, tmp_path, name):
    file = shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = next(iter(index["weight_map"].values()))
    (tmp_path / "secret").write_bytes((shards / shard).read_bytes())
    (shards / "link").symlink_to(tmp_path / "secret")
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    file.write_text(json.dumps(index))
    shards.check_refused(file.name, name)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".."])
def test_an_index_of_tensors_lists_no_file_outside_of_its_folder(checkpoint, name):
    def point_outside(index):
        for piece in index.storage_data.values():
            piece.relative_path = name

    rewrite_index(checkpoint.folder, point_outside)
    checkpoint.check_refused(checkpoint.folder, repr(name))


@pytest.mark.parametrize("name", ["..", "../corpora", "/etc"])
def test_an_export_reads_no_tokenizer_outside_of_the_corpora(checkpoint, tmp_path, name):
    rewrite_metadata(
        checkpoint.folder, lambda metadata: metadata["identity"]["corpus"].update(name=name)
    )
    words = (checkpoint.folder, "--folder", tmp_path / "out")
    run("export", *words).check_refused("corpus.name", name)
    assert not (tmp_path / "out").exists()


def test_a_stopped_preparation_with_links_writes_nothing_outside(corpus, tmp_path):
    partial = corpus.folder.with_name(corpus.folder.name + ".partial")
    corpus.folder.rename(partial)
    names = ("train-00000.bin", "validation-00000.bin")
    names += ("tokenizer.json.new", "index.json.new", "progress.json.new")
    for name in names:
        (partial / name).unlink(missing_ok=True)
        (tmp_path / f"victim-{name}").write_text("untouched")
        (partial / name).symlink_to(tmp_path / f"victim-{name}")
    (partial / "progress.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "segments": 0, "splits": {}})
    )
    assert corpus.use().status == 0
    for name in names:
        assert (tmp_path / f"victim-{name}").read_text() == "untouched"
        assert not (corpus / name).is_symlink()


# Sizes.


@pytest.mark.parametrize("length", [0, 2**20, 10**8, 2**40, 2**63, 2**64 - 1])
def test_an_absurd_length_of_a_safetensors_header(weights, length, bounded_memory):
    file = weights / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    weights.check_refused(file)


@pytest.mark.parametrize("shape", [[2**40], [2**62, 2**62], [0, 2**63], [10**6, 10**6]])
def test_an_absurd_shape_in_a_safetensors_header(weights, shape, bounded_memory):
    file = weights / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    weights.check_refused(file)


@pytest.mark.parametrize("shape", [[2**40], [2**62, 2**62], [0, 2**62, 2**62], [10**6, 10**6]])
def test_an_absurd_shape_in_the_index_of_a_checkpoint(checkpoint, shape, bounded_memory):
    def change(index):
        index.state_dict_metadata["model.model.norm.weight"].size = torch.Size(shape)

    rewrite_index(checkpoint.folder, change)
    checkpoint.check_refused(checkpoint.folder)


@pytest.mark.parametrize("tokens", [2**40, 2**47, 2**62, 2**64, -1])
def test_an_absurd_number_of_tokens_in_the_index_of_a_corpus(corpus, tokens, bounded_memory):
    (corpus / "index.json.sha256").unlink()
    data = json.loads((corpus / "index.json").read_text())
    data["splits"]["train"][0]["tokens"] = tokens
    fingerprinted = {
        "format_version": 1,
        "tokenizer": data["tokenizer"]["sha256"],
        "dtype": data["dtype"],
        "splits": {
            split: [[shard["tokens"], shard["sha256"]] for shard in shards]
            for split, shards in data["splits"].items()
        },
    }
    text = json.dumps(fingerprinted, sort_keys=True).encode()
    data["fingerprint"] = hashlib.sha256(text).hexdigest()[:32]
    (corpus / "index.json").write_text(json.dumps(data))
    corpus.check_refused(corpus.folder)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("checkpoint", "metadata.json"),
        ("weights", "config.json"),
        ("corpus", "index.json"),
    ],
)
def test_deeply_nested_json_is_refused(kind, name, request):
    given = request.getfixturevalue(kind)
    (given / name).write_text('{"a":' * 100_000)
    given.check_refused(name)


# Mistakes.


LINES = [json.dumps({"text": text}).encode() for text in make_documents(20)]


def lines_with(line):
    return b"\n".join([*LINES[:7], line, *LINES[8:]])


BAD_DOCUMENTS = {
    "text": ("a.txt", b"good\nbad \xff\n", "a.txt: "),
    "jsonl": ("a.jsonl", lines_with(b"{"), "line 8"),
    "jsonl, no text": ("a.jsonl", lines_with(b'{"other": "a"}'), "line 8"),
    "jsonl, null": ("a.jsonl", lines_with(b'{"text": null}'), "line 8"),
    "jsonl, bytes": ("a.jsonl", lines_with(b"\xff"), "line 8"),
    "jsonl, gz": ("a.json.gz", b"no archive", "a.json.gz"),
    "parquet": ("a.parquet", b"PAR1 no table", "a.parquet"),
}


@pytest.mark.parametrize("kind", BAD_DOCUMENTS)
def test_a_bad_document_is_named_and_leaves_no_corpus(kind, tmp_path):
    name, data, named = BAD_DOCUMENTS[kind]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    dataset = kind.partition(",")[0]
    words = ("--path", tmp_path / "in", "--cache_dir", tmp_path / "out", "--vocab_size", 270)
    Given(tmp_path / "in", "prepare", "--dataset", dataset, *words).check_refused(named)
    # What a stopped preparation leaves, but no corpus.
    assert all(path.suffix in (".lock", ".partial") for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", ["export", "train"])
def test_every_command_refuses_a_damaged_checkpoint(command, checkpoint, home, tmp_path):
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    words = {
        "export": (checkpoint.folder, "--folder", tmp_path / "exported"),
        "train": ("--config", home / "run.toml", "--checkpoint.resume", checkpoint.folder),
    }[command]
    if command == "train":
        words = (*words, "--job.output_dir", tmp_path / "run")
    Given(tmp_path, command, *words).check_refused(checkpoint.folder)
    assert not (tmp_path / "exported").exists()
