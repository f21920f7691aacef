"""Every method trains, resumes bitwise and has the weights of a plain model.

Each run of `RUNS` trains once; tests read its results.
"""

import math
from functools import cache
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from support.commands import run, succeed
from support.folders import read_weights
from support.tensors import differing
from support.tiny import (
    METHOD_KEYS,
    MINI,
    full_tensors,
    model_on_meta,
    ready_trainer,
    record_reports,
    tiny_config,
    train_steps,
)

from switchtitan.distributed.fsdp import materialize, pack_frozen_weights
from switchtitan.distributed.shards import gather_on_main
from switchtitan.errors import CheckpointError
from switchtitan.hub.initial_weights import DenseCheckpoint, read_model_folder
from switchtitan.methods import METHODS
from switchtitan.methods.adapter.linear import adapter_layers
from switchtitan.methods.adapter.method import AdapterConfig, AdapterMethod
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.models import MODELS
from switchtitan.registry import Component
from switchtitan.workbench.spectra.weight_change import checkpoint_spectra, mean_effective_rank

INT16 = ("--training.frozen_dtype", "int16")
IN_8_BITS = (
    *("--model.hidden_size", "128", "--model.intermediate_size", "256", "--method.rank", "32"),
    *("--optimizer.name", "muon8bit", *INT16),
)
IN_24_BITS = (*IN_8_BITS, "--training.trained_dtype", "bfloat16")
TIED = ("--model.name", "qwen2", "--model.tied_head", "true", "--model.head_dim", "8")
COLA = ("--model.name", "cola", "--model.rank", "4")
ROOT_SCALED = "root_scaled"
LONG, SHORT = (10, 20), (2, 4)
ON_TIED_QWEN2 = ("full_rank", "galore", "sltrain", "switchlora")
RUNS = {
    **{method: (method, (), LONG) for method in METHOD_KEYS},
    "lora_with_dropout": ("lora", ("--method.dropout", "0.1"), LONG),
    "relora_in_int16": ("relora", INT16, LONG),
    "switchlora_in_int16": ("switchlora", INT16, LONG),
    "switchlora_in_8_bits": ("switchlora", IN_8_BITS, SHORT),
    "switchlora_in_24_bits": ("switchlora", IN_24_BITS, SHORT),
    ROOT_SCALED: (ROOT_SCALED, (), SHORT),
    **{f"{method}_on_tied_qwen2": (method, TIED, SHORT) for method in ON_TIED_QWEN2},
    "full_rank_on_cola": ("full_rank", COLA, SHORT),
}
"""Name -> method, keys, and the steps after which it is saved and ends."""
WITH_AN_ADAPTER = [ROOT_SCALED, "switchlora_in_int16"]
EXPORTED = [*WITH_AN_ADAPTER, "switchlora"]
EXPORTED += [f"{method}_on_tied_qwen2" for method in ON_TIED_QWEN2 if method != "galore"]
RESUMED = [name for name in RUNS if "tied" not in name] + ["switchlora_on_tied_qwen2"]
# (W + s B A) x against W x + s B (A x): fp32 rounding errors of 6e-8 through two blocks; logits
# are of order 1.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
RANK, ALPHA = 6, 1.5


class RootScaledConfig(AdapterConfig):
    """A section outside the package."""

    name: Literal["root_scaled"] = ROOT_SCALED


class RootScaled(AdapterMethod[RootScaledConfig]):
    """LoRA with a scale of alpha / sqrt(rank), and twice that in `down_proj`."""

    def scale_of(self, layer_name):
        scale = self.config.alpha / math.sqrt(self.config.rank)
        return scale * (2 if layer_name.endswith("down_proj") else 1)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS.rows, ROOT_SCALED, Component(RootScaledConfig, RootScaled))
        yield


def config_of(folder, name, *more):
    method, keys, _ = RUNS[name]
    keys = ("--training.local_batch_size", "8", *keys, *more)
    if method != ROOT_SCALED:
        return tiny_config(folder, method, *keys)
    outside = {"method": RootScaledConfig(rank=RANK, alpha=ALPHA)}
    return tiny_config(folder, "lora", *keys).model_copy(update=outside)


def trainer_of(folder, name, *more):
    config = config_of(folder, name, *more)
    return ready_trainer(config)


def method_of(config):
    return METHODS.build(config.method, config.training.steps, config.job.seed)


@torch.no_grad()
def logits(model):
    """Of two sequences that are the same in all tests, of two documents each."""
    tokens = torch.randint(0, 270, (2, 16), generator=torch.Generator().manual_seed(0))
    document_ids = (torch.arange(16) >= 7).int().expand(2, 16)
    was_training = model.training
    found = model.eval()(tokens, document_ids).clone()
    model.train(was_training)
    return found


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def trained(corpora):
    """A function: name of a run -> its results."""
    return cache(lambda name: train(corpora / f"contract-{name}", name))


