"""The environment that files of measurements and checkpoints record."""

import re

import pytest
import torch

from switchtitan.observability.environment import describe_environment, versions


@pytest.mark.parametrize("build", ["2.13.0", "2.13.0+cu130", "2.13.0+local"])
def test_versions_have_no_name_of_a_build(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", build)
    assert versions()["torch"] == "2.13.0"
    assert describe_environment()["torch"] == "2.13.0"


def test_a_version_before_a_release_stays_recognizable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0.dev20261120+cu130")
    assert versions()["torch"] == "2.14.0.dev20261120"


def test_versions_are_those_of_the_packages() -> None:
    found = versions()
    assert torch.__version__.startswith(found["torch"])
    assert all(re.fullmatch(r"[\w.]+", version) for version in found.values())
