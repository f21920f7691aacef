"""A run is equal on 1, 2 and 4 ranks, however these hold weights, and resumes on any of them."""

import shutil
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.layouts import LAYOUTS, RELATIVE_LOSS_TOLERANCE, Recorded, asked_for
from support.nonfinite import SKIP, spoil_next_gradient, spoil_next_loss
from support.tensors import differing
from support.tiny import (
    METHOD_KEYS,
    full_tensors,
    ready_trainer,
    record_reports,
    tiny_config,
    tiny_trainer,
    train_steps,
    write_continued_config,
)
from torch.distributed.tensor import DTensor

from switchtitan.job.config import parse_arguments
from switchtitan.methods.adapter.linear import adapter_layers
from switchtitan.numerics.fixed_point import FIXED

pytestmark = pytest.mark.timeout(1800)

NUM_STEPS, SAVED_STEP = 8, 4


class Row(NamedTuple):
    method: str
    keys: tuple[str, ...] = ()
    model: str = ""
    """A model of transformers that the run continues."""
    like: str = ""
    """The row on as many ranks whose run it equals, though it holds or sends tensors otherwise."""
    is_bitwise: bool = False
    """Whether its arithmetic is that of `like`."""


# Two vectors of each factor switch in each step, and candidates of small layers are used again.
SWITCHING = ("--method.interval", "3", "--method.freeze_steps", "1")
CONSTANT = ("--method.candidates", "constant")
ON_HOST = ("--method.candidates_device", "host")
ROUNDED = ("--training.frozen_dtype", "int16")
IN_24_BITS = ("--training.trained_dtype", "bfloat16", "--optimizer.name", "adamw8bit")
STILL = ("--optimizer.lr", "1e-30")
PROJECTED = ("--method.update_interval", "3")
KEYS = {
    "apollo": PROJECTED,
    "apollo_mini": PROJECTED,
    "fira": PROJECTED,
    "galore": PROJECTED,
    # Resets after 3 and 6 steps, so the save is inside a warmup of the learning rate.
    "relora": ("--method.reset_interval", "3", "--method.restart_warmup_steps", "2"),
    "switchlora": SWITCHING,
}
OPTIMIZERS = {
    "adafactor": ("--optimizer.name", "adafactor", "--optimizer.lr", "0.1"),
    "adamw8bit": ("--optimizer.name", "adamw8bit"),
    "muon": ("--optimizer.name", "muon", "--optimizer.lr", "2e-2"),
    "scale": ("--optimizer.name", "scale"),
    "sgd": (
        *("--optimizer.name", "sgd", "--optimizer.lr", "0.3", "--optimizer.nesterov", "true"),
        # Below all norms.
        *("--training.max_grad_norm", "0.3"),
    ),
}
ROWS = {
    **{method: Row(method, KEYS.get(method, ())) for method in METHOD_KEYS},
    **{name: Row("full_rank", keys) for name, keys in OPTIMIZERS.items()},
    "cola": Row("full_rank", ("--model.name", "cola", "--model.rank", "5")),
    "tied head": Row("full_rank", ("--model.tied_head", "true")),
    "tied head and biases": Row("switchlora", SWITCHING, model="qwen2, tied"),
    "rounded": Row("switchlora", (*SWITCHING, *ROUNDED)),
    "constant candidates": Row("switchlora", (*SWITCHING, *CONSTANT)),
    "candidates on the host": Row("switchlora", (*SWITCHING, *ON_HOST)),
    "factors by muon": Row("switchlora", (*SWITCHING, "--optimizer.name", "muon")),
    "relora at random": Row("relora", (*KEYS["relora"], "--method.reset_moments", "random")),
}
# Of three blocks, a last unit of two has one; four micro-batches on each of two ranks.
HELD = ("--model.num_layers", "3", "--training.local_batch_size", "1")
UNITS = ("--parallelism.blocks_per_unit", "2")
REPLICATED = ("--parallelism.frozen_weights", "replicate")
KEPT = ("--parallelism.reshard_after_forward", "false")
SUMMED = ("--parallelism.accumulate_gradients", "sharded")
RECOMPUTED = ("--activation_checkpoint.mode", "full")
HELD_ROWS = {
    "held": Row("switchlora", HELD),
    "not evaluated": Row("switchlora", HELD, like="held", is_bitwise=True),
    "units": Row("switchlora", (*HELD, *UNITS), like="held", is_bitwise=True),
    "kept": Row("switchlora", (*HELD, *KEPT), like="held", is_bitwise=True),
    "replicated": Row("switchlora", (*HELD, *REPLICATED), like="held"),
    "sharded gradients": Row("switchlora", (*HELD, *SUMMED), like="held"),
    "all": Row("switchlora", (*HELD, *UNITS, *KEPT, *SUMMED, *RECOMPUTED), like="held"),
    "rounded, replicated": Row("switchlora", (*SWITCHING, *ROUNDED, *REPLICATED), like="rounded"),
    # Factors do not move, so that sums of gradients in another order do not matter.
    "switched alone": Row("switchlora", (*SWITCHING, *ROUNDED, *STILL)),
    "switched in 24 bits": Row("switchlora", (*SWITCHING, *ROUNDED, *STILL, *IN_24_BITS)),
}
ALONE = ["switched alone", "switched in 24 bits"]
HELD_IN = {
    "one": ALONE,
    "two": list(HELD_ROWS),
    "four": ALONE,
    "two_by_two": ["held", "all", "replicated", *ALONE],
}
RESUMED_AS = [("held", "replicated", "two")]
"""What two ranks have saved, the row that resumes it, and on which ranks."""
ACCUMULATED = ("full_rank", "switchlora")
"""Rows with two blocks, and with micro-batches of two sequences; the others have one of each."""
ROWS_OF = {
    "two": list(ROWS),
    "one": list(ROWS),
    # Uneven and empty shards; test_primitives_ranks.py has those of projections and optimizers.
    "four": [
        *(method for method in METHOD_KEYS if KEYS.get(method) != PROJECTED),
        *("cola", "tied head and biases", "relora at random"),
        *("constant candidates", "candidates on the host"),
    ],
    "two_by_two": [
        *("apollo", "full_rank", "relora", "sltrain", "switchlora"),
        *("sgd", "constant candidates", "factors by muon"),
    ],
}
OBSERVED = (
    *(*SWITCHING, "--training.steps", str(NUM_STEPS), "--evaluation.interval", "100"),
    *("--spectrum.interval", "5"),
)
OBSERVED_WITH = {"two": (), "one": (), "four": REPLICATED, "two_by_two": KEPT}


