"""Steps and calls are timed in alternation, and compared by robust ratios; switches are cheap."""

import gc
from functools import partial

import numpy as np
import pytest
import torch
from support.switchlora_layers import build_layer, build_optimizer, set_gradients
from support.tiny import METHOD_KEYS, TINY, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from switchtitan.benchmark import side_by_side
from switchtitan.benchmark.commands.time_checkpoint import SaveTimes
from switchtitan.benchmark.counters import CountOperations
from switchtitan.benchmark.side_by_side import WARM_UP_STEPS, time_steps_side_by_side
from switchtitan.benchmark.sides import Side, load_sides, read_side, split_overrides
from switchtitan.benchmark.step_times import StepTimes, ratio_of_steps
from switchtitan.benchmark.switch_costs import time_switches_side_by_side
from switchtitan.benchmark.timing import WARM_UP_CALLS, time_calls_in_turns
from switchtitan.distributed.world import stop_world
from switchtitan.errors import ConfigError, UserError
from switchtitan.methods.switchlora import SwitchLoraConfig
from switchtitan.optim import AdamWConfig
from switchtitan.training.step import Stepper

CPU = torch.device("cpu")

# Ratios


def times_of(step_s):
    return StepTimes(step_s, step_s * 0.7, step_s * 0.2, tokens_per_step=120)


def test_medians_and_speed_are_over_all_steps():
    times = times_of(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]]))
    assert times.median_s == 3.5
    assert times.quartiles_s == (2.25, 4.75)
    assert times.tokens_per_s == pytest.approx(120 / 3.5)


def test_a_slowdown_of_both_does_not_change_the_ratio():
    rng = np.random.default_rng(3)
    step_s = 1 + 0.01 * rng.random((9, 5))
    slowdown = np.where(np.arange(9) % 4 == 1, 7.0, 1.0)[:, None]
    reference, other = times_of(step_s * slowdown), times_of(1.5 * step_s[:, ::-1] * slowdown)
    ratio = ratio_of_steps(other, reference)
    # The same numbers in another order: equal but for rounding.
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([1.5] * 3, rel=1e-12)


def test_the_interval_covers_the_true_ratio_95_percent_of_the_time():
    rng = np.random.default_rng(8)
    num_trials, hits = 200, 0
    for _ in range(num_trials):
        reference, other = (
            times_of(mean * np.exp(0.1 * rng.normal(size=(15, 4)))) for mean in (1.0, 1.2)
        )
        ratio = ratio_of_steps(other, reference)
        assert ratio.low <= ratio.value <= ratio.high
        hits += ratio.low <= 1.2 <= ratio.high
    # Nominally 95 %; four binomial deviations, sqrt(0.95 * 0.05 / 200) = 1.5 %, below it.
    assert hits / num_trials >= 0.89


@pytest.mark.parametrize(
    ("after", "speed"),
    [
        ([1.0, 1.1, 0.9], 1.0),  # other load, which slows the control down too
        ([2.0, 1.9, 2.1], 0.5),
        (None, 0.5),  # without a process that never saves
    ],
)
def test_load_that_slows_down_a_process_without_saves_does_not_count(after, speed):
    steps = {"step_before_saves_s": [0.1] * 3, "undisturbed_step_s": [0.2] * 3}
    if after is not None:
        steps |= {"control_before_saves": [1.0, 1.1, 0.9], "control_after_saves": after}
    assert SaveTimes(**steps).speed_after_saves == pytest.approx(speed)


# Turns


def test_calls_alternate_from_round_to_round_and_must_not_compile():
    calls = []
    sides = {name: partial(calls.append, name) for name in "abc"}
    times = time_calls_in_turns(sides, CPU, rounds=3, calls_per_round=2)
    assert "".join(calls) == "abc" * WARM_UP_CALLS + "aabbcc" + "ccbbaa" + "aabbcc"
    assert all(seconds.shape == (3, 2) and (seconds > 0).all() for seconds in times.values())
    torch._dynamo.reset()
    scaled = torch.compile(lambda x, factor: x * factor, backend="eager", dynamic=False)
    factors = iter(range(99))
    with pytest.raises(torch._dynamo.exc.RecompileError):
        time_calls_in_turns({"a": lambda: scaled(torch.ones(3), next(factors))}, CPU, 2, 2)
    torch._dynamo.reset()


