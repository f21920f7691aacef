"""A run resumes from a checkpoint saved before a key existed if the key has its default."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.checkpoints import rewrite_metadata
from support.tiny import tiny_config, tiny_trainer, train_steps

from switchtitan.builders.stepper import build_method, build_plain_model
from switchtitan.checkpoint import check_same_run
from switchtitan.config.toml_text import resolved_toml
from switchtitan.data import Corpus
from switchtitan.distributed.world import stop_world
from switchtitan.errors import CheckpointError
from switchtitan.models import MODELS
from switchtitan.training.description import (
    changed_keys,
    comparable_identity,
    crosses_nodes_needlessly,
    head_notice,
    keys_without_effect,
    newest_config_file,
    run_identity,
    unaligned_widths,
    write_config,
)

NEW_KEYS = ("candidates", "reset_moments", "switches_per_vector", "preset", "order")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def identity(folder: Path, method: str, *overrides: str) -> dict[str, dict]:
    config = tiny_config(folder, method, *overrides)
    corpus = SimpleNamespace(name="a stand-in", fingerprint="abc", parts=())
    return run_identity(config, cast(Corpus, corpus))


def without(section: dict, *keys: str) -> dict:
    return {key: value for key, value in section.items() if key not in keys}


# With a constant decay, the saved default of decay_ratio is a value that must not be set.
@pytest.mark.parametrize("decay", ["constant", "exponential"])
def test_an_identity_saved_before_its_keys_existed_is_equal(tmp_path: Path, decay: str):
    now = identity(tmp_path, "switchlora", "--method.decay", decay)
    old = now | {
        "method": without(now["method"], *NEW_KEYS),
        "model": without(now["model"], "rope_theta"),
    }
    with pytest.raises(CheckpointError):
        check_same_run(old, now)
    check_same_run(comparable_identity(old), now)
    assert not any(key in old["method"] for key in NEW_KEYS), "changed in place"


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("candidates", "constant", "swap"),
        ("reset_moments", "both", "counterpart"),
        ("order", "least_moving", "ring"),
    ],
)
def test_a_new_key_with_another_value_is_refused(
    tmp_path: Path, key: str, value: str, default: str
):
    now = identity(tmp_path, "switchlora", f"--method.{key}", value, "--method.interval", "8")
    old = now | {"method": without(now["method"], *NEW_KEYS)}
    with pytest.raises(
        CheckpointError, match=f"method.{key}: saved with '{default}', now '{value}'"
    ):
        check_same_run(comparable_identity(old), now)


def test_resumable_keys_in_a_saved_identity_are_ignored(tmp_path: Path):
    """Older checkpoints contain them."""
    now = identity(tmp_path, "switchlora")
    assert not {"contraction", "candidates_device"} & now["method"].keys()
    old = now | {"method": now["method"] | {"contraction": "merged", "candidates_device": "host"}}
    with pytest.raises(CheckpointError):
        check_same_run(old, now)
    check_same_run(comparable_identity(old), now)
    # In another method the key is unknown.
    lora = identity(tmp_path, "lora")
    old = comparable_identity(lora | {"method": lora["method"] | {"candidates_device": "host"}})
    with pytest.raises(CheckpointError, match="candidates_device"):
        check_same_run(old, lora)


def test_a_run_resumes_with_another_candidates_device_and_contraction(corpora: Path):
    straight = tiny_trainer(corpora / "stays", "switchlora")
    expected = train_steps(straight, 12)
    straight.stepper.close()
    losses = []
    for device, contraction in (("device", "merged"), ("host", "factored"), ("device", "cheapest")):
        keys = ("--method.candidates_device", device, "--method.contraction", contraction)
        trainer = tiny_trainer(corpora / "moves", "switchlora", *keys)
        assert trainer.stepper.state.step == len(losses)
        losses += train_steps(trainer, 4)
        trainer.save()
        trainer.stepper.close()
    # Contractions agree up to rounding; Adam amplifies it where gradients are near zero.
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_without_newer_keys_is_pruned(corpora: Path):
    folder = corpora / "pruned"
    keys = ("--checkpoint.keep_latest", "1")
    older = tiny_trainer(folder, "switchlora", *keys)
    train_steps(older, 1)
    older.save()
    older.stepper.close()
    checkpoints = folder / "run" / "checkpoints"

    def without_newer_keys(metadata: dict[str, Any]) -> None:
        method = without(metadata["identity"]["method"], *NEW_KEYS)
        metadata["identity"]["method"] = method | {"contraction": "cheapest"}
        del metadata["identity"]["training"]["frozen_dtype"]

    rewrite_metadata(checkpoints / "step-000000001", without_newer_keys)
    newer = tiny_trainer(folder, "switchlora", *keys)
    train_steps(newer, 1)
    newer.save()
    newer.stepper.close()
    assert [path.name for path in checkpoints.iterdir()] == ["step-000000002"]


def test_a_key_that_no_longer_exists_and_an_unknown_method_are_refused(tmp_path: Path):
    now = identity(tmp_path, "lora")
    old = now | {"method": now["method"] | {"gain": 2.0}}
    with pytest.raises(CheckpointError, match=r"method.gain: saved with 2.0, now '\(absent\)'"):
        check_same_run(comparable_identity(old), now)
    unknown = now | {"method": {"name": "dora", "rank": 6}}
    assert comparable_identity(unknown) == unknown
    with pytest.raises(CheckpointError, match=r"method.name: saved with 'dora', now 'lora'"):
        check_same_run(comparable_identity(unknown), now)


def test_a_missing_key_without_a_default_is_refused(tmp_path: Path):
    now = identity(tmp_path, "lora")
    old = now | {"method": without(now["method"], "rank")}
    with pytest.raises(CheckpointError, match=r"method.rank: saved with '\(absent\)', now 6"):
        check_same_run(comparable_identity(old), now)


def test_a_run_resumes_from_a_checkpoint_saved_before_its_keys_existed(corpora: Path):
    folder = corpora / "older"
    short = ("--evaluation.interval", "100", "--checkpoint.interval", "2")
    tiny_trainer(folder, "switchlora", *short, "--training.steps", "2").train()

    def without_newer_keys(metadata: dict[str, Any]) -> None:
        metadata["identity"]["method"] = without(metadata["identity"]["method"], *NEW_KEYS)

    rewrite_metadata(folder / "run" / "checkpoints" / "step-000000002", without_newer_keys)
    resumed = tiny_trainer(folder, "switchlora", *short, "--training.steps", "3")
    assert resumed.stepper.state.step == 2
    resumed.stepper.close()


def test_keys_that_changed_since_a_checkpoint_are_listed(tmp_path: Path):
    before = tiny_config(tmp_path, "lora")
    now = tiny_config(
        tmp_path, "lora", "--optimizer.lr", "5e-3", "--training.steps", "50", "--job.name", "other"
    )
    assert changed_keys(resolved_toml(before), resolved_toml(now)) == [
        "optimizer.lr: 0.01 -> 0.005",
        "training.steps: 40 -> 50",
    ]
    assert changed_keys(resolved_toml(before), resolved_toml(before)) == []


def test_weight_decay_of_norms_that_stops_is_listed(tmp_path: Path):
    """Before `decay_norms` existed, weight decay applied to norms."""
    decays = tiny_config(tmp_path, "lora", "--optimizer.weight_decay", "0.1")
    now = resolved_toml(decays)
    old = now.replace("decay_norms = false\n", "")
    assert old != now
    stops = "optimizer.decay_norms: true (before this key) -> false"
    assert changed_keys(old, now) == [stops]
    assert changed_keys(now, now) == []
    assert changed_keys(old, now.replace("decay_norms = false", "decay_norms = true")) == []
    without_decay = resolved_toml(tiny_config(tmp_path, "lora"))
    assert changed_keys(without_decay, now) == ["optimizer.weight_decay: 0.0 -> 0.1"]
    assert changed_keys(old, without_decay) == ["optimizer.weight_decay: 0.1 -> 0.0"]


@pytest.mark.parametrize("method", ["full_rank", "galore", "lora"])
def test_only_a_run_without_low_rank_factors_resumes_from_format_1(corpora: Path, method: str):
    folder = corpora / f"format-1-{method}"
    first = tiny_trainer(folder, method)
    train_steps(first, 2)
    first.save()
    expected = train_steps(first, 2)
    first.stepper.close()
    checkpoint = folder / "run" / "checkpoints" / "step-000000002"
    rewrite_metadata(checkpoint, lambda metadata: metadata.update(format_version=1))
    if method == "lora":
        with pytest.raises(CheckpointError, match=r"has format 1, .* with switchtitan 0\.1, or"):
            tiny_trainer(folder, method)
        return
    resumed = tiny_trainer(folder, method)
    assert train_steps(resumed, 2) == expected
    resumed.stepper.close()


def test_a_resumed_run_warns_of_changed_keys_and_a_complete_one_writes_no_configuration(
    corpora, caplog
):
    folder = corpora / "changed-keys"
    tiny_trainer(folder, "lora", "--training.steps", "20").train()
    stop_world()
    with caplog.at_level("INFO"):
        tiny_trainer(folder, "lora", "--training.steps", "20", "--optimizer.lr", "0.09").train()
    assert (
        "training already complete: step 20, and [training] steps = 20; to continue, start it "
        "with a larger --training.steps" in caplog.messages
    )
    assert "changed since that checkpoint: optimizer.lr: 0.01 -> 0.09" in caplog.text
    assert not list((folder / "run").glob("config-from-step-*"))


@pytest.mark.parametrize(
    ("billions", "shard", "num_local_ranks", "expected"),
    [
        (1, 16, 8, True),
        (1, 8, 8, False),  # a replica per machine
        (7, 16, 8, True),
        (13, 16, 8, False),  # needs both machines
        (7, 16, 4, False),
    ],
)
def test_a_model_that_fits_on_one_machine_should_not_cross_the_network(
    billions: int, shard: int, num_local_ranks: int, expected: bool
):
    model = torch.nn.Linear(billions * 1000, 1_000_000, bias=False, device="meta")
    assert crosses_nodes_needlessly(model, shard, num_local_ranks) == expected


UNITS = ("--parallelism.blocks_per_unit", "3")
KEPT = ("--parallelism.frozen_weights", "gather_once")
SHARDED = ("--parallelism.accumulate_gradients", "sharded")
UNSHARDED = ("--parallelism.replicate", "2")
KEEPS_NOTHING = 'frozen_weights = "gather_once" has no effect: each rank holds all weights'
SAVES_NOTHING = 'accumulate_gradients = "sharded" only takes time: each rank holds all gradients'
ACCUMULATES_NOTHING = 'accumulate_gradients = "sharded" has no effect: a step has one micro-batch'


@pytest.mark.parametrize(
    ("keys", "num_ranks", "expected"),
    [
        ((), 1, []),
        (("--parallelism.frozen_weights", "replicate"), 1, []),
        (UNITS, 1, []),  # less host time
        (KEPT, 1, [KEEPS_NOTHING]),
        ((*KEPT, *UNSHARDED), 2, [KEEPS_NOTHING]),
        (KEPT, 2, []),
        (SHARDED, 1, [SAVES_NOTHING]),
        ((*SHARDED, *UNSHARDED), 2, [SAVES_NOTHING]),
        (SHARDED, 2, []),
        (SHARDED, 4, [ACCUMULATES_NOTHING]),
        ((*SHARDED, *KEPT), 1, [KEEPS_NOTHING, SAVES_NOTHING]),
    ],
)
def test_keys_that_gain_nothing_on_these_ranks_are_named(
    tmp_path: Path, keys: tuple[str, ...], num_ranks: int, expected: list[str]
):
    config = tiny_config(tmp_path, "switchlora", *keys, num_ranks=num_ranks)
    notices = keys_without_effect(config.parallelism, config.training, num_ranks)
    assert notices == [f"[parallelism] {notice}" for notice in expected]


def test_a_run_on_one_rank_says_at_its_start_which_keys_have_no_effect(corpora, caplog):
    caplog.set_level("INFO")
    tiny_trainer(corpora / "one-rank-default", "switchlora").stepper.close()
    assert "has no effect" not in caplog.text
    tiny_trainer(corpora / "one-rank-kept", "switchlora", *KEPT).stepper.close()
    assert f"[parallelism] {KEEPS_NOTHING}" in caplog.text


HOLDS_LOGITS = "the loss holds all logits in memory"


def test_a_run_says_at_its_start_that_the_loss_of_a_low_rank_head_holds_all_logits(corpora, caplog):
    caplog.set_level("INFO")
    tiny_trainer(corpora / "head", "lora").stepper.close()
    assert HOLDS_LOGITS not in caplog.text
    targets = ("--method.targets", "q_proj", "lm_head")
    tiny_trainer(corpora / "low-rank-head", "lora", *targets).stepper.close()
    assert f"lm_head is a LowRankLinear, not a Head: {HOLDS_LOGITS}" in caplog.messages


def test_the_head_of_another_class_is_named(tmp_path: Path):
    config = tiny_config(tmp_path, "full_rank").model
    model = MODELS.build(config)
    assert head_notice(model, config) is None
    model.lm_head = torch.nn.Linear(20, config.vocab_size, bias=False)
    assert head_notice(model, config) == f"lm_head is a Linear, not a Head: {HOLDS_LOGITS}"
    del model.lm_head
    assert head_notice(model, config) == f"the model has no Head: {HOLDS_LOGITS}"


@pytest.mark.parametrize(
    ("intermediate_size", "rank", "expected"), [(32, 8, []), (28, 8, [28]), (28, 6, [6, 28])]
)
def test_widths_that_are_not_aligned_are_found(
    tmp_path: Path, intermediate_size: int, rank: int, expected: list[int]
):
    config = tiny_config(
        tmp_path,
        "switchlora",
        *("--model.hidden_size", "16", "--model.num_kv_heads", "2", "--method.rank", str(rank)),
        *("--model.intermediate_size", str(intermediate_size)),
    )
    model = build_plain_model(config)
    build_method(config).prepare_model(model)
    assert unaligned_widths(model) == expected


def test_a_resumed_run_writes_its_configuration_only_if_it_is_another(tmp_path):
    write_config(tmp_path, "lr = 1", 0)
    write_config(tmp_path, "lr = 1", 3)
    assert newest_config_file(tmp_path) == (tmp_path / "config.toml", 0)
    write_config(tmp_path, "lr = 2", 5)
    write_config(tmp_path, "lr = 2", 11)
    assert newest_config_file(tmp_path) == (tmp_path / "config-from-step-5.toml", 5)
    write_config(tmp_path, "lr = 1", 12)
    newest, step = newest_config_file(tmp_path)
    assert (newest.read_text(), step) == ("lr = 1", 12)
    assert len([*tmp_path.iterdir()]) == 3
