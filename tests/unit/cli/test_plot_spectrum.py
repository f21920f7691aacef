"""`switchtitan plot spectrum`: the numbers, the picture, mistakes."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from support.tiny import tiny_trainer

from switchtitan.distributed.world import stop_world
from switchtitan.spectra.spectra_files import read_spectra
from switchtitan.spectra.spectrum import summarize

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("switchtitan.cli.plot_spectrum")


@pytest.fixture(scope="module")
def runs(corpora: Path) -> dict[str, Path]:
    """Short runs: two of LoRA with different seeds that measured, one of full rank that did not,
    and a wider model."""
    measured = ("--spectrum.interval", "5")
    for name, method, overrides in (
        ("lora-1", "lora", (*measured, "--job.seed", "1")),
        ("lora-2", "lora", (*measured, "--job.seed", "2")),
        ("full", "full_rank", ()),
        ("wider", "full_rank", ("--model.hidden_size", "24")),
    ):
        trainer = tiny_trainer(
            corpora / f"spectrum-{name}",
            method,
            *overrides,
            "--training.steps",
            "15",
            "--evaluation.interval",
            "100",
        )
        trainer.train()
    stop_world()
    return {
        name: corpora / f"spectrum-{name}" / "run" for name in ("lora-1", "lora-2", "full", "wider")
    }


def measured_rank(run: Path, step: int, kind: str = "") -> float:
    spectra = read_spectra(run / "spectra")[step]
    return summarize(
        {name: values for name, values in spectra.items() if name.endswith(kind)}
    ).effective


def test_numbers_equal_the_runs_measurements(
    script: ModuleType, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(
        [
            str(runs["full"]),
            *("--label", f"lora={runs['lora-1']},{runs['lora-2']}"),
            *(
                "--output",
                str(tmp_path / "new/spectra.png"),
                "--json",
                str(tmp_path / "numbers.json"),
            ),
        ]
    )
    assert (tmp_path / "new/spectra.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert list(numbers) == ["run", "lora"]
    lora = numbers["lora"]
    ranks = [measured_rank(runs[name], 15) for name in ("lora-1", "lora-2")]
    # The checkpoint's weights are merged again: roundings of an fp32 product.
    assert lora["effective_rank"]["mean"] == pytest.approx(sum(ranks) / 2, rel=1e-4)
    assert lora["effective_rank"]["low"] == pytest.approx(min(ranks), rel=1e-4)
    assert [run["effective_rank"] for run in lora["runs"]] == pytest.approx(ranks, rel=1e-4)
    assert lora["effective_rank_by_kind"]["up_proj"]["high"] == pytest.approx(
        max(measured_rank(runs[name], 15, "up_proj") for name in ("lora-1", "lora-2")), rel=1e-4
    )
    assert lora["course"]["step"] == [5, 10, 15]
    assert lora["course"]["mean"][0] == pytest.approx(
        sum(measured_rank(runs[name], 5) for name in ("lora-1", "lora-2")) / 2
    )
    assert numbers["run"]["course"]["step"] == []
    assert numbers["run"]["effective_rank"]["mean"] > 6 > lora["effective_rank"]["high"]
    assert len(numbers["run"]["spectrum"]["mean"]) == 20
    printed = capsys.readouterr().out
    full = numbers["run"]["effective_rank"]["mean"]
    assert re.search(rf"^run +1 +15 +{full:.1f} .* 20$", printed, re.MULTILINE)
    assert re.search(
        rf"^lora +2 +15 +{sum(ranks) / 2:.1f} \({min(ranks):.1f}-{max(ranks):.1f}\) .* 20$",
        printed,
        re.MULTILINE,
    )


def test_layers_can_be_chosen(script: ModuleType, runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = [
        str(runs["lora-1"]),
        "--output",
        str(tmp_path / "x.svg"),
        "--json",
        str(tmp_path / "x.json"),
    ]
    script.main([*arguments, "--layers", "q_proj", "*.1.mlp.*"])
    (numbers,) = json.loads((tmp_path / "x.json").read_text()).values()
    assert list(numbers["effective_rank_by_kind"]) == [
        "q_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert len(numbers["runs"][0]["effective_rank_by_layer"]) == 2 + 3


def test_the_course_has_a_panel_only_if_a_run_measured_it(
    script: ModuleType, runs: dict[str, Path]
) -> None:
    for names, num_panels in ((["full"], 2), (["full", "lora-1"], 3)):
        groups = {name: script.average([script.read_run_spectra(runs[name])]) for name in names}
        assert len(script.draw(groups).axes) == num_panels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/run"], "no complete checkpoint at no/such/run: expected"),
        (
            ["{full}", "{wider}"],
            "hold different models ([model] head_dim = 10 and 12; hidden_size = 20 and 24)",
        ),
        (["{full}", "--label", "run={lora-1}"], "two runs have the same label"),
        (
            ["{full}", "--layers", "c_proj"],
            "--layers c_proj: matches no layer; expected one of q_proj, k_proj",
        ),
        (["--label", "{full}"], "expected NAME=RUN[,RUN...]"),
        ([], "expected at least one RUN"),
        (["no/such/run", "--output", "{full}/x.gmp"], "x.gmp: unknown picture format 'gmp'"),
        (["{full}", "--output", "{full}/config.toml/x.png"], "x.png: cannot write the figure"),
        (["{full}", "--output", "{full}/" + 300 * "x" + ".png"], "x.png: cannot write the figure"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(
    script: ModuleType,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    given = [argument.format(**runs) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        script.main(["--output", str(tmp_path / "x.png"), *given])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