def test_steps_alternate_without_garbage_collection_and_leave_no_files(corpora, monkeypatch):
    folder = corpora / "timed"
    configs = {
        f"rank {rank}": tiny_config(folder, "lora", "--method.rank", f"{rank}") for rank in (3, 4)
    }
    turns, may_collect = [], []
    run, compute_gradients = side_by_side.Bench.run, Stepper.compute_gradients

    def noted_run(bench, num_steps):
        turns.append(bench.name)
        return run(bench, num_steps)

    def noted_gradients(stepper):
        may_collect.append(gc.isenabled())
        return compute_gradients(stepper)

    monkeypatch.setattr(side_by_side.Bench, "run", noted_run)
    monkeypatch.setattr(Stepper, "compute_gradients", noted_gradients)
    times = time_steps_side_by_side(configs, rounds=3, steps_per_round=2)
    names = list(configs)
    num_warm_up = WARM_UP_STEPS * len(names)
    assert turns[num_warm_up:] == [*names, *reversed(names), *names]
    assert may_collect == [True] * num_warm_up + [False] * 3 * 2 * 2
    assert gc.isenabled()
    for measured in times.values():
        assert measured.step_s.shape == (3, 2)
        assert measured.tokens_per_step == 8 * 16
        parts = measured.forward_backward_s + measured.optimizer_s
        # The rest is the end of the step, which frees gradients.
        assert (measured.step_s > parts).all()
    assert not (folder / "run").exists()
    assert not torch.distributed.is_initialized()


def test_a_timed_step_that_is_skipped_is_refused(corpora, monkeypatch):
    config = tiny_config(corpora / "skipping", "lora", "--training.on_nonfinite", "skip")
    run = side_by_side.Bench.run

    def spoiled_run(bench, num_steps):
        if num_steps > 1:
            with torch.no_grad():
                next(iter(bench.stepper.model.parameters())).fill_(torch.inf)
        return run(bench, num_steps)

    monkeypatch.setattr(side_by_side.Bench, "run", spoiled_run)
    with pytest.raises(UserError, match=r"tiny one: step 3 .*skipped"):
        time_steps_side_by_side({"tiny one": config}, rounds=2, steps_per_round=2)


@pytest.mark.parametrize("key", ["tf32", "deterministic"])
def test_sides_that_differ_in_a_key_of_the_process_are_refused(corpora, key):
    config = tiny_config(corpora / "differing", "lora")
    # Not by the command line: a CPU has no TF32.
    configs = {
        name: config.model_copy(
            update={"training": config.training.model_copy(update={key: value})}
        )
        for name, value in (("one", True), ("other", False))
    }
    with pytest.raises(ConfigError, match=rf"{key} = true in one, false in other"):
        time_steps_side_by_side(configs, rounds=1, steps_per_round=1)


# Sides of a comparison on the command line


@pytest.mark.parametrize(
    ("argument", "side"),
    [
        ("a.toml", Side("a.toml", {})),
        ("a.toml:method.rank=64", Side("a.toml", {"method.rank": ["64"]})),
        (
            "dir.x/a.toml:optimizer.betas=0.9,0.95,method.rank=64",
            Side("dir.x/a.toml", {"optimizer.betas": ["0.9,0.95"], "method.rank": ["64"]}),
        ),
        ("odd:name.toml:job.name=a=b", Side("odd:name.toml", {"job.name": ["a=b"]})),
    ],
)
def test_a_side_is_a_file_with_overrides(argument, side):
    assert read_side(argument) == side


