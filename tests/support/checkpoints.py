"""Checkpoints with other contents, as another version, another run or an attacker would write;
writers that fail."""

import hashlib
import json
import pickle
import time
from contextlib import contextmanager

import pytest
from torch.distributed.checkpoint import FileSystemReader

from switchtitan.checkpoint import save
from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.checkpoint.load import SavedTensors, verify
from switchtitan.checkpoint.save import Checkpointer
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world
from switchtitan.errors import CheckpointError

WRITER = save._Writer
"""What writes tensors; its `write_data` and `finish` can be patched."""
SUMS = "SHA256SUMS"


@contextmanager
def refused(*parts, error=CheckpointError):
    """The block raises an error whose message has all `parts`; its information is yielded."""
    with pytest.raises(error) as raised:
        yield raised
    message = str(raised.value)
    assert all(part in message for part in parts), (parts, message)


def make_checkpointer(folder, latest=None, **config):
    """One for the ranks of this process group; collective. `config` as in `[checkpoint]`."""
    return Checkpointer(
        folder,
        CheckpointConfig(**config),
        start_world(ParallelismConfig()),
        {
            "identity": {"model": {"size": "9m", "betas": (0.9, 0.99)}},
            "run": {"corpus": "a stand-in"},
            "versions": {"torch": "2.0"},
        },
        latest,
    )


def tensor_checksums(checkpoint):
    """Names and checksums of the files with tensors: equal for equal tensors."""
    return [line for line in (checkpoint / SUMS).read_text().splitlines() if "distcp" in line]


def end_of(run, num_steps):
    """What a run has left after its last step, equal for equal runs: checksums of its tensors, its
    saved state, and of which run and step its final losses are."""
    checkpoint = run / "checkpoints" / f"step-{num_steps:09d}"
    results = json.loads((run / "results.json").read_text())
    kept = ("loss/", "step", "seed", "corpus")
    final = {key: results[key] for key in results if key.startswith(kept)}
    return tensor_checksums(checkpoint), verify(checkpoint).train_state, final


def update_checksums(checkpoint):
    """Updates `SHA256SUMS` after a change of other files."""
    files = sorted(file for file in checkpoint.iterdir() if file.name != SUMS)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (checkpoint / SUMS).write_text("".join(f"{sum}  {name}\n" for name, sum in digests.items()))


def rewrite_metadata(checkpoint, change):
    """Applies `change` to the contents of `metadata.json`, and updates checksums."""
    file = checkpoint / "metadata.json"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    update_checksums(checkpoint)


def rewrite_index(checkpoint, change):
    """Applies `change` to torch's index of the tensors, and updates checksums."""
    file = checkpoint / ".metadata"
    index = pickle.loads(file.read_bytes())
    change(index)
    file.write_bytes(pickle.dumps(index))
    update_checksums(checkpoint)


def read_all_tensors(checkpoint):
    tensors = SavedTensors(checkpoint)
    return tensors.read_full(tensors.on_meta)


def num_pieces(checkpoint):
    """The number of pieces of each tensor, as torch reads it."""
    tensors = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {name: len(tensor.chunks) for name, tensor in tensors.items()}


def is_writing(checkpointer):
    """Whether a background save of this rank is under way."""
    in_flight = checkpointer._in_flight
    return in_flight is not None and not in_flight.done()


def wait_until_written(checkpointer):
    while is_writing(checkpointer):
        time.sleep(0.005)


def write_when(allowed, monkeypatch):
    """Saves write only once allowed; each adds its tensors' addresses to the returned list."""
    write_data, places = WRITER.write_data, []

    def write(writer, plan, planner):
        places.append({name: tensor.data_ptr() for name, tensor in planner.state_dict.items()})
        assert allowed.wait(60)
        return write_data(writer, plan, planner)

    monkeypatch.setattr(WRITER, "write_data", write)
    return places
