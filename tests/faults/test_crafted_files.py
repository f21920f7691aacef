"""Files made to run code, to leave their folder or to exhaust memory are refused by one message.

Each is used as a user would: by a command, which ends with status 2.
"""

import hashlib
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from support.checkpoints import rewrite_metadata, update_file_records
from support.commands import Outcome, run
from support.held_weights import HeldWeights
from support.tiny import tiny_config, tiny_trainer
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.data import DataConfig, prepare_corpus
from switchtitan.data.corpus_files import CorpusIndex, fingerprint_of
from switchtitan.hub.export_folder import export_dense
from switchtitan.hub.huggingface import parameter_shapes


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self._trace,))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def payload(trace: Path) -> bytes:
    """A pickle with an effect, which is checked and taken back."""
    data = pickle.dumps(Payload(trace), protocol=2)
    pickle.loads(data)
    assert trace.exists()
    trace.unlink()
    return data


@pytest.fixture(scope="module")
def run_folder(corpora: Path) -> Path:
    """The folder of a run with one checkpoint."""
    trainer = tiny_trainer(corpora / "crafted", "full_rank")
    trainer.checkpointer.save(0, trainer.tensors(), asdict(trainer.stepper.state))
    trainer.stepper.close()
    checkpoint = trainer.checkpointer.latest
    assert checkpoint is not None
    config = tiny_config(corpora / "crafted", "full_rank")
    (corpora / "crafted" / "run.toml").write_text(
        next((corpora / "crafted").glob("full_rank-*.toml")).read_text()
    )
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(config.model).items()
    }
    export_dense(HeldWeights(weights), config.model, corpora / "crafted" / "hf", torch.float32)
    export_dense(
        HeldWeights(weights), config.model, corpora / "crafted" / "hf-sharded", torch.float32,
        max_shard_bytes=20_000,
    )  # fmt: skip
    return checkpoint.parent.parent


@pytest.fixture
def checkpoint(run_folder: Path, tmp_path: Path) -> Path:
    source = run_folder / "checkpoints" / "step-000000000"
    return Path(shutil.copytree(source, tmp_path / "given" / source.name))


@pytest.fixture
def config_file(run_folder: Path) -> str:
    return str(run_folder.parent / "run.toml")


def weights_folder(run_folder: Path, tmp_path: Path, name: str = "hf") -> Path:
    return Path(shutil.copytree(run_folder.parent / name, tmp_path / "weights"))


def evaluate(weights: Path, config_file: str) -> Outcome:
    return run("evaluate", weights, "--config", config_file)


def evaluate_checkpoint(checkpoint: Path) -> Outcome:
    return run("evaluate", checkpoint)


def test_the_files_are_valid_before_they_are_changed(
    run_folder: Path, checkpoint: Path, config_file: str, tmp_path: Path
) -> None:
    assert evaluate_checkpoint(checkpoint).status == 0
    for name in ("hf", "hf-sharded"):
        assert evaluate(run_folder.parent / name, config_file).status == 0


# A pickle with an effect, in every kind of file that could carry one.


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "tensors.json", "metadata.json"])
def test_a_pickle_in_a_checkpoint_does_not_run(
    checkpoint: Path, payload: bytes, trace: Path, name: str
) -> None:
    file = checkpoint / name
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as contents:
        contents.writestr("archive/data.pkl", payload)
        contents.writestr("archive/version", "3\n")
    data = archive.getvalue() if name == "__0_0.distcp" else payload
    if name == "__0_0.distcp":
        data = data.ljust(file.stat().st_size, b"\0")
        index = json.loads((checkpoint / "tensors.json").read_text())
        for tensor in index["tensors"].values():
            for piece in tensor["pieces"]:
                piece |= {"start": 0, "num_bytes": len(archive.getvalue())}
            tensor["shape"] = [1]
            tensor["pieces"] = [tensor["pieces"][0] | {"offsets": [0], "sizes": [1]}]
        (checkpoint / "tensors.json").write_text(json.dumps(index))
    file.write_bytes(data)
    if name != "metadata.json":
        update_file_records(checkpoint)
    outcome = evaluate_checkpoint(checkpoint)
    assert not trace.exists()
    if name == ".metadata":
        assert outcome.status == 0  # only torch's own tools read it
    else:
        outcome.check_refused(str(checkpoint))


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle", "in-a-list"])
def test_a_pickle_in_weights_of_the_original_does_not_run(
    payload: bytes, trace: Path, tmp_path: Path, config_file: str, kind: str
) -> None:
    folder = tmp_path / "model_500"
    folder.mkdir()
    file = folder / "pytorch_model.bin"
    if kind == "pickle":
        file.write_bytes(payload)
    else:
        value: object = Payload(trace)
        state = {"model.norm.weight": [value] if kind == "in-a-list" else value}
        torch.save(state, file, _use_new_zipfile_serialization=kind != "legacy")
    evaluate(folder, config_file).check_refused(str(file))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pickle_in_a_hugging_face_folder_does_not_run(
    run_folder: Path, payload: bytes, trace: Path, tmp_path: Path, config_file: str, name: str
) -> None:
    folder = weights_folder(run_folder, tmp_path)
    (folder / name).write_bytes(payload)
    evaluate(folder, config_file).check_refused(str(folder / name))
    assert not trace.exists()


