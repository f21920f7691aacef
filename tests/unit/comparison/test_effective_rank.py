"""The effective rank of a run is computed from its last checkpoint once, and kept."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.trained import save_run

from switchtitan.comparison.effective_rank import EFFECTIVE_RANK_FILE, effective_rank
from switchtitan.comparison.plan import Run
from switchtitan.comparison.results import RunResult
from switchtitan.distributed.world import stop_world
from switchtitan.spectra.weight_change import checkpoint_spectra

CHECKPOINT = "step-000000007"


@pytest.fixture(scope="module")
def folder(corpora: Path) -> Path:
    folder = save_run(corpora / "effective-rank", "lora")
    stop_world()
    return folder


@pytest.fixture
def result(folder: Path, tmp_path: Path) -> RunResult:
    own = Path(shutil.copytree(folder, tmp_path / "run"))
    return RunResult(Run("lora", (), 1, own, ()), 3.0, 3.0, {"step": 7}, "digest")


def test_it_is_the_entropy_of_the_singular_values(result):
    shares = [
        values / values.sum()
        for values in checkpoint_spectra(result.run.folder / "checkpoints" / CHECKPOINT).values()
    ]
    ranks = [torch.special.entr(of.double()).sum().exp().item() for of in shares]
    assert effective_rank(result) == pytest.approx(sum(ranks) / len(ranks), rel=1e-5)


def test_it_survives_the_checkpoint(result):
    computed = effective_rank(result)
    shutil.rmtree(result.run.folder / "checkpoints")
    assert effective_rank(result) == computed
    # Negative control: what is kept of another step, or damaged, is not used.
    file = result.run.folder / EFFECTIVE_RANK_FILE
    for contents in (json.dumps({"step": 6, "effective_rank": computed}), "", "[]"):
        file.write_text(contents)
        assert effective_rank(result) is None


def test_a_diverged_run_and_one_without_folder_have_what_is_known(result):
    assert effective_rank(replace(result, test_loss=float("inf"))) is None
    elsewhere = replace(result, has_folder=False)
    assert effective_rank(elsewhere) is None
    assert effective_rank(replace(elsewhere, figures={"effective_rank": 5.5})) == 5.5