def train_row(rank, name, folder, layout):
    if name in ON_TWO_RANKS:
        check, *args = ON_TWO_RANKS[name]
        return check(rank, folder / name, *args)
    if name == "observed":
        return observe(rank, folder / layout / name, layout)
    results = {"straight": train(folder, folder / layout / name, name, layout, NUM_STEPS)}
    for saved in saves_to_resume(name, layout):
        copy = folder / layout / f"{name} resumed"
        if rank == 0:
            shutil.copytree(folder / "two" / saved, copy)
        dist.barrier()
        results["resumed"] = train(folder, copy, name, layout, NUM_STEPS - SAVED_STEP)
    return results


def saves_to_resume(name, layout):
    """The rows whose save on two ranks a row resumes: at most one."""
    if name in HELD_ROWS:
        return [saved for saved, *resumed in RESUMED_AS if resumed == [name, layout]]
    return [name] if layout in resumed_in(name) else []


def resumed_in(name):
    """The layouts that resume what two ranks have saved of a row."""
    if name == "switchlora":
        return tuple(LAYOUTS)
    return ("two", "one")


def build(folder, home, name, layout):
    row, (num_ranks, placement) = (ROWS | HELD_ROWS)[name], LAYOUTS[layout]
    keys = [*row.keys, *placement]
    if row.model:
        file = write_continued_config(home, folder / "model", row.method)
        config = parse_arguments(["--config", str(file), *keys], num_ranks)
    else:
        if name not in ACCUMULATED and "--model.num_layers" not in keys:
            keys += ["--model.num_layers", "1", "--training.local_batch_size", str(8 // num_ranks)]
        config = tiny_config(home, row.method, *keys, num_ranks=num_ranks)
    return ready_trainer(config)


def train(folder, home, name, layout, num_steps):
    """Trains, and saves halfway if other layouts resume that."""
    trainer = build(folder, home, name, layout)
    stepper, validation, initial = trainer.stepper, trainer.validation, full_tensors(trainer)
    first_step = stepper.state.step
    losses = train_steps(trainer, min(SAVED_STEP, num_steps))
    if layout == "two" and num_steps > SAVED_STEP:
        trainer.save()
        trainer.checkpointer.finish()
    if name != "not evaluated":
        assert validation(stepper.model) == validation(stepper.model)
    losses += train_steps(trainer, num_steps - len(losses))
    trainer.check_ranks()
    if name in HELD_ROWS:
        check_how_weights_lie(stepper.model, REPLICATED[1] in HELD_ROWS[name].keys)
    stepper.close()
    return {
        "first_step": first_step,
        "initial": initial,
        "losses": losses,
        "held_out": validation(stepper.model),
        "final": full_tensors(trainer),
        "metrics": stepper.optimizer.metrics(),
    }


def check_how_weights_lie(model, is_replicated):
    """Shards between steps, unless they are replicated."""
    for layer in adapter_layers(model).values():
        assert isinstance(layer.weight, DTensor) != is_replicated
        assert isinstance(layer.lora_a, DTensor)


def observe(rank, home, layout):
    """Trains with everything that is measured."""
    num_ranks, placement = LAYOUTS[layout]
    keys = (*OBSERVED, *placement, *OBSERVED_WITH[layout])
    trainer = tiny_trainer(home, "switchlora", *keys, num_ranks=num_ranks)
    reported = record_reports(trainer)
    trainer.train()
    return {
        step: {tag: value for tag, value in values.items() if tag.startswith("rank/")}
        for step, values in reported.items()
    }


@pytest.fixture(scope="module")
def recorded(corpora, request):
    """`recorded(layout, row)`; trains the rows of the selected tests."""
    from support.folders import save_random_model

    folder = corpora / "layouts"
    sessions = {}
    for layout, (num_ranks, _) in LAYOUTS.items():
        rows = [*ROWS_OF[layout], *HELD_IN.get(layout, ()), "observed"]
        rows += ON_TWO_RANKS if layout == "two" else []
        sessions[layout] = num_ranks, asked_for(request, rows)
    recorded = Recorded(folder, train_row, sessions)
    save_random_model("qwen2, tied", folder / "model")
    return recorded


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for layout in LAYOUTS if layout != "one" for name in ROWS_OF[layout]],
)
def test_a_run_is_that_of_one_rank(recorded, name, layout):
    one, several = recorded("one", name)["straight"], recorded(layout, name)["straight"]
    assert one["losses"][-1] < one["losses"][0]
    assert several["losses"] == pytest.approx(one["losses"], rel=RELATIVE_LOSS_TOLERANCE)
    assert differing(several["initial"], one["initial"]) == []
    assert differing(integers_of(several["final"]), integers_of(one["final"])) == []
    assert several["final"].keys() == one["final"].keys()
    assert several["held_out"] == pytest.approx(one["held_out"], rel=RELATIVE_LOSS_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name in ROWS for layout in resumed_in(name)]
)
def test_a_resumed_run_is_bitwise_the_same_on_as_many_ranks_and_equal_on_others(
    recorded, name, layout
):
    straight, resumed = recorded("two", name)["straight"], recorded(layout, name)["resumed"]
    expected = straight["losses"][SAVED_STEP:]
    assert resumed["first_step"] == SAVED_STEP
    assert resumed["losses"] == pytest.approx(expected, rel=RELATIVE_LOSS_TOLERANCE)
    assert resumed["metrics"].keys() == straight["metrics"].keys()
    assert differing(integers_of(resumed["final"]), integers_of(straight["final"])) == []
    if layout == "two":
        assert resumed["losses"] == expected
        assert resumed["metrics"] == straight["metrics"]
        assert differing(resumed["final"], straight["final"]) == []


