"""Rank telemetry measures the weights' change since step 0; without [spectrum] interval,
nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import METHOD_KEYS, tiny_config, tiny_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from switchtitan.builders.trainer import build_trainer
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import start_world, stop_world
from switchtitan.errors import CheckpointError
from switchtitan.methods import METHODS
from switchtitan.methods.sltrain import support
from switchtitan.models import MODELS
from switchtitan.spectra.spectra_files import read_spectra
from switchtitan.training.trainer import Trainer

EVERY_10 = ("--spectrum.interval", "10", "--evaluation.interval", "100")
NUM_LAYERS = 2 * 7


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def train(
    folder: Path, method: str, *overrides: str
) -> tuple[Trainer, dict[int, dict[str, float]]]:
    """Trains a complete run and returns its reported ranks by step."""
    trainer = tiny_trainer(folder, method, *overrides)
    reported = {}
    report = trainer.reporter.report

    def keep(step, values):
        ranks = {tag: value for tag, value in values.items() if tag.startswith("rank/")}
        if ranks:
            reported[step] = ranks
        report(step, values)

    trainer.reporter.report = keep
    trainer.train()
    return trainer, reported


def merged_weights(folder: Path, method: str, trainer: Trainer) -> dict[str, torch.Tensor]:
    config = tiny_config(folder, method)
    built = METHODS.build(config.method, config.training.steps, config.job.seed)
    return built.dense_weights(
        gather_on_main(trainer.stepper.model.named_parameters(), is_main=True)
    )


def drawn_weights(folder: Path) -> dict[str, torch.Tensor]:
    plain = MODELS.build(tiny_config(folder, "full_rank").model)
    return {
        name: plain.initial_value(name, weight.shape, generator_for(42, name))
        for name, weight in plain.named_parameters()
    }


def nearest_of_rank(rank: int, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that a product of factors starts from."""
    nearest = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            weight = (left[:, :rank] * values[:rank] @ right[:rank]).float()
        nearest[name] = weight
    return nearest