def test_code_in_a_hugging_face_folder_is_not_imported(
    run_folder: Path, tmp_path: Path, config_file: str, trace: Path
) -> None:
    """What transformers calls remote code."""
    folder = weights_folder(run_folder, tmp_path)
    (folder / "modeling.py").write_text(f"open({str(trace)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    assert evaluate(folder, config_file).status == 0
    assert not trace.exists()


def test_a_pickle_in_a_parquet_file_does_not_run(
    payload: bytes, trace: Path, tmp_path: Path
) -> None:
    """Old versions of pyarrow unpickled the type of an extension column (CVE-2023-47248)."""
    folder = tmp_path / "texts"
    folder.mkdir()
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": payload,
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=metadata)
    table = pyarrow.table([make_documents(9)], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    outcome = run(
        "prepare", "--dataset", "parquet", "--path", folder, "--cache_dir", tmp_path / "corpora",
        "--vocab_size", "270",
    )  # fmt: skip
    assert outcome.status == 0
    assert not trace.exists()


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, tuple[object, ...]]:
    """The folder of a corpus, and the arguments of `prepare` that opens it."""
    write_json_lines(tmp_path / "texts" / "a.jsonl", make_documents(30))
    config = DataConfig(
        dataset="jsonl",
        path=tmp_path / "texts",
        vocab_size=270,
        cache_dir=tmp_path / "corpora",
    )
    folder = prepare_corpus(config, show_progress=False)
    keys = ("--dataset", "jsonl", "--path", config.path, "--cache_dir", config.cache_dir)
    return folder, ("prepare", *keys, "--vocab_size", "270")


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "train-00000.bin"])
def test_a_pickle_in_a_corpus_does_not_run(
    prepared: tuple[Path, tuple], payload: bytes, trace: Path, name: str
) -> None:
    folder, command = prepared
    (folder / name).write_bytes(payload)
    run(*command).check_refused(str(folder / name))
    assert not trace.exists()


