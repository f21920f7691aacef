"""A default that changes makes earlier runs of a comparison count as runs with the old default."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined, to_jsonable_python

from switchtitan.comparison.results import DEFAULTS_VERSION
from switchtitan.config.section import Section
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.optim import OPTIMIZERS

FILE = Path(__file__).with_name("defaults.json")
REGISTRIES = {"method": METHODS, "model": MODELS, "optimizer": OPTIMIZERS}


def sections() -> Iterator[type[Section]]:
    for name, field in JobConfig.model_fields.items():
        if name in REGISTRIES:
            yield from (REGISTRIES[name][key].config_type for key in REGISTRIES[name])
        else:
            assert isinstance(field.annotation, type)
            yield field.annotation


def current_defaults() -> dict[str, Any]:
    return {
        f"{section.__name__}.{key}": to_jsonable_python(default)
        for section in sections()
        for key, field in section.model_fields.items()
        if (default := field.get_default(call_default_factory=True)) is not PydanticUndefined
    }


def changed(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """The keys of both whose defaults differ. Keys may be added and removed."""
    return [key for key, value in saved.items() if key in current and current[key] != value]


def test_defaults_have_not_changed_since_their_version() -> None:
    saved = json.loads(FILE.read_text())
    assert saved["version"] == DEFAULTS_VERSION, "write the defaults again"
    assert changed(saved["defaults"], current_defaults()) == [], (
        "increase DEFAULTS_VERSION, and write the defaults again: "
        f"PYTHONPATH=tests python {Path(__file__).name}"
    )


@pytest.mark.parametrize("key", ["AdamWConfig.betas", "SwitchLoraConfig.interval"])
def test_a_changed_default_is_found_and_a_new_key_is_none(key: str) -> None:
    current = current_defaults()
    assert key in current
    assert changed(current, current | {key: "another"}) == [key]
    assert changed({name: of for name, of in current.items() if name != key}, current) == []


if __name__ == "__main__":
    contents = {"version": DEFAULTS_VERSION, "defaults": dict(sorted(current_defaults().items()))}
    FILE.write_text(json.dumps(contents, indent=1) + "\n")
