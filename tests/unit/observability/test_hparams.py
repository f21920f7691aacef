"""The configuration on TensorBoard's HParams page, as its own plugin reads it."""

import json
import logging
from pathlib import Path

import pytest
from tensorboard import default, program
from tensorboard.backend import application
from werkzeug.test import Client

from switchtitan.observability import MetricsConfig, Reporter

KEYS = {"optimizer.lr": 0.5, "method.name": "switchlora", "compile.loss": True, "job.seed": 3}


def finished_run(folder: Path, hparams: dict, loss: float, is_complete: bool = True) -> None:
    config = MetricsConfig(progress_bar=False)
    reporter = Reporter(config, folder, num_steps=2, is_main=True, hparams=hparams)
    reporter.report(1, {"loss/train": 9.0, "loss/validation": 2 * loss})
    reporter.report(2, {"loss/validation": loss, "perplexity/validation": 7.0})
    if is_complete:
        reporter.summary({"step": 2})
    reporter.close()


@pytest.fixture
def ask():
    """Returns what the plugin answers to the page, without a server."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)

    def ask(logdir: Path, route: str, request: dict) -> dict:
        board = program.TensorBoard(default.get_plugins())
        board.configure(argv=["tensorboard", "--logdir", str(logdir), "--load_fast", "false"])
        ingester = board._make_data_ingester()
        ingester.start()
        plugins = board.plugin_loaders
        app = application.TensorBoardWSGIApp(
            board.flags,
            plugins,
            ingester.data_provider,
            board.assets_zip_provider,
            ingester.deprecated_multiplexer,
        )
        client = Client(app)
        for _ in range(50):
            response = client.post(
                f"/data/plugin/hparams/{route}",
                data=json.dumps(request),
                content_type="application/json",
            )
            answer = json.loads(response.get_data())
            if answer.get("hparamInfos") or answer.get("sessionGroups"):
                return answer
            ingester._multiplexer.Reload()
        return answer

    return ask


def test_runs_are_compared_by_all_their_keys_and_final_metrics(tmp_path, ask):
    finished_run(tmp_path / "a", KEYS, 3.0)
    other = {"optimizer.lr": 0.25, "method.name": "full_rank", "method.other": 8}
    finished_run(tmp_path / "b", other, 4.0, is_complete=False)
    experiment = ask(tmp_path, "experiment", {"includeMetrics": True})
    differs = {info["name"]: info.get("differs", False) for info in experiment["hparamInfos"]}
    assert differs.keys() == KEYS.keys() | other.keys()
    assert differs["optimizer.lr"]
    assert differs["method.name"]
    assert not differs["job.seed"]
    tags = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert tags[:2] == ["basics/loss_train", "basics/loss_validation"]
    assert "perplexity/validation" in tags
    # In the same folder as the scalars: `SummaryWriter.add_hparams` would make another.
    assert [folder.name for folder in (tmp_path / "a").iterdir() if folder.is_dir()] == [
        "tensorboard"
    ]
    assert not [file for file in (tmp_path / "a" / "tensorboard").iterdir() if file.is_dir()]


def final(group: dict, tag: str) -> float:
    (value,) = [entry["value"] for entry in group["metricValues"] if entry["name"]["tag"] == tag]
    return value


def test_final_metrics_and_the_end_of_each_run_are_shown(tmp_path, ask):
    finished_run(tmp_path / "a", KEYS, 3.0)
    finished_run(tmp_path / "b", KEYS | {"optimizer.lr": 0.25}, 4.0, is_complete=False)
    request = {
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"metric": {"tag": "basics/loss_validation"}}, {"hparam": "optimizer.lr"}],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = ask(tmp_path, "session_groups", request)["sessionGroups"]
    found = {
        group["sessions"][0]["name"]: (
            group["hparams"]["optimizer.lr"],
            final(group, "basics/loss_validation"),
            group["sessions"][0]["status"],
        )
        for group in groups
    }
    assert found == {
        "a/tensorboard": (0.5, 3.0, "STATUS_SUCCESS"),
        "b/tensorboard": (0.25, 4.0, "STATUS_FAILURE"),
    }
