"""Event files: one point per step, whatever ended the run before; and what a reporter writes."""

import pytest

from switchtitan.observability import TENSORBOARD_FOLDER
from switchtitan.observability.config import MetricsConfig
from switchtitan.observability.reporter import Reporter
from switchtitan.observability.tensorboard import TensorBoardWriter, read_curves


def write_steps(folder, steps, start_step=0, metric="loss/train"):
    writer = TensorBoardWriter(folder / TENSORBOARD_FOLDER, start_step)
    for step in steps:
        writer.write(step, {metric: 1 / step})


@pytest.mark.parametrize(
    ("start_step", "steps", "expected"),
    [(3, (4, 5, 6), [1, 2, 3, 4, 5, 6]), (0, (1, 2), [1, 2]), (5, (6,), [1, 2, 3, 4, 5, 6])],
)
def test_a_resumed_run_and_one_that_starts_over_have_one_point_per_step(
    tmp_path, start_step, steps, expected
):
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, steps, start_step)
    assert read_curves(tmp_path)["loss/train"][0] == expected


def test_a_run_that_resumes_while_nothing_can_be_written_begins_when_that_works(tmp_path, caplog):
    write_steps(tmp_path, range(1, 6))
    folder = tmp_path / TENSORBOARD_FOLDER
    away = folder.rename(tmp_path / "away")
    folder.touch()
    writer = TensorBoardWriter(folder, 3)
    writer.write(4, {"loss/train": 0.5})
    folder.unlink()
    away.rename(folder)
    writer.write(5, {"loss/train": 0.25})
    expected = [1, 2, 3, 5], pytest.approx([1, 1 / 2, 1 / 3, 0.25])
    assert read_curves(tmp_path)["loss/train"] == expected
    assert caplog.text.count("lacks points until that succeeds") == 1


@pytest.mark.parametrize(
    ("damage", "complete"),
    [(lambda data: data[:-5], 4), (lambda data: data + bytes(4096), 5)],
    ids=["incomplete record", "zeros after a power failure"],
)
def test_points_before_and_after_a_crash_in_the_middle_of_a_record_are_read(
    tmp_path, damage, complete
):
    write_steps(tmp_path, range(1, 6))
    (file,) = (tmp_path / TENSORBOARD_FOLDER).iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert read_curves(tmp_path)["loss/train"][0] == list(range(1, complete + 1))
    write_steps(tmp_path, range(4, 8), start_step=3)
    steps, values = read_curves(tmp_path)["loss/train"]
    assert steps == list(range(1, 8))
    assert values == pytest.approx([1 / step for step in steps])


def reporter_of(folder, config=None, **arguments):
    arguments = {"num_steps": 100, "is_main": True} | arguments
    return Reporter(config or MetricsConfig(), folder, **arguments)


def test_scalars_and_description_of_a_run_are_in_its_event_file(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = reporter_of(tmp_path, description='[model]\nname = "llama"')
    for step in (1, 10):
        reporter.advance(step)
        reporter.report(step, {"loss/train": step / 2, "switch/vectors_switched": 3.0})
    reporter.summary({"step": 10})
    reporter.close()
    assert read_curves(tmp_path) == {
        "loss/train": ([1, 10], [0.5, 5.0]),
        "switch/vectors_switched": ([1, 10], [3.0, 3.0]),
    }
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    (text,) = events.Tensors("configuration/text_summary")
    assert text.tensor_proto.string_val[0].decode() == '    [model]\n    name = "llama"'
    # There is no progress bar without a terminal.
    assert "\r" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("is_main", "config"), [(False, MetricsConfig()), (True, MetricsConfig(tensorboard=False))]
)
def test_other_ranks_and_disabled_tensorboard_write_nothing(tmp_path, is_main, config):
    reporter = reporter_of(tmp_path, config, is_main=is_main, description="x")
    reporter.report(1, {"loss/train": 1.0})
    reporter.close()
    assert list(tmp_path.iterdir()) == []


def test_reports_are_due_each_interval_and_at_both_ends(tmp_path):
    config = MetricsConfig(interval=10)
    reporter = reporter_of(tmp_path, config, num_steps=25, start_step=3, is_main=False)
    assert [step for step in range(4, 26) if reporter.is_due(step)] == [4, 10, 20, 25]