@pytest.mark.parametrize(
    ("name", "like", "layout"),
    [
        (name, HELD_ROWS[name].like, layout)
        for layout, names in HELD_IN.items()
        for name in names
        if HELD_ROWS[name].like
    ],
)
def test_how_weights_are_held_changes_no_loss_and_no_checkpoint(recorded, name, like, layout):
    expected, found = (recorded(layout, row)["straight"] for row in (like, name))
    assert found["losses"] == pytest.approx(expected["losses"], rel=RELATIVE_LOSS_TOLERANCE)
    assert found["held_out"] == pytest.approx(expected["held_out"], rel=RELATIVE_LOSS_TOLERANCE)
    kinds, expected_kinds = (
        {key: (tensor.shape, tensor.dtype) for key, tensor in run["final"].items()}
        for run in (found, expected)
    )
    assert kinds == expected_kinds
    if HELD_ROWS[name].is_bitwise:
        assert differing(found["final"], expected["final"]) == []


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one"])
@pytest.mark.parametrize("name", ALONE)
def test_switches_change_weights_of_16_bits_bitwise_as_on_one_rank(recorded, name, layout):
    one, several = (recorded(ranks, name)["straight"] for ranks in ("one", layout))
    short = [key for key, tensor in one["final"].items() if tensor.itemsize < 4]
    assert short
    for key in short:
        changes = "proj.weight" in key or "lora" in key
        assert torch.equal(one["initial"][key], one["final"][key]) != changes
        assert torch.equal(several["final"][key], one["final"][key])