def test_pickled_arrays_are_no_corpus(prepared: tuple[Path, tuple], trace: Path) -> None:
    folder, command = prepared
    with (folder / "train-00000.bin").open("wb") as file:
        np.save(file, np.array([Payload(trace)], dtype=object), allow_pickle=True)
    run(*command).check_refused("train-00000.bin")
    assert not trace.exists()


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.mkdir [x]", "__import__('os').mkdir('x')", "{x!r}"]
)
def test_nothing_in_a_configuration_is_evaluated(
    tmp_path: Path, config_file: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.toml"
    lines = Path(config_file).read_text().replace("steps = 40", f'steps = "{text}"')
    file.write_text(lines)
    run("train", "--config", file).check_refused("[training] steps")
    assert list(tmp_path.iterdir()) == [file]


# Paths that leave the folder.


def index_with(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes the index of a corpus and its fingerprint, and deletes its checksum."""
    (folder / "index.json.sha256").unlink()
    data = json.loads((folder / "index.json").read_text())
    change(data)
    index = CorpusIndex.model_validate(data)
    own = fingerprint_of(index.tokenizer.sha256, index.dtype, index.splits)
    (folder / "index.json").write_text(
        index.model_copy(update={"fingerprint": own}).model_dump_json()
    )


@pytest.mark.parametrize("kind", ["relative", "absolute", "link", "link-to-folder"])
def test_a_corpus_reads_no_file_outside_of_its_folder(
    prepared: tuple[Path, tuple], tmp_path: Path, kind: str
) -> None:
    folder, command = prepared
    shard = folder / "train-00000.bin"
    outside = tmp_path / "outside.bin"
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
        (folder / "inner").symlink_to(tmp_path)
    index_with(folder, lambda index: index["splits"]["train"][0].update(file=name))
    run(*command).check_refused(str(folder / "index.json"), "names a file")


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json"])
def test_the_files_of_a_corpus_are_no_links_out_of_it(
    prepared: tuple[Path, tuple], tmp_path: Path, name: str
) -> None:
    folder, command = prepared
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    run(*command).check_refused(str(folder / "index.json"), "outside of the folder")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "link"])
def test_an_index_of_weights_reads_no_file_outside_of_its_folder(
    run_folder: Path, tmp_path: Path, config_file: str, name: str
) -> None:
    folder = weights_folder(run_folder, tmp_path, "hf-sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    (tmp_path / "secret").write_bytes((folder / shard).read_bytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    outcome = evaluate(folder, config_file)
    outcome.check_refused("model.safetensors.index.json", name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_are_no_link_out_of_their_folder(
    run_folder: Path, tmp_path: Path, config_file: str, name: str
) -> None:
    folder = weights_folder(run_folder, tmp_path)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    evaluate(folder, config_file).check_refused(name, "outside of the folder")


def test_a_snapshot_of_the_hugging_face_cache_can_be_used(
    run_folder: Path, tmp_path: Path, config_file: str
) -> None:
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in (run_folder.parent / "hf-sharded").iterdir():
        shutil.copyfile(file, repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert evaluate(snapshot, config_file).status == 0


@pytest.mark.parametrize(
    "name", ["metadata.json", "metadata.json.sha256", "tensors.json", "__0_0.distcp"]
)
def test_a_checkpoint_has_no_link_out_of_its_folder(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    (checkpoint / name).rename(tmp_path / name)
    (checkpoint / name).symlink_to(tmp_path / name)
    evaluate_checkpoint(checkpoint).check_refused(name, "outside of the folder")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".."])
def test_a_manifest_lists_no_file_outside_of_its_folder(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "given" / "secret").write_bytes((checkpoint / "tensors.json").read_bytes())

    def add(metadata: dict) -> None:
        metadata["files"][name] = metadata["files"]["tensors.json"]

    rewrite_metadata(checkpoint, add)
    evaluate_checkpoint(checkpoint).check_refused(name, "not a plain file name")


@pytest.mark.parametrize("name", ["..", "../corpora", "/etc"])
def test_an_export_reads_no_tokenizer_outside_of_the_corpora(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    rewrite_metadata(checkpoint, lambda metadata: metadata["identity"]["corpus"].update(name=name))
    outcome = run("export", "--checkpoint", checkpoint, "--folder", tmp_path / "out")
    outcome.check_refused("corpus.name", name)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_no_link_out_of_its_folder(
    prepared: tuple[Path, tuple], tmp_path: Path
) -> None:
    folder, command = prepared
    given = tmp_path / "tokenizer"
    given.mkdir()
    (given / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    outcome = run(*command[:-2], "--tokenizer", given)
    outcome.check_refused("[data] tokenizer", "outside of the folder")


def test_a_stopped_preparation_with_links_writes_nothing_outside(
    prepared: tuple[Path, tuple], tmp_path: Path
) -> None:
    folder, command = prepared
    partial = folder.with_name(folder.name + ".partial")
    folder.rename(partial)
    names = ("train-00000.bin", "validation-00000.bin", "tokenizer.json.new", "index.json.new",
             "progress.json.new")  # fmt: skip
    for name in names:
        (partial / name).unlink(missing_ok=True)
        (tmp_path / f"victim-{name}").write_text("untouched")
        (partial / name).symlink_to(tmp_path / f"victim-{name}")
    (partial / "progress.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "segments": 0, "splits": {}})
    )
    assert run(*command).status == 0
    for name in names:
        assert (tmp_path / f"victim-{name}").read_text() == "untouched"
        assert not (folder / name).is_symlink()


# Sizes in headers.


def header_of(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize("length", [0, 2**20, 10**8, 2**40, 2**63, 2**64 - 1])
def test_an_absurd_length_of_a_safetensors_header(
    run_folder: Path, tmp_path: Path, config_file: str, length: int, bounded_memory: None
) -> None:
    folder = weights_folder(run_folder, tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    evaluate(folder, config_file).check_refused(str(file))


@pytest.mark.parametrize("shape", [[2**40], [2**62, 2**62], [0, 2**63], [10**6, 10**6]])
def test_an_absurd_shape_in_a_safetensors_header(
    run_folder: Path, tmp_path: Path, config_file: str, shape: list[int], bounded_memory: None
) -> None:
    folder = weights_folder(run_folder, tmp_path)
    file = folder / "model.safetensors"
    header, data = header_of(file)
    header["model.norm.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    evaluate(folder, config_file).check_refused(str(file))


@pytest.mark.parametrize("shape", [[2**40], [2**62, 2**62], [0, 2**62, 2**62], [10**6, 10**6]])
def test_an_absurd_shape_in_the_index_of_a_checkpoint(
    checkpoint: Path, shape: list[int], bounded_memory: None
) -> None:
    index = json.loads((checkpoint / "tensors.json").read_text())
    tensor = index["tensors"]["model.model.norm.weight"]
    tensor["shape"] = shape
    tensor["pieces"] = [tensor["pieces"][0] | {"offsets": [0] * len(shape), "sizes": shape}]
    (checkpoint / "tensors.json").write_text(json.dumps(index))
    update_file_records(checkpoint)
    evaluate_checkpoint(checkpoint).check_refused(str(checkpoint), "model.norm.weight")


def test_a_compressed_tensor_in_a_checkpoint_takes_no_memory(
    checkpoint: Path, bounded_memory: None
) -> None:
    """It would take a thousand times the memory of its file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(64):
                entry.write(bytes(1 << 20))
    data = packed.getvalue()
    index = json.loads((checkpoint / "tensors.json").read_text())
    tensor = index["tensors"]["model.model.norm.weight"]
    file = checkpoint / "__0_0.distcp"
    tensor["pieces"][0] |= {"start": file.stat().st_size, "num_bytes": len(data)}
    (checkpoint / "tensors.json").write_text(json.dumps(index))
    file.write_bytes(file.read_bytes() + data)
    update_file_records(checkpoint)
    evaluate_checkpoint(checkpoint).check_refused("the archive is compressed")


@pytest.mark.parametrize("tokens", [2**40, 2**47, 2**62, 2**64, -1])
def test_an_absurd_number_of_tokens_in_the_index_of_a_corpus(
    prepared: tuple[Path, tuple], tokens: int, bounded_memory: None
) -> None:
    folder, command = prepared
    (folder / "index.json.sha256").unlink()
    data = json.loads((folder / "index.json").read_text())
    data["splits"]["train"][0]["tokens"] = tokens
    contents = {
        "format_version": 1,
        "tokenizer": data["tokenizer"]["sha256"],
        "dtype": data["dtype"],
        "splits": {
            split: [[shard["tokens"], shard["sha256"]] for shard in shards]
            for split, shards in data["splits"].items()
        },
    }
    text = json.dumps(contents, sort_keys=True).encode()
    data["fingerprint"] = hashlib.sha256(text).hexdigest()[:32]
    (folder / "index.json").write_text(json.dumps(data))
    run(*command).check_refused(str(folder))


def test_a_view_of_one_number_as_a_huge_weight(
    tmp_path: Path, config_file: str, bounded_memory: None
) -> None:
    folder = tmp_path / "model_500"
    folder.mkdir()
    huge = torch.zeros(1).expand(1 << 20, 1 << 14)
    torch.save({"model.norm.weight": huge}, folder / "pytorch_model.bin")
    evaluate(folder, config_file).check_refused("larger than the file", "model.norm.weight")


@pytest.mark.parametrize("place", ["metadata.json", "tensors.json", "config.json", "index.json"])
def test_deeply_nested_json_is_refused(
    run_folder: Path,
    checkpoint: Path,
    prepared: tuple[Path, tuple],
    tmp_path: Path,
    config_file: str,
    place: str,
) -> None:
    nested = '{"a":' * 100_000
    if place == "index.json":
        folder, command = prepared
        (folder / place).write_text(nested)
        run(*command).check_refused(place)
    elif place == "config.json":
        folder = weights_folder(run_folder, tmp_path)
        (folder / place).write_text(nested)
        evaluate(folder, config_file).check_refused(place)
    else:
        (checkpoint / place).write_text(nested)
        evaluate_checkpoint(checkpoint).check_refused(str(checkpoint))
