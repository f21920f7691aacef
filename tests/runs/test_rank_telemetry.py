"""Rank telemetry measures the weights' change since step 0, from whatever a run started."""

import shutil
from pathlib import Path

import pytest
import torch
from support.comparisons import finish
from support.tensors import differing
from support.tiny import full_tensors, ready_trainer, record_reports, tiny_config, tiny_trainer
from support.trained import train_and_save

from switchtitan.distributed.shards import gather_on_main
from switchtitan.errors import CheckpointError
from switchtitan.job.config import parse_arguments
from switchtitan.methods import METHODS
from switchtitan.workbench.comparison.runs import Run, read_folder
from switchtitan.workbench.spectra.weight_change import checkpoint_spectra, mean_effective_rank

NUM_STEPS = ("--training.steps", "12", "--evaluation.interval", "100")
EVERY_5 = (*NUM_STEPS, "--spectrum.interval", "5")
NUM_LAYERS = 2 * 7


def train(folder, method, *overrides):
    """Trains a complete run; returns it and its reported ranks by step."""
    trainer = tiny_trainer(folder, method, *overrides)
    reported = record_reports(trainer)
    trainer.train()
    ranks = {
        step: {tag: value for tag, value in values.items() if tag.startswith("rank/")}
        for step, values in reported.items()
    }
    return trainer, {step: of for step, of in ranks.items() if of}


def merged_weights(folder, method, trainer):
    config = tiny_config(folder, method)
    built = METHODS.build(config.method, config.training.steps, config.job.seed)
    parameters = gather_on_main(trainer.stepper.model.named_parameters(), is_main=True)
    return built.dense_weights(parameters)


def starting_weights(folder, method):
    """Of a run that has taken no step."""
    trainer = tiny_trainer(folder.with_name(f"{folder.name}-start"), method)
    trainer.close()
    return merged_weights(folder, method, trainer)


def expected_spectra(weights, initial):
    return {
        name.removesuffix(".weight"): torch.linalg.svdvals((weight - initial[name]).double())
        for name, weight in weights.items()
        if name.endswith("_proj.weight")
    }


def assert_spectra_are(measured, expected):
    assert len(measured) == NUM_LAYERS
    for name, values in measured.items():
        # Roots of a Gram matrix's fp64 eigenvalues: half the digits, relative to the largest.
        bound = 1e-7 * expected[name][0].item()
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-6, atol=bound)


@pytest.fixture(scope="module")
def switching(corpora):
    """A run of SwitchLoRA that measures, and what it reported."""
    return train(corpora / "rank", "switchlora", *EVERY_5)


# Fira and APOLLO train full weights, as GaLore and full rank do.
@pytest.mark.parametrize(
    "method", ["full_rank", "galore", "lora", "low_rank", "relora", "sltrain", "switchlora"]
)
def test_measured_ranks_equal_those_of_merged_minus_starting_weights(corpora, switching, method):
    folder = corpora / ("rank" if method == "switchlora" else f"rank-{method}")
    trainer, reported = switching if method == "switchlora" else train(folder, method, *EVERY_5)
    _, measured = checkpoint_spectra(folder / "run" / "checkpoints" / "step-000000012")
    assert list(reported) == [5, 10, 12]
    expected = expected_spectra(
        merged_weights(folder, method, trainer), starting_weights(folder, method)
    )
    assert_spectra_are(measured, expected)
    ranks = reported[12]
    # The roundings above, some 20 values in each entropy.
    assert ranks["rank/effective_mean"] == pytest.approx(mean_effective_rank(expected), rel=1e-4)
    # LoRA stays within its rank; W + s B A is rounded to fp32: 6e-8 of weights of 0.02.
    beyond = [values[6] / values[0] for values in measured.values()]
    if method == "lora":
        assert max(beyond) < 1e-4
    if method in ("full_rank", "switchlora"):
        assert min(beyond) > 1e-3


def test_without_the_setting_nothing_is_measured_and_the_run_is_the_same(corpora, switching):
    trainer, reported = train(corpora / "rank-off", "switchlora", *NUM_STEPS)
    assert trainer.hooks == []
    assert reported == {}
    assert differing(full_tensors(trainer), full_tensors(switching[0])) == []


def test_a_resumed_run_measures_from_step_0(corpora, switching):
    folder = corpora / "rank-resumed"
    train_and_save(folder, "switchlora", *NUM_STEPS, num_steps=7)
    _, reported = train(folder, "switchlora", *EVERY_5)
    assert reported == {step: ranks for step, ranks in switching[1].items() if step > 7}


def test_a_warm_start_measures_from_its_weights_which_must_stay(corpora):
    from safetensors.torch import load_file, save_file

    folder, start = corpora / "rank-warm", corpora / "start.safetensors"
    generator = torch.Generator().manual_seed(8)
    weights = {
        name: weight + 0.01 * torch.randn(weight.shape, generator=generator)
        for name, weight in starting_weights(folder, "full_rank").items()
    }
    save_file(weights, start)
    warm = ("--checkpoint.initial_weights", str(start))
    train_and_save(folder, "lora", *NUM_STEPS, *warm, num_steps=4)
    # The key may be omitted on resume: the checkpoint stores the initial weights' path.
    trainer, reported = train(folder, "lora", *EVERY_5)
    expected = expected_spectra(merged_weights(folder, "lora", trainer), load_file(start))
    assert list(reported) == [5, 10, 12]
    _, measured = checkpoint_spectra(folder / "run" / "checkpoints" / "step-000000012")
    assert_spectra_are(measured, expected)
    assert reported[12]["rank/effective_mean"] < 6
    later = ("--training.steps", "14", *EVERY_5[2:])
    for spoil in (
        lambda: save_file({name: 2 * of for name, of in weights.items()}, start),
        start.unlink,
    ):
        spoil()
        config = tiny_config(folder, "lora", *later)
        with pytest.raises(CheckpointError, match=start.name):
            ready_trainer(config)
    _, reported = train(folder, "lora", "--training.steps", "14")
    assert reported == {}


def test_the_effective_rank_is_that_of_the_last_checkpoint(corpora, tmp_path):
    train_and_save(corpora / "effective-rank", "lora")
    folder = Path(shutil.copytree(corpora / "effective-rank" / "run", tmp_path / "run"))
    words = ("--config", str(folder / "config.toml"), "--job.output_dir", str(folder))
    run = Run("lora", {}, 1, words, parse_arguments(words, 1))
    finish(run, 3.0, step=run.config.training.steps)
    _, spectra = checkpoint_spectra(folder / "checkpoints" / "step-000000007")
    # Spectra are in fp32.
    assert read_folder(run).effective_rank == pytest.approx(mean_effective_rank(spectra), rel=1e-5)
    shutil.rmtree(folder / "checkpoints")
    assert read_folder(run).effective_rank is None
