"""Steps are timed in alternation, and compared by robust ratios."""

import gc
import time

import numpy as np
import pytest
import torch
from support.commands import result_of
from support.tiny import tiny_config, tiny_toml

from switchtitan.errors import ConfigError, UserError
from switchtitan.training.step import Stepper
from switchtitan.workbench.benchmark.coordinates import at_hidden_size, slopes
from switchtitan.workbench.benchmark.sides import load_sides
from switchtitan.workbench.benchmark.step_times import (
    WARM_UP_STEPS,
    ratio_of_steps,
    time_steps_side_by_side,
)


def test_a_slowdown_of_both_does_not_change_the_ratio():
    rng = np.random.default_rng(3)
    step_s = 1 + 0.01 * rng.random(9)
    slowdown = np.where(np.arange(9) % 4 == 1, 7.0, 1.0)
    ratio = ratio_of_steps(1.5 * step_s * slowdown, step_s * slowdown)
    # Equal but for rounding.
    assert list(ratio.values()) == pytest.approx([1.5] * 3, rel=1e-12)


def test_the_interval_covers_the_true_ratio_95_percent_of_the_time():
    rng = np.random.default_rng(8)
    num_trials, hits = 200, 0
    for _ in range(num_trials):
        reference, other = (mean * np.exp(0.1 * rng.normal(size=15)) for mean in (1.0, 1.2))
        ratio = ratio_of_steps(other, reference)
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
        hits += ratio["low"] <= 1.2 <= ratio["high"]
    # Nominally 95 %; four binomial deviations, sqrt(0.95 * 0.05 / 200) = 1.5 %, below it.
    assert hits / num_trials >= 0.89


def test_turns_alternate_without_what_is_collected_and_leave_no_files(corpora, monkeypatch):
    folder = corpora / "timed"
    configs = {
        f"rank {rank}": tiny_config(folder, "lora", "--method.rank", f"{rank}") for rank in (3, 4)
    }
    in_turn, num_frozen, seconds = [], [], []
    step = Stepper.step

    def noted_step(stepper):
        in_turn.append(stepper)
        num_frozen.append(gc.get_freeze_count())
        start_s = time.perf_counter()
        result = step(stepper)
        seconds.append(time.perf_counter() - start_s)
        return result

    monkeypatch.setattr(Stepper, "step", noted_step)
    times = time_steps_side_by_side(configs, rounds=3, steps_per_round=2)
    one, other = in_turn[:2]
    num_warm_up = WARM_UP_STEPS * len(configs)
    assert in_turn[:num_warm_up] == WARM_UP_STEPS * [one, other]
    turns = [one, other, other, one, one, other]
    assert in_turn[num_warm_up:] == [stepper for stepper in turns for _ in range(2)]
    assert set(num_frozen[:num_warm_up]) == {0} == {gc.get_freeze_count()}
    assert min(num_frozen[num_warm_up:]) > 100_000
    of_turns = np.reshape(seconds[num_warm_up:], (len(turns), 2)).mean(axis=1)
    for stepper, measured in zip((one, other), times.values(), strict=True):
        # What surrounds the steps takes time, too.
        assert (measured >= of_turns[[turn is stepper for turn in turns]]).all()
    assert not (folder / "run").exists()
    assert not torch.distributed.is_initialized()


def test_a_timed_step_that_is_skipped_is_refused(corpora, monkeypatch):
    config = tiny_config(corpora / "skipping", "lora", "--training.on_nonfinite", "skip")
    step = Stepper.step

    def spoiled_step(stepper):
        if stepper.state.step == WARM_UP_STEPS:
            with torch.no_grad():
                next(iter(stepper.model.parameters())).fill_(torch.inf)
        return step(stepper)

    monkeypatch.setattr(Stepper, "step", spoiled_step)
    with pytest.raises(UserError, match=r"tiny one: step 3 .*skipped"):
        time_steps_side_by_side({"tiny one": config}, rounds=2, steps_per_round=2)