@pytest.mark.parametrize(("saved", "name", "layout"), RESUMED_AS)
def test_a_run_resumes_with_other_ways_to_hold_weights(recorded, saved, name, layout):
    straight, resumed = recorded("two", saved)["straight"], recorded(layout, name)["resumed"]
    expected = straight["losses"][SAVED_STEP:]
    assert resumed["losses"] == pytest.approx(expected, rel=RELATIVE_LOSS_TOLERANCE)


def integers_of(tensors):
    """Counts and plans: all integers but packed weights, and all of the switch's own state."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (tensor.is_floating_point() or tensor.dtype == FIXED)
        or name.startswith("optimizer.switch.")
    }


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one"])
@pytest.mark.parametrize("name", ["observed"])
def test_what_is_measured_does_not_depend_on_the_number_of_ranks(recorded, name, layout):
    one, several = recorded("one", name), recorded(layout, name)
    assert several.keys() == one.keys()
    assert any("rank/effective_mean" in values for values in one.values())
    for step, expected in one.items():
        found = several[step]
        assert found.keys() == expected.keys()
        for tag, value in expected.items():
            # Sums over ranks have another order; Adam amplifies that for gradients near zero.
            assert found[tag] == pytest.approx(value, rel=1e-3, abs=1e-6), (step, tag)


def take_four_steps(folder, method, *keys, spoil):
    """Returns all tensors at the end, and the losses of all updates on this rank. `spoil` is called
    with the stepper before the third batch; None: the data lacks that batch."""
    trainer = tiny_trainer(folder, method, *SKIP, *keys, num_ranks=2)
    stepper, losses = trainer.stepper, []
    reader = stepper.batches

    def batches():
        for number, batch in enumerate(reader):
            if number == 2 and spoil is not None:
                spoil(stepper)
            if number != 2 or spoil is not None:
                yield batch

    stepper.batches = batches()
    while stepper.state.step < 4:
        result = stepper.step()
        if not result.is_skipped:
            losses.append(result.loss.item())
    reader.close()
    assert stepper.state.num_skipped == (spoil is not None)
    return full_tensors(trainer) | {"losses": torch.tensor(losses)}


def check_that_a_bad_batch_is_left_out(rank, folder, spoil, method, *keys):
    without = take_four_steps(folder, method, *keys, spoil=None)
    spoil_here = spoil if rank == 1 else lambda stepper: None
    spoiled = take_four_steps(folder, method, *keys, spoil=spoil_here)
    assert differing(spoiled, without) == []


ON_TWO_RANKS = {
    "gradient": (check_that_a_bad_batch_is_left_out, spoil_next_gradient, "switchlora"),
    "loss": (
        *(check_that_a_bad_batch_is_left_out, spoil_next_loss, "galore"),
        *("--parallelism.replicate", "2"),
    ),
}


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_ranks_leave_out_a_bad_batch_of_one(recorded, name):
    recorded("two", name)
