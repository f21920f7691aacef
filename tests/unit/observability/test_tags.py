"""Tags of metrics in TensorBoard: the first cards tell a run's state; old runs are still read."""

from torch.utils.tensorboard import SummaryWriter

from switchtitan.observability.curves import read_curves
from switchtitan.observability.event_files import TensorBoardWriter
from switchtitan.observability.metrics import FAILED_SAVES, TENSORBOARD_FOLDER
from switchtitan.observability.tags import metric_of, tag_of

METRICS = [
    FAILED_SAVES,
    "communication/all_gather_mib",
    "data/tokens_seen",
    "loss/test",
    "loss/train",
    "loss/validation",
    "memory/peak_gib",
    "optimizer/grad_norm",
    "optimizer/lr",
    "optimizer/other_lr",
    "perplexity/validation",
    "switch/vectors_switched",
    "throughput/mfu",
    "throughput/tokens_per_s",
    "time/forward_ms",
]
FIRST = ["loss/train", "loss/validation", "optimizer/lr", "throughput/tokens_per_s"]


def shown_first(tags: dict[str, str]) -> list[str]:
    """The metrics of the first four cards: TensorBoard sorts groups, then tags, by name."""
    return sorted(tags, key=lambda metric: tags[metric].partition("/"))[:4]


def test_the_first_cards_are_loss_validation_loss_learning_rate_and_speed():
    assert shown_first({metric: tag_of(metric) for metric in METRICS}) == FIRST
    # Shows that the check above can fail: tags were once the metrics' names.
    assert shown_first({metric: metric for metric in METRICS}) != FIRST


def test_every_tag_names_its_metric():
    assert [metric_of(tag_of(metric)) for metric in METRICS] == METRICS
    assert [metric_of(metric) for metric in METRICS] == METRICS
    assert len({tag_of(metric) for metric in METRICS}) == len(METRICS)


def test_a_run_that_an_earlier_version_began_has_one_curve(tmp_path):
    folder = tmp_path / TENSORBOARD_FOLDER
    with SummaryWriter(str(folder)) as old:
        for step in (1, 2, 3):
            old.add_scalar("loss/train", 10 - step, step)
    resumed = TensorBoardWriter(folder, start_step=3)
    for step in (4, 5):
        resumed.write(step, {"loss/train": 10 - step})
    resumed.close()
    assert read_curves(tmp_path) == {"loss/train": ([1, 2, 3, 4, 5], [9, 8, 7, 6, 5])}
