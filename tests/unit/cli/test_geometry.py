"""`switchtitan geometry` on tiny runs: the numbers, what is left out, mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.commands import run
from support.tiny import tiny_trainer
from support.trained import save_run

from switchtitan.cli.geometry import read_options
from switchtitan.distributed.world import stop_world
from switchtitan.geometry import measure
from switchtitan.geometry.measure import PARTS
from switchtitan.hub.dense_checkpoint import read_dense_checkpoint

STEPS = [5, 10, 15]
TOKENS = ("--tokens", "96")


@pytest.fixture(scope="module")
def runs(corpora: Path) -> dict[str, Path]:
    """Runs with three checkpoints, one of another model, one with a single checkpoint, and one
    whose corpus has lost files."""
    every_five = ("--checkpoint.interval", "5", "--checkpoint.keep_latest", "0")
    for name, method, overrides in (
        ("low", "switchlora", ()),
        ("full", "full_rank", ()),
        ("wider", "full_rank", ("--model.hidden_size", "24")),
        ("corpus", "full_rank", ("--data.vocab_size", "268")),
    ):
        folder = corpora / f"geometry-{name}"
        options = (*every_five, "--training.steps", "15", "--evaluation.interval", "100")
        tiny_trainer(folder, method, *options, *overrides).train()
    stop_world()
    save_run(corpora / "geometry-short", "lora", num_steps=3)
    stop_world()
    cache = Path(shutil.copytree(corpora / "corpora", corpora / "geometry-cache"))
    save_run(corpora / "geometry-gone", "lora", "--data.cache_dir", str(cache), num_steps=3)
    stop_world()
    for file in cache.glob("*/validation-*.bin"):
        file.unlink()
    return {
        name: corpora / f"geometry-{name}" / "run"
        for name in ("low", "full", "wider", "corpus", "short", "gone")
    }


@pytest.fixture(scope="module")
def record(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """All parts, of a low-rank run against a full-rank one."""
    picture = tmp_path_factory.mktemp("geometry") / "x.svg"
    options = (*TOKENS, "--json", "-", "--output", picture)
    outcome = run("geometry", runs["low"], "--against", runs["full"], *options)
    assert outcome.status == 0, outcome.errors
    for title in ("Effective rank", "Expected sharpness", "Barriers", "Activations against"):
        assert f"<!-- {title}" in picture.read_text()
    return json.loads(outcome.output)


def dense(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    return read_dense_checkpoint(run_folder / "checkpoints" / f"step-{step:09d}")


def loss_of(run_folder: Path, step: int) -> float:
    checkpoint = run_folder / "checkpoints" / f"step-{step:09d}"
    outcome = run("evaluate", checkpoint, *TOKENS, "--dtype", "float32", "--json", "-")
    return json.loads(outcome.output)["loss"]


def test_spectra_of_weights_and_updates_equal_those_of_an_svd(record, runs):
    (low,) = record["runs"]
    assert (low["method"], low["steps"], low["left_out"]) == ("switchlora", STEPS, {})
    assert [found["step"] for found in low["weights"]] == STEPS
    name = "model.layers.1.mlp.up_proj"
    weights = {step: dense(runs["low"], step)[f"{name}.weight"].double() for step in STEPS}
    for found, update in (
        (low["updates"][0], weights[10] - weights[5]),
        (low["updates"][1], weights[15] - weights[10]),
        (low["updates_since_first"][0], weights[15] - weights[5]),
    ):
        values = torch.linalg.svdvals(update)
        layer = found["layers"][name]
        assert layer["norm"] == pytest.approx(update.norm().item(), rel=1e-5)
        assert layer["stable_rank"] == pytest.approx(
            (values.square().sum() / values[0] ** 2).item(), rel=1e-5
        )
        assert layer["spectral_gap"] == pytest.approx(1 - (values[1] / values[0]).item(), rel=1e-4)
        start = weights[found["from_step"]].norm()
        assert layer["relative_norm"] == pytest.approx((update.norm() / start).item(), rel=1e-5)
    assert len(low["weights"][0]["layers"]) == 2 * 7
    mean = low["weights"][2]["mean"]["norm"]
    norms = [layer["norm"] for layer in low["weights"][2]["layers"].values()]
    assert mean == pytest.approx(sum(norms) / 14)


def test_losses_at_the_ends_equal_those_of_evaluate(record, runs):
    (low,) = record["runs"]
    assert low["tokens"] == 96
    first, second = low["barriers"]
    assert [first["from_step"], first["step"], second["step"]] == STEPS
    # Both are fp32; batches are summed in another order.
    losses = [first["losses"][0], first["losses"][-1], second["losses"][-1]]
    assert losses == pytest.approx([loss_of(runs["low"], step) for step in STEPS], rel=1e-5)
    assert losses[0] > losses[2]  # it learned
    assert low["sharpness"]["loss"] == pytest.approx(losses[2], rel=1e-6)
    to_other = low["barriers_to_other"]
    assert [found["step"] for found in to_other] == STEPS
    assert to_other[2]["losses"][-1] == pytest.approx(loss_of(runs["full"], 15), rel=1e-5)


def test_sharpness_has_random_and_principal_directions(record):
    sharpness = record["runs"][0]["sharpness"]
    assert (sharpness["step"], len(sharpness["random"])) == (15, 5)
    assert sharpness["mean_random"] == pytest.approx(sum(sharpness["random"]) / 5)
    assert len(set(sharpness["random"])) == 5
    assert len(sharpness["principal"]) == 2
    # Three points minus their mean have two directions.
    assert sum(sharpness["principal_shares"]) == pytest.approx(1)


def test_activations_of_a_run_against_itself_are_equal_and_against_another_differ(record, runs):
    (low,) = record["runs"]
    assert [found["step"] for found in low["activations"]] == STEPS
    assert list(low["activations"][0]["blocks"]) == ["model.layers.0", "model.layers.1"]
    assert 0 < low["activations"][2]["mean"]["linear_cka"] < 0.999
    newest = runs["low"] / "checkpoints" / "step-000000015"
    outcome = run(
        *("geometry", runs["low"], "--against", newest),
        *("--parts", "activations", "barriers", *TOKENS, "--points", "1", "--json", "-"),
    )
    assert outcome.status == 0, outcome.errors
    (same,) = json.loads(outcome.output)["runs"]
    (found,) = same["activations"]
    assert found["mean"] == pytest.approx({"linear_cka": 1, "cosine": 1, "relative_l2": 0})
    assert same["barriers_to_other"][0]["height"] == pytest.approx(0, abs=1e-6)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_other_ones(runs):
    def sharpness(seed: int) -> list[float]:
        outcome = run(
            *("geometry", runs["full"], "--parts", "sharpness", "--random", "2", *TOKENS),
            *("--offsets", "0.05", "--seed", seed, "--json", "-"),
        )
        (found,) = json.loads(outcome.output)["runs"]
        return found["sharpness"]["random"]

    assert sharpness(1) == sharpness(1) != sharpness(2)


def test_tables_are_printed_and_what_is_left_out_is_said(runs, tmp_path):
    file = tmp_path / "numbers.json"
    outcome = run(
        *("geometry", runs["short"], runs["full"], *TOKENS, "--points", "1", "--random", "1"),
        *("--layers", "q_proj", "--json", file, "--output", tmp_path / "new" / "x.png"),
    )
    assert outcome.status == 0, outcome.errors
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    short, full = json.loads(file.read_text())["runs"]
    assert short["left_out"].keys() == {
        *("updates", "barriers", "activations", "principal directions")
    }
    assert full["left_out"].keys() == {"activations"}
    assert (len(short["weights"]), short["updates"]) == (1, [])
    assert short["sharpness"]["principal"] == []
    assert "updates left out: " in outcome.output
    assert "has one checkpoint, step 3" in outcome.output
    assert [len(found["layers"]) for found in full["updates"]] == [2, 2]
    mean = full["updates"][1]["mean"]
    (row,) = [
        line
        for line in outcome.output.splitlines()
        if " dW " in line and line.split("dW")[1].split()[0] == "10-15"
    ]
    assert f"{mean['effective_rank']:.1f}" in row.split()
    assert f"{full['sharpness']['mean_random']:.5f}" in outcome.output


def test_parts_and_steps_can_be_chosen(runs):
    outcome = run(*("geometry", runs["low"], "--steps", 5, 15, "--parts", "updates", "--json", "-"))
    (found,) = json.loads(outcome.output)["runs"]
    assert found["weights"] == []
    assert [(one["from_step"], one["step"]) for one in found["updates"]] == [(5, 15)]
    assert not found.keys() & {"sharpness", "barriers", "activations"}


def test_a_model_with_a_tied_head_is_measured(corpora):
    tied = save_run(
        corpora / "geometry-tied", "full_rank", "--model.tied_head", "true", num_steps=2
    )
    outcome = run("geometry", tied, "--parts", "sharpness", "weights", *TOKENS, "--json", "-")
    assert outcome.status == 0, outcome.errors
    (found,) = json.loads(outcome.output)["runs"]
    outcome = run("evaluate", tied, *TOKENS, "--dtype", "float32", "--json", "-")
    loss = json.loads(outcome.output)["loss"]
    assert found["sharpness"]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/run"], "no complete checkpoint at no/such/run: expected"),
        (["{short}", "--parts", "updates"], "has one checkpoint, step 3, and an update is between"),
        (["{short}", "--parts", "barriers"], "--parts barriers: "),
        (["{short}", "--principal", "1"], "--principal 1: "),
        (["{short}", "--principal", "1"], "has less than 3 checkpoints (1); keep more"),
        (["{full}", "--principal", "3"], "has 3 checkpoints, so at most 2 principal directions"),
        (["{full}", "--parts", "activations"], "--parts activations: they are compared with"),
        (
            ["{full}", "--against", "{wider}"],
            "hold different models ([model] head_dim = 10 and 12; hidden_size = 20 and 24)",
        ),
        (["{full}", "--against", "{corpus}"], "were trained on different corpora"),
        (["{full}", "--against", "{short}"], "have no checkpoint of the same step: 5, 10, 15 and"),
        (["{full}", "--against", "{full}"], "is the run itself; choose another run"),
        (["{full}", "--steps", "7"], "has no such checkpoint; it has 5, 10, 15"),
        (["{full}", "--layers", "c_proj"], "--layers c_proj: matches no layer"),
        (["{full}", "--tokens", "15"], "--tokens 15: expected at least one sequence"),
        (["{full}", "--json", "no/such/x.json"], "--json no/such/x.json: no folder"),
        (["{full}", "--json", "{full}"], ": is a folder; give a file, e.g. "),
        (["{full}", "--output", "x.pgn"], "--output x.pgn: unknown picture format 'pgn'; expected"),
        (["{full}", "--output", "{full}"], ": is a folder; give a file, e.g. "),
        (["{full}", "{gone}", *TOKENS], "geometry-cache"),
        (["{full}", "{short}", "--parts", "updates"], "has one checkpoint, step 3"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message_before_anything_is_measured(
    runs, arguments, message, monkeypatch
):
    def no_measurement(*_: object, **__: object) -> None:
        pytest.fail("measured before all mistakes were found")

    monkeypatch.setattr(measure, "spectral_geometry", no_measurement)
    monkeypatch.setattr(measure, "measure_sharpness", no_measurement)
    given = [argument.format(**runs) for argument in arguments]
    run("geometry", *given).check_refused(message)


def test_numbers_are_kept_if_the_picture_cannot_be_written(runs, tmp_path):
    (tmp_path / "file").touch()
    outcome = run(
        *("geometry", runs["short"], "--parts", "weights", "--layers", "q_proj"),
        *("--json", tmp_path / "x.json", "--output", tmp_path / "file" / "x.png"),
    )
    outcome.check_refused("x.png: cannot write the figure")
    assert "effective" in outcome.output
    (found,) = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert len(found["weights"][0]["layers"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["RUN", "--parts", "colour"], "invalid choice: 'colour'"),
        (["RUN", "--offsets", "0"], "0: expected a number above 0"),
        (["RUN", "--parts", "weights", "--tokens", "64"], "--tokens has no effect with --parts"),
        (["RUN", "--parts", "updates", "--against", "B"], "--against has no effect with --parts"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        read_options(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_part(capsys):
    with pytest.raises(SystemExit):
        read_options(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{part}: {what}" in shown for part, what in PARTS.items())
