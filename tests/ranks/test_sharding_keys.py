"""How weights are gathered and held, and gradients accumulated, changes no loss beyond rounding and
no checkpoint."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import num_pieces
from support.compiled import SWITCHLORA_COMPILED, compiled_functions
from support.layouts import Recorded, asked_for
from support.tiny import COMPILED, full_tensors, tiny_trainer, train_steps
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from switchtitan.distributed.norms import total_norm
from switchtitan.methods.lowrank import low_rank_layers

pytestmark = pytest.mark.timeout(1800)

NUM_STEPS, SAVED_STEP = 4, 2
RELATIVE_LOSS_TOLERANCE = 1e-5
"""Sums over micro-batches and ranks have another order; Adam amplifies that for gradients near
zero."""
# Three blocks: the last unit of two blocks has one. Four micro-batches on each of two ranks.
BASE = (
    *("--model.num_layers", "3", "--training.local_batch_size", "1"),
    *("--evaluation.prompts", json.dumps(["def main(", "größe", ""])),
    *("--evaluation.prompt_tokens", "6"),
)
TWO_BY_TWO = ("--parallelism.replicate", "2")
UNITS = ("--parallelism.blocks_per_unit", "2")
REPLICATED = ("--parallelism.frozen_weights", "replicate")
KEPT = ("--parallelism.reshard_after_forward", "false")
SHARDED = ("--parallelism.accumulate_gradients", "sharded")
RECOMPUTED = ("--activation_checkpoint.mode", "full")
BF16 = ("--training.dtype", "bfloat16")
ROUNDED = ("--training.frozen_dtype", "bfloat16")
RESETS = ("--method.reset_interval", "2", "--method.restart_warmup_steps", "1")
# Session -> name -> (method, keys).
RUNS = {
    "two": {
        "default": ("switchlora", ()),
        "not evaluated": ("switchlora", ()),
        "units": ("switchlora", UNITS),
        "kept": ("switchlora", KEPT),
        "replicated": ("switchlora", REPLICATED),
        "sharded gradients": ("switchlora", SHARDED),
        "all": ("switchlora", (*UNITS, *KEPT, *SHARDED)),
        "all recomputed": ("switchlora", (*UNITS, *KEPT, *SHARDED, *RECOMPUTED)),
        "bf16": ("switchlora", BF16),
        "bf16 kept": ("switchlora", (*BF16, *KEPT)),
        "rounded": ("switchlora", ROUNDED),
        "rounded, replicated": ("switchlora", (*ROUNDED, *REPLICATED)),
        "resets": ("relora", (*RESETS, *ROUNDED)),
        "resets, replicated": ("relora", (*RESETS, *ROUNDED, *REPLICATED)),
        "resumed": ("switchlora", (*UNITS, *KEPT)),
        "resumed, replicated": ("switchlora", REPLICATED),
    },
    "four": {
        "default": ("switchlora", TWO_BY_TWO),
        "all": ("switchlora", (*TWO_BY_TWO, *UNITS, *KEPT, *SHARDED)),
        "replicated": ("switchlora", (*TWO_BY_TWO, *REPLICATED)),
        "resumed": ("switchlora", TWO_BY_TWO),
    },
}
# (session, name) -> the run it equals, and whether their arithmetic is the same.
EXPECTED = {
    ("two", "not evaluated"): ("default", True),
    ("two", "units"): ("default", True),
    ("two", "kept"): ("default", True),
    ("two", "replicated"): ("default", False),
    ("two", "sharded gradients"): ("default", False),
    ("two", "all"): ("default", False),
    ("two", "all recomputed"): ("default", False),
    ("two", "bf16 kept"): ("bf16", True),
    ("two", "rounded, replicated"): ("rounded", False),
    ("two", "resets, replicated"): ("resets", False),
    ("four", "all"): ("default", False),
    ("four", "replicated"): ("default", False),
}
SAVED = ("default", "replicated")
# Session and name -> what it resumes, and whether its arithmetic is the same.
RESUMED = {
    ("two", "resumed"): ("default", True),
    ("two", "resumed, replicated"): ("default", False),
    ("four", "resumed"): ("replicated", False),
}
NUM_RANKS = {"two": 2, "four": 4}


def run_row(rank, name, folder, session):
    if name == "compiled":
        return check_that_nothing_recompiles(folder / name)
    home = folder / f"{session} {name}"
    if (session, name) in RESUMED:
        saved, _ = RESUMED[session, name]
        if rank == 0:
            shutil.copytree(folder / f"two {saved}", home)
        dist.barrier()
    return train(home, session, name)


def train(home, session, name):
    method, keys = RUNS[session][name]
    trainer = tiny_trainer(home, method, *BASE, *keys, num_ranks=NUM_RANKS[session])
    stepper, prompts = trainer.stepper, trainer.evaluators.prompts
    texts = [tuple(found) for found in prompts(stepper.model)]
    first_step = stepper.state.step
    losses = train_steps(trainer, SAVED_STEP - first_step)
    if session == "two" and name in SAVED:
        trainer.checkpointer.save(SAVED_STEP, trainer.tensors(), vars(stepper.state))
        trainer.checkpointer.finish()
    if name != "not evaluated":
        prompts(stepper.model)
        held_out = [trainer.evaluators.validation(stepper.model) for _ in range(2)]
        assert held_out[0] == held_out[1]
    losses += train_steps(trainer, NUM_STEPS - SAVED_STEP)
    check_how_weights_lie(stepper.model, is_replicated=REPLICATED[1] in keys)
    trainer.check_ranks()
    held_out, final = trainer.evaluators.validation(stepper.model), full_tensors(trainer)
    check_the_norm(stepper)
    stepper.close()
    return {
        "texts": texts,
        "losses": losses,
        "held_out": held_out,
        "final": final,
    }


def check_how_weights_lie(model, is_replicated):
    """Shards between steps, unless they are replicated."""
    for layer in low_rank_layers(model).values():
        assert isinstance(layer.weight, DTensor) != is_replicated
        assert isinstance(layer.lora_a, DTensor)


def check_the_norm(stepper):
    """Equal to torch's, which is slower for DTensors; clipping included."""
    stepper.max_grad_norm = 1e-3
    norm = stepper.compute_gradients().grad_norm
    gradients = [p.grad for p in stepper.model.parameters() if p.grad is not None]
    assert norm > 1e-2
    clipped = total_norm(gradients)
    assert torch.equal(clipped, get_total_norm(gradients).full_tensor())
    # The factor's rounding, and 1e-6 in its divisor.
    torch.testing.assert_close(clipped.item(), 1e-3, rtol=2e-4, atol=0)


