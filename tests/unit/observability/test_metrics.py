import logging
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from switchtitan.observability import MetricsConfig, Reporter


def read_scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def run(output_dir, steps, **arguments) -> None:
    reporter = Reporter(MetricsConfig(), output_dir, num_steps=100, is_main=True, **arguments)
    for step in steps:
        reporter.advance(step)
        reporter.report(step, {"loss/train": step / 2, "switch/vectors_switched": 3.0})
    reporter.close()


def test_all_values_are_written_to_tensorboard_by_tag(tmp_path):
    run(tmp_path, [1, 10])
    assert read_scalars(tmp_path / "tensorboard") == {
        "basics/loss_train": [(1, 0.5), (10, 5.0)],
        "switch/vectors_switched": [(1, 3.0), (10, 3.0)],
    }


def test_histograms_are_written_only_to_tensorboard(tmp_path, caplog):
    values = torch.tensor([[0.0, 0.25, 1.0], [1e-7, 0.5, 0.5]])
    reporter = Reporter(MetricsConfig(), tmp_path, num_steps=100, is_main=True)
    with caplog.at_level(logging.INFO, "switchtitan"):
        for step in (4, 8):
            reporter.report_histograms(step, {"rank/spectrum/q_proj": values})
    reporter.close()
    assert caplog.text == ""
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert events.Tags()["scalars"] == []
    first, second = events.Histograms("rank/spectrum/q_proj")
    assert (first.step, second.step) == (4, 8)
    histogram = second.histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (6, 0, 1)
    assert histogram.sum == pytest.approx(values.double().sum().item())
    assert sum(histogram.bucket) == 6


def test_resumed_run_has_one_point_per_step(tmp_path):
    run(tmp_path, [1, 10, 20, 30, 40])
    run(tmp_path, [30, 40, 50], start_step=20)
    steps = [step for step, _ in read_scalars(tmp_path / "tensorboard")["basics/loss_train"]]
    assert steps == [1, 10, 20, 30, 40, 50]


def test_run_that_starts_over_has_one_point_per_step(tmp_path):
    run(tmp_path, [1, 10, 20])
    run(tmp_path, [1, 10])
    assert [step for step, _ in read_scalars(tmp_path / "tensorboard")["basics/loss_train"]] == [
        1,
        10,
    ]


def test_description_is_shown_verbatim(tmp_path):
    run(tmp_path, [1], description='[model]\nname = "llama"')
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("configuration/text_summary")
    assert text.tensor_proto.string_val[0].decode() == '    [model]\n    name = "llama"'


@pytest.mark.parametrize(
    ("is_main", "config"), [(False, MetricsConfig()), (True, MetricsConfig(tensorboard=False))]
)
def test_other_ranks_and_disabled_tensorboard_write_nothing(tmp_path, is_main, config):
    reporter = Reporter(config, tmp_path, num_steps=3, is_main=is_main, description="x")
    reporter.report(1, {"loss/train": 1.0})
    reporter.report_histograms(1, {"rank/spectrum/q_proj": torch.ones(3)})
    reporter.close()
    assert list(tmp_path.iterdir()) == []


def test_summary_of_a_resumed_run_starts_at_its_first_validation(tmp_path, caplog):
    first = {"loss/validation": 6.0, "perplexity/validation": math.exp(6.0)}
    reporter = Reporter(
        MetricsConfig(), tmp_path, num_steps=40, start_step=20, is_main=True, first_validation=first
    )
    reporter.report(40, {"loss/validation": 3.0, "perplexity/validation": math.exp(3.0)})
    with caplog.at_level(logging.INFO, "switchtitan"):
        reporter.summary({"throughput/tokens_per_s": 12345.0, "throughput/wall_time_s": 187.0})
    reporter.close()
    assert "6.0000 -> 3.0000" in caplog.text
    assert "12.3k since step 20" in caplog.text
    assert "3m07s since step 20" in caplog.text


def test_a_single_validation_is_shown_without_an_arrow(tmp_path, caplog):
    reporter = Reporter(MetricsConfig(), tmp_path, num_steps=40, is_main=True)
    reporter.report(40, {"loss/validation": 3.0, "perplexity/validation": math.exp(3.0)})
    with caplog.at_level(logging.INFO, "switchtitan"):
        caplog.clear()
        reporter.summary({})
    reporter.close()
    assert "validation loss  3.0000\nperplexity       20.09" in "\n".join(
        record.getMessage() for record in caplog.records
    )


def test_other_ranks_print_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "switchtitan"):
        reporter = Reporter(MetricsConfig(), tmp_path, num_steps=3, is_main=False)
        reporter.report(1, {"loss/train": 1.0})
        reporter.summary({})
    assert caplog.text == ""


def test_reports_are_due_each_interval_and_at_both_ends(tmp_path):
    reporter = Reporter(
        MetricsConfig(interval=10), tmp_path, num_steps=25, start_step=3, is_main=False
    )
    assert [step for step in range(4, 26) if reporter.is_due(step)] == [4, 10, 20, 25]


def test_no_progress_bar_without_a_terminal(tmp_path, capsys):
    run(tmp_path, range(1, 101))
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\r" not in captured.out


def test_summary_shows_results_and_paths(tmp_path, caplog):
    reporter = Reporter(MetricsConfig(), tmp_path, num_steps=40, is_main=True)
    for step, loss in ((0, 6.0), (20, 4.0), (40, 3.0)):
        reporter.report(step, {"loss/validation": loss, "perplexity/validation": math.exp(loss)})
    with caplog.at_level(logging.INFO, "switchtitan"):
        caplog.clear()
        reporter.summary(
            {
                "throughput/tokens_per_s": 12345.0,
                "throughput/wall_time_s": 187.0,
                "loss/test": 3.25,
            },
            checkpoint=tmp_path / "step",
            trace=tmp_path / "trace.json",
        )
    reporter.close()
    lines = [record.getMessage() for record in caplog.records]
    text = "\n".join(lines)
    assert "validation loss  6.0000 -> 3.0000" in text
    assert "403.43 -> 20.09" in text
    assert "test loss        3.2500" in text
    assert "12.3k" in text
    assert "3m07s" in text
    assert str(tmp_path / "step") in text
    assert str(tmp_path / "trace.json") in text
    assert f"tensorboard --host localhost --logdir {tmp_path / 'tensorboard'}" in text