def test_a_sides_own_keys_take_precedence_over_those_of_all(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(TINY.format(folder=tmp_path, method="lora", method_keys=METHOD_KEYS["lora"]))
    words = "a --rounds 3 --method.rank 3 --optimizer.betas 0.8 0.9 --data.seq_len=8 b --all 2"
    own, overrides = split_overrides(words.split())
    assert own == ["a", "--rounds", "3", "b", "--all", "2"]
    sides = load_sides([f"{file}", f"{file}:method.rank=5", f"{file}"], overrides)
    assert list(sides) == [f"{file}", f"{file}:method.rank=5", f"{file} (3)"]
    assert [config.method.rank for config in sides.values()] == [3, 5, 3]
    assert {config.optimizer.betas for config in sides.values()} == {(0.8, 0.9)}
    assert {config.data.seq_len for config in sides.values()} == {8}


# Costs of switches


def switching_optimizer(num_layers, num_per_step, **keys):
    layers = [build_layer(64, 48, 24, 1.0, torch.float32, seed) for seed in range(num_layers)]
    config = SwitchLoraConfig(
        rank=24, interval=24 / num_per_step, freeze_steps=1, decay="constant", **keys
    )
    optimizer = build_optimizer(config, AdamWConfig(lr=1e-3), layers, 100)
    set_gradients(layers, 0.0)
    return optimizer


def operations_of_switches(num_layers, num_per_step):
    """Operations of a step in which no ring wraps around."""
    optimizer = switching_optimizer(num_layers, num_per_step)
    with CountOperations() as counter:
        optimizer.switch()
    assert optimizer.metrics()["switch/vectors_switched"] == 2 * num_layers * num_per_step
    return counter.num_operations


def test_switching_more_vectors_needs_no_more_operations():
    one = operations_of_switches(num_layers=3, num_per_step=1)
    assert operations_of_switches(num_layers=3, num_per_step=8) == one
    # One fold into the weight for each further layer.
    assert operations_of_switches(num_layers=5, num_per_step=1) == one + 2
    with CountOperations() as counter:
        matrix = torch.empty(3, 4)
        matrix.zero_()
        matrix[1:].t().add_(1)
        torch._foreach_add_([matrix, matrix.clone()], 1)
    assert counter.num_operations == 4  # neither views nor allocations


class RecordListLayouts(TorchDispatchMode):
    """Records for each foreach operation whether tensors are contiguous, and each list's dtypes."""

    def __init__(self):
        super().__init__()
        self.layouts = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_foreach" in str(func):
            lists = [argument for argument in args if isinstance(argument, list)]
            are_contiguous = all(t.is_contiguous() for entries in lists for t in entries)
            self.layouts.append((are_contiguous, [{t.dtype for t in entries} for entries in lists]))
        return func(*args, **(kwargs or {}))


def test_lists_of_a_switch_are_contiguous_and_of_one_dtype_each():
    """CUDA launches one kernel per entry of other lists."""
    optimizer = switching_optimizer(num_layers=3, num_per_step=2)
    with RecordListLayouts() as recorded:
        optimizer.switch()
    assert recorded.layouts
    for are_contiguous, dtypes in recorded.layouts:
        assert are_contiguous
        assert all(len(of_list) == 1 for of_list in dtypes)


def test_switches_are_timed_within_their_steps(corpora):
    config = tiny_config(corpora / "switch-costs", "switchlora")
    costs = time_switches_side_by_side({"tiny": config}, rounds=2, steps_per_round=3)["tiny"]
    assert costs.step_s.shape == costs.switch_s.shape == costs.step_without_s.shape == (2, 3)
    assert (costs.switch_s > 0).all()
    assert (costs.switch_s < costs.step_s).all()
    assert costs.num_vectors > 0
    assert costs.num_collectives == 0  # a single rank gathers nothing
    stop_world()


# GPU acceptance


def test_every_command_of_an_acceptance_parses(tmp_path, monkeypatch):
    from switchtitan.benchmark.acceptance.machine import Machine
    from switchtitan.benchmark.acceptance.steps import STEPS, Place
    from switchtitan.cli.benchmark import read_options
    from switchtitan.distributed.dtype import gpu_support
    from switchtitan.job.config import parse_arguments

    card = Machine("NVIDIA H100 80GB HBM3", 1, 79.2, {})
    support = gpu_support(card.card, (9, 0))
    monkeypatch.setattr("switchtitan.job.config.device_type", lambda: "cuda")
    monkeypatch.setattr("switchtitan.job.checks.bf16_support", lambda device: support)
    num_parsed = 0
    for step in STEPS:
        if "flash" in step.name:
            continue
        for command in step.commands(Place(card, tmp_path, tmp_path)):
            if "benchmark" in command:
                own, _ = split_overrides(command[command.index("benchmark") + 1 :])
                read_options(own)
            elif "pytest" not in command and "train" in command:
                parse_arguments(command[command.index("train") + 1 :], 1)
            else:
                continue
            num_parsed += 1
    assert num_parsed > 5