def train(folder, name):
    """Trains and saves a run. `saved_...` are from its save."""
    _, _, (saved_step, num_steps) = RUNS[name]
    trainer = trainer_of(folder, name)
    stepper, model = trainer.stepper, trainer.stepper.model
    one = SimpleNamespace(folder=folder, config=config_of(folder, name))
    one.initial_tensors = full_tensors(trainer)
    one.losses = train_steps(trainer, saved_step)
    saved = full_tensors(trainer)
    trainer.save()
    trainer.checkpointer.finish()
    one.checkpoint = trainer.checkpointer.latest
    one.changed_by_saving = differing(full_tensors(trainer), saved)
    one.saved_parameters = copies(gather_on_main(model.named_parameters(), is_main=True))
    one.saved_buffers = copies(gather_on_main(model.named_buffers(), is_main=True))
    one.saved_optimizer = copies(stepper.optimizer.state_dict())
    one.saved_logits = logits(model)
    one.losses += train_steps(trainer, num_steps - saved_step)
    one.tensors, one.metrics = full_tensors(trainer), stepper.optimizer.metrics()
    one.state = stepper.state
    stepper.close()
    return one


def test_every_method_and_every_model_is_held_to_the_contract():
    assert {method.removesuffix(MINI) for method in METHOD_KEYS} == set(METHODS) - {ROOT_SCALED}
    models = {keys[1] for _, keys, _ in RUNS.values() if "--model.name" in keys}
    assert models | {"llama"} == set(MODELS)


def freezes_weights(method):
    return METHODS.rows[method.removesuffix(MINI)].config_type.freezes_weights


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_falls_and_all_move_but_what_the_section_says_is_frozen(trained, name):
    one = trained(name)
    assert one.losses[-1] < one.losses[0]
    still = [
        key for key, tensor in one.initial_tensors.items() if torch.equal(tensor, one.tensors[key])
    ]
    parameters = dict(model_on_meta(one.config).named_parameters())
    trains = {f"model.{key}" for key, p in parameters.items() if p.requires_grad}
    assert not trains & set(still)
    assert one.config.method.freezes_weights == (len(trains) < len(parameters))
    if "tied" in name:
        assert not [key for key in one.tensors if "lm_head" in key]
        assert len([key for key in trains if key.endswith(".bias")]) == 2 * 3


@pytest.mark.parametrize("name", RESUMED)
def test_a_save_changes_nothing_and_resuming_equals_a_straight_run_bitwise(trained, name):
    straight, (saved_step, num_steps) = trained(name), RUNS[name][2]
    assert not straight.changed_by_saving
    resumed = trainer_of(straight.folder, name)
    stepper = resumed.stepper
    assert stepper.state.step == saved_step
    losses = train_steps(resumed, num_steps - saved_step)
    stepper.close()
    assert losses == straight.losses[saved_step:]
    assert stepper.state == straight.state
    assert not differing(full_tensors(resumed), straight.tensors)
    assert stepper.optimizer.metrics() == straight.metrics

    assert differing(stepper.optimizer.state_dict(), straight.saved_optimizer)
    stepper.optimizer.load_state_dict(straight.saved_optimizer)
    assert not differing(stepper.optimizer.state_dict(), straight.saved_optimizer)


@pytest.mark.parametrize("name", [name for name in RUNS if "tied" not in name])
def test_dense_weights_in_the_plain_model_compute_the_same_logits(trained, name):
    one = trained(name)
    dense = method_of(one.config).dense_weights(one.saved_parameters)
    assert {(tensor.dtype, tensor.device.type) for tensor in dense.values()} == {
        (torch.float32, "cpu")
    }
    assert not differing(read_weights(one.checkpoint), dense)
    with_buffers = method_of(one.config).dense_weights(one.saved_parameters | one.saved_buffers)
    assert not differing(with_buffers, dense)
    plain = MODELS.build(one.config.model)
    untrained = logits(plain)
    plain.load_state_dict(dense, strict=True)
    torch.testing.assert_close(logits(plain), one.saved_logits, **ROUNDING)
    assert (untrained - one.saved_logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "transformers") for name in EXPORTED),
        *((name, "peft") for name in WITH_AN_ADAPTER),
    ],
)
def test_the_export_command_accepts_its_export_which_computes_the_same_logits(
    trained, tmp_path, name, form
):
    one, folder = trained(name), tmp_path / "exported"
    succeed("export", one.checkpoint, "--folder", folder, "--format", form)
    plain = MODELS.build(one.config.model)
    plain.load_state_dict(read_weights(folder))
    torch.testing.assert_close(logits(plain), one.saved_logits, **ROUNDING)
    assert read_model_folder(folder)["name"] == one.config.model.name


