"""Names of metrics in TensorBoard.

TensorBoard sorts groups of cards, and cards in a group, by name. The metrics that tell a run's
state are in the first group, and in this order.
"""

from switchtitan.regions import OUTSIDE_STEP, STEP

FIRST_GROUP = "basics"
"""Sorts before all other groups."""

_FIRST_CARDS = {
    "loss/train": f"{FIRST_GROUP}/loss_train",
    "loss/validation": f"{FIRST_GROUP}/loss_validation",
    "optimizer/lr": f"{FIRST_GROUP}/lr",
    "throughput/tokens_per_s": f"{FIRST_GROUP}/tokens_per_s",
}
_METRICS = {tag: metric for metric, tag in _FIRST_CARDS.items()}


def tag_of(metric: str) -> str:
    """Returns the tag of a metric in TensorBoard, e.g. "basics/loss_train" of "loss/train"."""
    return _FIRST_CARDS.get(metric, metric)


def metric_of(tag: str) -> str:
    """Returns the metric of a tag; in event files of earlier versions that is the tag itself."""
    return _METRICS.get(tag, tag)


CHARTS = {
    "Loss": {"training and validation": [tag_of("loss/train"), tag_of("loss/validation")]},
    "Time": {"milliseconds of a step by region": [f"time/(?!{'|'.join((STEP, *OUTSIDE_STEP))}).*"]},
    "Gradient": {"norm": ["optimizer/grad_norm"]},
}
"""The layout of TensorBoard's page "Custom scalars": category -> chart -> patterns of tags."""