def with_values_at_support(
    seed: int, nearest: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same with the plain weight at the positions of a sparse matrix."""
    start = dict(nearest)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            num_per_row = round(0.1 * weight.shape[1])
            generator = generator_for(seed, f"{name.removesuffix('.weight')}.support")
            columns = support(
                tuple(weight.shape), num_per_row, torch.tensor([generator.initial_seed()])
            )
            start[name] = nearest[name].scatter(1, columns, weight.gather(1, columns))
    return start


def expected_spectra(weights, initial) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".weight"): torch.linalg.svdvals((weight - initial[name]).double())
        for name, weight in weights.items()
        if name.endswith("_proj.weight")
    }


def expected_mean(spectra) -> float:
    ranks = []
    for values in spectra.values():
        shares = values / values.sum()
        ranks.append((-(shares * shares.log()).nan_to_num().sum()).exp().item())
    return sum(ranks) / len(ranks)


def assert_spectra_are(measured, expected) -> None:
    assert len(measured) == NUM_LAYERS
    for name, values in measured.items():
        # Roots of a Gram matrix's fp64 eigenvalues: half the digits, relative to the largest.
        bound = 1e-7 * expected[name][0].item()
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-6, atol=bound)


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_measured_ranks_equal_those_of_merged_minus_initial_weights(corpora, method):
    folder = corpora / f"rank-{method}"
    trainer, reported = train(folder, method, *EVERY_10, "--training.steps", "25")
    measured = read_spectra(folder / "run" / "spectra")
    assert list(measured) == list(reported) == [10, 20, 25]
    initial = drawn_weights(folder)
    if method in ("low_rank", "sltrain"):
        nearest = nearest_of_rank(6, initial)
        initial = with_values_at_support(42, nearest, initial) if method == "sltrain" else nearest
    expected = expected_spectra(merged_weights(folder, method, trainer), initial)
    assert_spectra_are(measured[25], expected)
    ranks = reported[25]
    # The roundings above, some 20 values in each entropy.
    assert ranks["rank/effective_mean"] == pytest.approx(expected_mean(expected), rel=1e-4)
    of_q = {name: values for name, values in expected.items() if name.endswith("q_proj")}
    assert ranks["rank/effective/q_proj"] == pytest.approx(expected_mean(of_q), rel=1e-4)
    assert len(ranks) == 2 + 7 + NUM_LAYERS


@pytest.mark.parametrize("method", ["low_rank", "sltrain"])
def test_starting_weights_that_a_method_computes_are_computed_once(corpora, method, monkeypatch):
    asked: list[str] = []
    of_method = type(METHODS.build(tiny_config(corpora, method).method, 1, 0))
    compute = of_method.starting_weight

    def starting_weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        asked.append(name)
        return compute(self, name, weight)

    monkeypatch.setattr(of_method, "starting_weight", starting_weight)
    every_5 = ("--spectrum.interval", "5", "--evaluation.interval", "100")
    folder = corpora / f"rank-once-{method}"
    train(folder, method, *every_5, "--training.steps", "10")
    assert list(read_spectra(folder / "run" / "spectra")) == [5, 10]
    assert len(asked) == len(set(asked)) == NUM_LAYERS


def test_every_layers_rank_and_every_kinds_spectrum_reach_tensorboard(corpora):
    folder = corpora / "rank-tensorboard"
    train(
        folder, "switchlora", *EVERY_10, "--training.steps", "14", "--metrics.tensorboard", "true"
    )
    measured = read_spectra(folder / "run" / "spectra")
    events = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    prefix = "rank/effective_by_layer/"
    shown = {tag for tag in events.Tags()["scalars"] if tag.startswith(prefix)}
    assert shown == {prefix + name for name in measured[14]}
    assert "rank/effective_by_layer/model.layers.1.mlp.down_proj" in shown
    for tag in shown:
        for event in events.Scalars(tag):
            spectrum = measured[event.step][tag.removeprefix(prefix)].double()
            # TensorBoard's scalars are fp32.
            assert event.value == pytest.approx(expected_mean({"": spectrum}), rel=1e-6)
    kinds = {name.rpartition(".")[2] for name in measured[14]}
    assert set(events.Tags()["histograms"]) == {f"rank/spectrum/{kind}" for kind in kinds}
    for kind in kinds:
        points = events.Histograms(f"rank/spectrum/{kind}")
        assert [point.step for point in points] == [10, 14]
        for point in points:
            of_kind = [
                values for name, values in measured[point.step].items() if name.endswith(kind)
            ]
            shares = torch.cat([values / values[0] for values in of_kind])
            histogram = point.histogram_value
            assert (histogram.num, histogram.max) == (len(shares), 1)
            # A sum of fp32 values.
            assert histogram.sum == pytest.approx(shares.sum().item(), rel=1e-5)


def test_plain_lora_stays_within_its_rank_and_the_others_exceed_it(corpora):
    beyond = {}
    for method in ("full_rank", "lora", "switchlora"):
        folder = corpora / f"beyond-{method}"
        train(folder, method, *EVERY_10)
        spectra = read_spectra(folder / "run" / "spectra")[40]
        beyond[method] = [
            (values[6] / values[0]).item() for values in spectra.values() if len(values) > 6
        ]
    assert len(beyond["lora"]) == NUM_LAYERS
    # W + s B A is rounded to fp32: 6e-8 of weights of 0.02, against changes of 1e-2 and more.
    assert max(beyond["lora"]) < 1e-5
    assert min(beyond["switchlora"]) > 1e-3
    assert min(beyond["full_rank"]) > 1e-3


def test_without_the_setting_nothing_is_gathered_or_written(corpora, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("gathered")

    monkeypatch.setattr("switchtitan.spectra.telemetry.gather_on_main", refuse)
    trainer, reported = train(corpora / "rank-off", "switchlora", "--training.steps", "20")
    assert trainer.hooks == []
    assert reported == {}
    assert not (corpora / "rank-off" / "run" / "spectra").exists()


def test_measuring_does_not_change_the_run(corpora):
    tensors = []
    for name, overrides in (("rank-with", EVERY_10), ("rank-without", EVERY_10[2:])):
        trainer, _ = train(corpora / name, "switchlora", *overrides, "--training.steps", "25")
        tensors.append(
            {
                key: tensor.full_tensor()
                for key, tensor in trainer.stepper.model.state_dict().items()
            }
        )
    for key, tensor in tensors[0].items():
        assert torch.equal(tensors[1][key], tensor), key


def test_a_resumed_run_measures_from_step_0_and_drops_later_measurements(corpora):
    _, straight = train(corpora / "rank-straight", "switchlora", *EVERY_10)
    folder = corpora / "rank-resumed"
    stopped = tiny_trainer(folder, "switchlora", *EVERY_10[2:], "--spectrum.interval", "7")
    save = stopped.save
    stopped.save = lambda: save() if stopped.stepper.state.step == 20 else None
    stopped.train()
    assert list(read_spectra(folder / "run" / "spectra")) == [7, 14, 21, 28, 35, 40]
    resumed, reported = train(folder, "switchlora", *EVERY_10)
    assert resumed.stepper.state.step == 40
    assert reported == {step: ranks for step, ranks in straight.items() if step > 20}
    assert list(read_spectra(folder / "run" / "spectra")) == [7, 14, 30, 40]


def safetensors_start(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(8)
    weights = {
        name: weight + 0.01 * torch.randn(weight.shape, generator=generator)
        for name, weight in drawn_weights(folder).items()
    }
    save_file(weights, folder / "start.safetensors")
    return folder / "start.safetensors"


def test_a_warm_start_measures_from_its_weights_also_after_a_resume(corpora):
    start = safetensors_start(corpora / "rank-start")
    folder = corpora / "rank-warm"
    warm = ("--checkpoint.initial_weights", str(start))
    train(folder, "lora", *EVERY_10, *warm, "--training.steps", "20")
    # The key may be omitted on resume: the checkpoint stores the initial weights' path.
    trainer, reported = train(folder, "lora", *EVERY_10)
    expected = expected_spectra(merged_weights(folder, "lora", trainer), load_file(start))
    measured = read_spectra(folder / "run" / "spectra")
    assert list(measured) == [10, 20, 30, 40]
    assert_spectra_are(measured[40], expected)
    assert all(values[6] < 1e-5 * values[0] for values in measured[40].values())
    assert reported[40]["rank/effective_mean"] < 6


@pytest.mark.parametrize(
    ("spoil", "message"), [("change", "have changed"), ("remove", "are missing")]
)
def test_a_resume_without_the_weights_of_its_warm_start_is_refused_before_it_trains(
    corpora, spoil, message
):
    start = safetensors_start(corpora / f"rank-start-{spoil}")
    folder = corpora / f"rank-warm-{spoil}"
    train(folder, "lora", "--checkpoint.initial_weights", str(start), "--training.steps", "20")
    if spoil == "change":
        save_file({name: 2 * weight for name, weight in load_file(start).items()}, start)
    else:
        start.unlink()
    config = tiny_config(folder, "lora", *EVERY_10)
    with pytest.raises(CheckpointError, match=f"start.safetensors {message}; restore them"):
        build_trainer(config, start_world(config.parallelism))
    _, reported = train(folder, "lora")
    assert reported == {}


def test_a_warm_start_from_a_run_measures_from_the_checkpoint_it_read(corpora):
    source, folder = corpora / "rank-source", corpora / "rank-from-run"
    train(source, "full_rank", "--training.steps", "20")
    trainer, _ = train(
        folder,
        "full_rank",
        "--checkpoint.initial_weights",
        str(source / "run"),
        "--training.steps",
        "20",
    )
    train(source, "full_rank")
    origin = source / "run" / "checkpoints" / "step-000000020"
    assert trainer.stepper.state.initial_weights == str(origin.absolute())
    resumed, _ = train(folder, "full_rank", *EVERY_10)
    initial = nn.Module.state_dict(
        tiny_trainer(
            corpora / "rank-again", "full_rank", "--checkpoint.initial_weights", str(origin)
        ).stepper.model
    )
    expected = expected_spectra(
        merged_weights(folder, "full_rank", resumed),
        {name: value.full_tensor() for name, value in initial.items()},
    )
    assert_spectra_are(read_spectra(folder / "run" / "spectra")[40], expected)