def check_that_nothing_recompiles(home):
    torch._dynamo.reset()
    keys = (*BASE, *UNITS, *KEPT, *COMPILED)
    trainer = tiny_trainer(home, "switchlora", *keys, num_ranks=2)
    losses = train_steps(trainer, 2)
    assert compiled_functions() == SWITCHLORA_COMPILED
    assert counters["stats"]["unique_graphs"] == sum(SWITCHLORA_COMPILED.values())
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += train_steps(trainer, 4)
    trainer.stepper.close()
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def recorded(corpora, request):
    """`recorded(session, name)`; trains what the selected tests compare."""
    rows = {"two": [*RUNS["two"], "compiled"], "four": [*RUNS["four"]]}
    needed = {other for other, _ in (*EXPECTED.values(), *RESUMED.values())}
    needed.update(asked_for(request, (*rows["two"], *rows["four"])))
    sessions = {
        session: (num_ranks, [name for name in rows[session] if name in needed])
        for session, num_ranks in NUM_RANKS.items()
    }
    return Recorded(corpora / "sharding-keys", run_row, sessions)


@pytest.mark.parametrize(("session", "name"), EXPECTED)
def test_losses_texts_and_checkpoints_are_those_of_the_defaults(recorded, session, name):
    other, is_bitwise = EXPECTED[session, name]
    expected, run = recorded(session, other), recorded(session, name)
    assert run["losses"] == pytest.approx(expected["losses"], rel=RELATIVE_LOSS_TOLERANCE)
    assert run["held_out"] == pytest.approx(expected["held_out"], rel=RELATIVE_LOSS_TOLERANCE)
    assert run["texts"] == expected["texts"]
    assert run["losses"][-1] < run["losses"][0]
    assert run["final"].keys() == expected["final"].keys()
    for key, tensor in expected["final"].items():
        assert run["final"][key].shape == tensor.shape, key
        assert run["final"][key].dtype == tensor.dtype, key
        if is_bitwise:
            assert torch.equal(run["final"][key], tensor), key


def test_the_compute_dtype_matters(recorded):
    assert recorded("two", "bf16")["losses"] != recorded("two", "default")["losses"]


@pytest.mark.parametrize(("session", "name"), RESUMED)
def test_a_run_resumes_with_other_keys(recorded, session, name):
    saved, is_bitwise = RESUMED[session, name]
    resumed, straight = recorded(session, name), recorded("two", saved)
    expected = straight["losses"][SAVED_STEP:]
    assert resumed["losses"] == pytest.approx(expected, rel=RELATIVE_LOSS_TOLERANCE)
    if is_bitwise:
        assert resumed["losses"] == expected
        for key, tensor in straight["final"].items():
            assert torch.equal(resumed["final"][key], tensor), key


def test_replicated_weights_are_written_once(recorded, corpora):
    for name, expected in (("replicated", 1), ("default", 2)):
        recorded("two", name)
        run = corpora / "sharding-keys" / f"two {name}" / "run"
        (checkpoint,) = (run / "checkpoints").glob("step-*")
        found = num_pieces(checkpoint)
        of_weights = [num for key, num in found.items() if key.endswith("q_proj.weight")]
        assert of_weights == [expected] * 3
        assert found["model.lm_head.weight"] == 2


@pytest.mark.parametrize("name", ["compiled"])
def test_compiled_blocks_meet_the_same_tensors_in_every_step(recorded, name):
    recorded("two", name)
