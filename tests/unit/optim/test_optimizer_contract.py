"""Every optimizer lowers the loss and resumes bitwise; unsupported settings are refused early."""

from collections.abc import Iterator

import pytest
import torch
from support.packages import needs_torchao
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps

from switchtitan.distributed.world import stop_world
from switchtitan.errors import ConfigError
from switchtitan.methods import METHODS
from switchtitan.optim import OPTIMIZERS

KEYS = {
    "adafactor": ("--optimizer.lr", "0.1"),
    "adamw": ("--optimizer.lr", "1e-2", "--optimizer.weight_decay", "0.01"),
    "adamw8bit": ("--optimizer.lr", "1e-2", "--optimizer.weight_decay", "0.01"),
    "muon": ("--optimizer.lr", "2e-2"),
    "scale": ("--optimizer.lr", "1e-2", "--optimizer.weight_decay", "0.01"),
    "sgd": ("--optimizer.lr", "0.3", "--optimizer.nesterov", "true"),
}


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def overrides(optimizer: str) -> tuple[str, ...]:
    return ("--optimizer.name", optimizer, *KEYS[optimizer])


def test_every_optimizer_is_held_to_the_contract():
    assert set(KEYS) == set(OPTIMIZERS)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_the_documentation_of_keys_names_no_low_rank_method(optimizer):
    """A method's section says what is special about it."""
    for key, field in OPTIMIZERS[optimizer].config_type.model_fields.items():
        words = (field.description or "").lower().replace(",", " ").split()
        assert not set(words) & (set(METHODS) - {"full_rank"}), key


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *(
            pytest.param(method, name, marks=needs_torchao if name == "adamw8bit" else ())
            for method in ("full_rank", "lora")
            for name in KEYS
        ),
        ("switchlora", "muon"),
    ],
)
def test_the_loss_falls_and_resuming_equals_a_straight_run_bitwise(corpora, optimizer, method):
    keys = (*overrides(optimizer), "--optimizer.other_lr", str(float(KEYS[optimizer][1]) / 2))
    straight = tiny_trainer(corpora / f"optimizer-straight-{optimizer}-{method}", method, *keys)
    losses = train_steps(straight, 24)
    straight.stepper.close()
    assert losses[-1] < losses[0] - 0.1

    folder = corpora / f"optimizer-resumed-{optimizer}-{method}"
    first = tiny_trainer(folder, method, *keys)
    assert train_steps(first, 12) == losses[:12]
    first.save()
    first.checkpointer.finish()
    first.stepper.close()
    resumed = tiny_trainer(folder, method, *keys)
    assert train_steps(resumed, 12) == losses[12:]
    resumed.stepper.close()
    tensors = full_tensors(resumed)
    assert any(name.startswith("optimizer.") for name in tensors)
    for name, tensor in full_tensors(straight).items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        (
            "galore",
            overrides("sgd"),
            r"galore.* cannot train with it; choose adamw, or .*full_rank, lora",
        ),
        (
            "full_rank",
            (*overrides("scale"), "--model.tied_head", "true"),
            r'"scale": treats the head.* tied to the embedding; untie it',
        ),
        ("apollo", overrides("muon"), r"apollo.* cannot train with it"),
        ("relora", overrides("adafactor"), r"relora.* cannot train with it"),
        (
            "switchlora",
            overrides("sgd"),
            r"switchlora.* cannot train with it; choose adamw or muon, or ",
        ),
        (
            "switchlora",
            (*overrides("muon"), "--method.reset_moments", "rescaled"),
            r'reset_moments = "rescaled": \[optimizer\] name = "muon" has no second moments',
        ),
        (
            "full_rank",
            (*overrides("adafactor"), "--compile.optimizer", "true"),
            r"cannot be compiled",
        ),
        ("lora", ("--optimizer.decay_norms", "true"), r"decay_norms has no effect"),
        ("lora", (*overrides("sgd"), "--optimizer.momentum", "0"), r"nesterov has no effect"),
        (
            "lora",
            (*overrides("muon"), "--optimizer.momentum", "0", "--optimizer.nesterov", "false"),
            r"nesterov has no effect",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tmp_path, method, keys, words):
    with pytest.raises(ConfigError, match=words):
        tiny_config(tmp_path, method, *keys)
