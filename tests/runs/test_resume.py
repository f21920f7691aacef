"""What a run resumes from, what may change meanwhile, and what it says about that."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.commands import run
from support.tiny import tiny_config, tiny_trainer, train_steps

from switchtitan.builders.stepper import build_method, build_plain_model
from switchtitan.checkpoint import check_same_run
from switchtitan.config.toml_text import resolved_toml
from switchtitan.distributed import dtype as compute_dtype
from switchtitan.distributed.dtype import Bf16Support
from switchtitan.distributed.world import stop_world
from switchtitan.errors import CheckpointError
from switchtitan.models import MODELS
from switchtitan.training.describe import (
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


def identity(folder, method, *overrides, fingerprint="abc"):
    corpus = SimpleNamespace(name="a stand-in", fingerprint=fingerprint, parts=())
    return run_identity(tiny_config(folder, method, *overrides), corpus)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("--job.seed", "7"), ("job.seed", "7")),
        (("--data.seq_len", "8"), ("data.seq_len", "8")),
        (("--training.global_batch_size", "16"), ("training.global_batch_size", "16")),
        (("--method.rank", "5"), ("method.rank", "5")),
        (("--method.interval", "8"), ("method.interval", "8")),
        (("--model.rope_theta", "700"), ("model.rope_theta", "700")),
        (("--optimizer.name", "muon"), ("optimizer.name", "muon")),
        ({"fingerprint": "def"}, ("corpus.fingerprint", "def")),
    ],
)
def test_what_determines_the_meaning_of_tensors_and_data_must_be_equal(tmp_path, change, parts):
    saved = comparable_identity(identity(tmp_path, "switchlora"))
    check_same_run(saved, identity(tmp_path, "switchlora"))
    overrides, keywords = ((), change) if isinstance(change, dict) else (change, {})
    with pytest.raises(CheckpointError) as caught:
        check_same_run(saved, identity(tmp_path, "switchlora", *overrides, **keywords))
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    "change",
    [
        ("--optimizer.lr", "5e-3"),
        ("--training.steps", "50"),
        ("--training.local_batch_size", "4"),
        ("--method.candidates_device", "host"),
        ("--method.contraction", "merged"),
    ],
)
def test_what_changes_only_the_course_of_a_run_may_change(tmp_path, change):
    saved = comparable_identity(identity(tmp_path, "switchlora"))
    check_same_run(saved, identity(tmp_path, "switchlora", *change))


def test_an_identity_saved_before_its_keys_existed_is_equal(tmp_path):
    now = identity(tmp_path, "switchlora")
    method = {key: value for key, value in now["method"].items() if key != "reset_moments"}
    old = now | {"method": method | {"contraction": "merged"}}
    with pytest.raises(CheckpointError):
        check_same_run(old, now)
    check_same_run(comparable_identity(old), now)


@pytest.mark.parametrize(
    ("change", "part"),
    [({"gain": 2.0}, "method.gain"), ({"name": "dora"}, "method.name"), ({"rank": ...}, "rank")],
)
def test_a_key_that_this_version_does_not_have_or_that_is_missing_is_refused(
    tmp_path, change, part
):
    now = identity(tmp_path, "lora")
    method = {k: v for k, v in (now["method"] | change).items() if v is not ...}
    with pytest.raises(CheckpointError, match=part):
        check_same_run(comparable_identity(now | {"method": method}), now)


def test_a_run_resumes_with_another_candidates_device_and_contraction(corpora):
    straight = tiny_trainer(corpora / "stays", "switchlora")
    expected = train_steps(straight, 9)
    straight.stepper.close()
    losses = []
    for device, contraction in (("device", "merged"), ("host", "factored"), ("device", "cheapest")):
        keys = ("--method.candidates_device", device, "--method.contraction", contraction)
        trainer = tiny_trainer(corpora / "moves", "switchlora", *keys)
        assert trainer.stepper.state.step == len(losses)
        losses += train_steps(trainer, 3)
        trainer.save()
        trainer.stepper.close()
    # Contractions agree up to rounding; Adam amplifies it where gradients are near zero.
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_warns_of_changed_keys_and_a_complete_one_writes_no_configuration(
    corpora, caplog
):
    folder, short = corpora / "changed-keys", ("--training.steps", "2")
    tiny_trainer(folder, "lora", *short).train()
    stop_world()
    with caplog.at_level("INFO"):
        tiny_trainer(folder, "lora", *short, "--optimizer.lr", "0.09").train()
    assert "training already complete: step 2" in caplog.text
    assert "optimizer.lr: 0.01 -> 0.09" in caplog.text
    assert not list((folder / "run").glob("config-from-step-*"))


def test_keys_that_changed_since_a_checkpoint_are_listed(tmp_path):
    before = resolved_toml(tiny_config(tmp_path, "lora"))
    keys = ("--optimizer.lr", "5e-3", "--training.steps", "50", "--job.name", "other")
    now = resolved_toml(tiny_config(tmp_path, "lora", *keys))
    expected = ["optimizer.lr: 0.01 -> 0.005", "training.steps: 40 -> 50"]
    assert changed_keys(before, now) == expected
    assert changed_keys(before, before) == []


def test_weight_decay_of_norms_that_stops_is_listed(tmp_path):
    """Before `decay_norms` existed, weight decay applied to norms."""
    now = resolved_toml(tiny_config(tmp_path, "lora", "--optimizer.weight_decay", "0.1"))
    old = now.replace("decay_norms = false\n", "")
    (listed,) = changed_keys(old, now)
    assert listed.startswith("optimizer.decay_norms: true")
    assert changed_keys(old, now.replace("decay_norms = false", "decay_norms = true")) == []


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


def pretend(monkeypatch, is_native):
    """Lets this machine multiply in bf16 natively or not."""
    support = Bf16Support(is_native, "so the test says")
    monkeypatch.setattr(compute_dtype, "bf16_support", lambda device: support)


def run_steps(folder, num_steps, dtype="auto"):
    """Trains, saves, and returns losses and the dtype in which layers compute."""
    keys = ("--evaluation.interval", "100", "--training.dtype", dtype)
    trainer = tiny_trainer(folder, "switchlora", *keys)
    seen = set()
    layer = trainer.stepper.model.get_submodule("model.layers.0.mlp")
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    losses = train_steps(trainer, num_steps)
    trainer.save()
    trainer.close()
    stop_world()
    (computed,) = seen
    return losses, computed


def test_a_resumed_run_keeps_the_dtype_of_another_machine(corpora, monkeypatch, caplog, tmp_path):
    pretend(monkeypatch, True)
    straight, _ = run_steps(corpora / "straight-dtype", 4)
    folder = corpora / "kept-dtype"
    losses, first_dtype = run_steps(folder, 2)
    pretend(monkeypatch, False)
    caplog.set_level("INFO")
    resumed, second_dtype = run_steps(folder, 2)
    assert (first_dtype, second_dtype) == (torch.bfloat16, torch.bfloat16)
    assert losses + resumed == straight
    assert "compute dtype: bfloat16 (as in the checkpoint)" in caplog.text
    assert "changed since" not in caplog.text
    result = tmp_path / "result.json"
    assert run("evaluate", folder / "run", "--json", result).status == 0
    assert json.loads(result.read_text())["compute_dtype"] == "bfloat16"


def test_an_explicit_dtype_changes_a_resumed_run_and_is_listed(corpora, monkeypatch, caplog):
    folder = corpora / "changed-dtype"
    pretend(monkeypatch, False)
    assert run_steps(folder, 1)[1] == torch.float32
    pretend(monkeypatch, True)
    assert run_steps(folder, 1, "bfloat16")[1] == torch.bfloat16
    assert "changed since that checkpoint: compute dtype: float32 -> bfloat16" in caplog.text
    pretend(monkeypatch, False)
    assert run_steps(folder, 1)[1] == torch.bfloat16, "auto keeps the newest checkpoint's"


@pytest.mark.parametrize(
    ("billions", "shard", "num_local_ranks", "expected"),
    [
        (1, 16, 8, True),
        (1, 8, 8, False),  # a replica per machine
        (13, 16, 8, False),  # needs both machines
        (7, 16, 4, False),
    ],
)
def test_a_model_that_fits_on_one_machine_should_not_cross_the_network(
    billions, shard, num_local_ranks, expected
):
    model = torch.nn.Linear(billions * 1000, 1_000_000, bias=False, device="meta")
    assert crosses_nodes_needlessly(model, shard, num_local_ranks) == expected


SUMS = ("--parallelism.accumulate_gradients", "sharded")
REPLICATED = ("--parallelism.replicate", "2")


@pytest.mark.parametrize(
    ("keys", "num_ranks", "expected"),
    [
        ((), 1, []),
        (SUMS, 2, []),
        (SUMS, 4, ["accumulate_gradients"]),
        ((*SUMS, *REPLICATED), 2, ["accumulate_gradients"]),
    ],
)
def test_keys_that_gain_nothing_on_these_ranks_are_named(tmp_path, keys, num_ranks, expected):
    config = tiny_config(tmp_path, "switchlora", *keys, num_ranks=num_ranks)
    notices = keys_without_effect(config.parallelism, config.training, num_ranks)
    assert len(notices) == len(expected)
    assert all(key in notice for key, notice in zip(expected, notices, strict=True))


def test_a_run_says_at_its_start_what_has_no_effect_and_what_needs_memory(corpora, caplog):
    caplog.set_level("INFO")
    tiny_trainer(corpora / "default", "lora").stepper.close()
    assert "has no effect" not in caplog.text
    assert "all logits" not in caplog.text
    targets = ("--method.targets", "q_proj", "lm_head")
    tiny_trainer(corpora / "noticed", "lora", *SUMS, *targets).stepper.close()
    assert 'accumulate_gradients = "sharded" only takes time' in caplog.text
    assert "lm_head is a LowRankLinear, not a Head" in caplog.text


def test_the_head_of_another_class_is_named(tmp_path):
    config = tiny_config(tmp_path, "full_rank").model
    model = MODELS.build(config)
    assert head_notice(model, config) is None
    model.lm_head = torch.nn.Linear(20, config.vocab_size, bias=False)
    assert "Linear, not a Head" in head_notice(model, config)


@pytest.mark.parametrize(
    ("intermediate_size", "rank", "expected"), [(32, 8, []), (28, 8, [28]), (28, 6, [6, 28])]
)
def test_widths_that_are_not_aligned_are_found(tmp_path, intermediate_size, rank, expected):
    keys = ("--model.hidden_size", "16", "--model.num_kv_heads", "2", "--method.rank", str(rank))
    keys += ("--model.intermediate_size", str(intermediate_size))
    config = tiny_config(tmp_path, "switchlora", *keys)
    model = build_plain_model(config)
    build_method(config).prepare_model(model)
    assert unaligned_widths(model) == expected