@pytest.mark.parametrize("key", ["tf32", "deterministic"])
def test_sides_that_differ_in_a_key_of_the_process_are_refused(corpora, key):
    config = tiny_config(corpora / "differing", "lora")
    # Not by the command line: a CPU has no TF32.
    trainings = [config.training.model_copy(update={key: value}) for value in (True, False)]
    one, other = (config.model_copy(update={"training": training}) for training in trainings)
    configs = {"one": one, "other": other}
    with pytest.raises(ConfigError, match=rf"{key} = true in one, false in other"):
        time_steps_side_by_side(configs, rounds=1, steps_per_round=1)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("a.toml", ["a.toml"]),
        ("a.toml:method.rank=64", ["a.toml", "--method.rank=64"]),
        (
            "dir.x/a.toml:optimizer.betas=0.9,0.95,method.rank=64",
            ["dir.x/a.toml", "--optimizer.betas=0.9,0.95", "--method.rank=64"],
        ),
        ("odd:name.toml:job.name=a=b", ["odd:name.toml", "--job.name=a=b"]),
    ],
)
def test_a_side_is_a_file_with_overrides(argument, words):
    keys = ["--data.seq_len", "8"]
    assert load_sides([argument], keys, parse=list) == {argument: ["--config", *words, *keys]}


def test_keys_are_for_all_sides_and_given_once(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(tiny_toml(tmp_path, "lora"))
    keys = ["--optimizer.betas", "0.8", "0.9", "--data.seq_len=8"]
    sides = load_sides([f"{file}", f"{file}:method.rank=5", f"{file}"], keys)
    assert list(sides) == [f"{file}", f"{file}:method.rank=5", f"{file} (3)"]
    assert [config.method.rank for config in sides.values()] == [6, 5, 6]
    assert {config.optimizer.betas for config in sides.values()} == {(0.8, 0.9)}
    assert {config.data.seq_len for config in sides.values()} == {8}
    with pytest.raises(ConfigError, match=r"data\.seq_len=4: --data\.seq_len=8: given twice"):
        load_sides([f"{file}:data.seq_len=4"], keys)


def test_slopes_are_the_exponents_of_the_hidden_size():
    by_size = {size: {"a": 3 * size**-0.5, "b": 0.1 * size} for size in (8, 32, 64)}
    assert slopes(by_size) == pytest.approx({"a": -0.5, "b": 1.0})


def test_the_widths_of_another_hidden_size_are_in_proportion(tmp_path):
    keys = ("--model.hidden_size", "16", "--model.num_kv_heads", "2", "--method.rank", "4")
    config = at_hidden_size(tiny_config(tmp_path, "switchlora", *keys), 32)
    assert config.model.sizes == (32, 56, 2, 4)
    assert (config.model.head_width, config.model.kv_heads, config.method.rank) == (8, 4, 8)


def test_the_coordinate_check_shows_that_the_rule_makes_changes_equal_at_all_widths(
    corpora, tmp_path
):
    keys = ("hidden_size=32", "intermediate_size=88", "num_heads=2", "num_kv_heads=2")
    file, ruled = tmp_path / "base.toml", "model.tuned_hidden_size=32"
    file.write_text(tiny_toml(corpora / "coordinates", "full_rank"))
    sides = [",".join(f"model.{key}" for key in keys)]
    sides.append(f"{sides[0]},{ruled},optimizer.tuned_hidden_size=32")
    words = [f"{file}:{side}" for side in sides]
    result = result_of("benchmark", "coordinates", *words, "--sizes", 32, 64, 128)
    one_rate, rule = result["slopes"].values()
    # A step of AdamW changes the sum over n inputs by n^(1/2) to n (arXiv 2203.03466).
    assert 0.3 < one_rate["up_proj"] < 1.2
    assert one_rate["residual stream"] > 0.8
    assert abs(rule["residual stream"]) < 0.4
    assert abs(rule["up_proj"]) < one_rate["up_proj"] - 0.1
    assert abs(one_rate["embed_tokens"]) < 0.1
