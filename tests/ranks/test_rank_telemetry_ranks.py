"""Two ranks measure the same as one, and all ranks receive the result."""

import json

import pytest
from support.ranks import run_on_ranks
from support.tiny import tiny_trainer

from switchtitan.distributed.world import stop_world
from switchtitan.methods.lowrank import LowRankMethod
from switchtitan.spectra.spectra_files import read_spectra


def record_run(rank, folder, num_ranks):
    """Trains and measures; only the main rank merges weights."""
    with pytest.MonkeyPatch.context() as patched:
        merged = []
        merge = LowRankMethod.dense_weights

        def count_and_merge(method, tensors):
            merged.append(len(tensors))
            return merge(method, tensors)

        patched.setattr(LowRankMethod, "dense_weights", count_and_merge)
        train_and_record(rank, folder, num_ranks)
    assert len(merged) == (3 if rank == 0 else 0)


def train_and_record(rank, folder, num_ranks):
    trainer = tiny_trainer(
        folder,
        "switchlora",
        *("--spectrum.interval", "5", "--training.steps", "13", "--evaluation.interval", "100"),
        num_ranks=num_ranks,
    )
    reported = {}
    trainer.reporter.report = lambda step, values: reported.setdefault(step, {}).update(values)
    trainer.train()
    ranks = {step: values for step, values in reported.items() if "rank/effective_mean" in values}
    kept = {
        step: {tag: v for tag, v in values.items() if tag.startswith("rank/")}
        for step, values in ranks.items()
    }
    (folder / f"reported-{rank}.json").write_text(json.dumps(kept))


def test_two_ranks_measure_the_same_as_one(corpora):
    reported = {}
    for num_ranks in (1, 2):
        folder = corpora / f"ranks-of-{num_ranks}"
        if num_ranks == 1:
            record_run(0, folder, 1)
            stop_world()
        else:
            run_on_ranks(num_ranks, record_run, folder, num_ranks)
        reported[num_ranks] = [
            json.loads((folder / f"reported-{rank}.json").read_text()) for rank in range(num_ranks)
        ]
    (one,) = reported[1]
    first, second = reported[2]
    assert first == second
    assert list(one) == list(first) == ["5", "10", "13"]
    for step, ranks in one.items():
        assert first[step].keys() == ranks.keys()
        for tag, value in ranks.items():
            # Sums over ranks have another order; Adam amplifies that for gradients near zero. A
            # single layer's rank and singular values differ more than means.
            bound = 1e-2 if tag.startswith("rank/effective_by_layer/") else 1e-3
            assert first[step][tag] == pytest.approx(value, rel=bound), (step, tag)
    spectra = {n: read_spectra(corpora / f"ranks-of-{n}" / "run" / "spectra") for n in (1, 2)}
    assert list(spectra[1]) == list(spectra[2]) == [5, 10, 13]
    for name, values in spectra[1][13].items():
        assert spectra[2][13][name].tolist() == pytest.approx(
            values.tolist(), rel=1e-2, abs=1e-3 * values[0].item()
        )