@pytest.mark.parametrize("method", [name for name in METHOD_KEYS if not freezes_weights(name)])
def test_a_method_without_a_frozen_weight_and_an_update_has_no_adapter(trained, tmp_path, method):
    folder = tmp_path / "adapter"
    words = ("export", trained(method).checkpoint, "--folder", folder, "--format", "peft")
    run(*words).check_refused("--format peft", method.removesuffix(MINI))
    assert not folder.exists()


def test_a_model_that_transformers_does_not_have_is_not_exported(trained, tmp_path):
    words = ("export", trained("full_rank_on_cola").checkpoint, "--folder", tmp_path / "out")
    run(*words).check_refused("name = 'cola'", "transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*METHOD_KEYS, "switchlora_in_int16"])
def test_a_start_from_a_full_rank_checkpoint_computes_what_that_does(trained, tmp_path, name):
    dense = trained("full_rank")
    config = config_of(tmp_path, name)
    model = model_on_meta(config)
    if "int16" in name:
        pack_frozen_weights(model)
    weights = DenseCheckpoint(dense.checkpoint)
    materialize(model, torch.device("cpu"), config.job.seed, weights.read_rows)
    error = (logits(model) - dense.saved_logits).abs().max()
    # W - s B A + s B A: as above; 16 bits round by 2^-16. A product without a frozen weight
    # approximates W.
    assert (error < (1e-3 if "int16" in name else 1e-4)) == config.method.keeps_initial_weights
    assert config.method.keeps_initial_weights == (name not in ("low_rank", "sltrain"))


def test_frozen_weights_in_int16_change_and_another_dtype_is_refused(trained):
    for name in ("switchlora_in_int16", "relora_in_int16"):
        one = trained(name)
        before, after = one.initial_tensors, one.tensors
        frozen = [key for key, tensor in after.items() if tensor.dtype == torch.int16]
        assert len(frozen) == 14
        assert not [key for key in frozen if torch.equal(before[key], after[key])]
        _, spectra = checkpoint_spectra(one.checkpoint)
        assert len(spectra) == 14
        assert all(values.isfinite().all() and values[0] > 0 for values in spectra.values())
        with pytest.raises(CheckpointError, match=r"frozen_dtype.*int16.*float32"):
            trainer_of(one.folder, RUNS[name][0])


@pytest.mark.parametrize(
    "name", ["full_rank", "full_rank_on_tied_qwen2", "switchlora_on_tied_qwen2"]
)
def test_other_lr_is_the_rate_of_all_but_the_layers_that_low_rank_methods_target(corpora, name):
    folder = corpora / f"contract-other-lr-{name}"
    trainer = trainer_of(folder, name, "--optimizer.other_lr", "1e-30")
    before = full_tensors(trainer)
    train_steps(trainer, 2)
    after = full_tensors(trainer)
    trainer.stepper.close()
    parameters = [key for key, _ in trainer.stepper.model.named_parameters()]
    moved = {
        key
        for key in parameters
        if (after[f"model.{key}"] - before[f"model.{key}"]).abs().max() > 1e-28
    }
    in_linear_layers = {key for key in parameters if "_proj." in key}
    assert moved == {key for key in in_linear_layers if not key.endswith(".bias")}


def test_a_method_outside_the_package_has_its_own_scale_in_every_reader(corpora, trained):
    one = trained(ROOT_SCALED)
    lora = Lora(LoraConfig(rank=RANK, alpha=ALPHA), 40, seed=0)
    wrong = MODELS.build(one.config.model)
    wrong.load_state_dict(lora.dense_weights(one.saved_parameters))
    assert (logits(wrong) - one.saved_logits).abs().max() > 1e-3

    keys = ("--spectrum.interval", "4", "--training.steps", "4", "--checkpoint.interval", "4")
    trainer = trainer_of(corpora / "contract-outside", ROOT_SCALED, *keys)
    scales = {layer.scale for layer in adapter_layers(trainer.stepper.model).values()}
    assert scales == {ALPHA / math.sqrt(RANK), 2 * ALPHA / math.sqrt(RANK)}
    reported = record_reports(trainer)
    trainer.train()
    _, from_checkpoint = checkpoint_spectra(trainer.checkpointer.latest)
    assert mean_effective_rank(from_checkpoint) == reported[4]["rank/effective_mean"]
