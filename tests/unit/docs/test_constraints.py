"""constraints.txt pins every dependency within the ranges of pyproject.toml, for any registry."""

from pathlib import Path

import tomli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


def test_versions_come_from_no_certain_registry_and_no_certain_build() -> None:
    for line in LINES:
        assert not any(word in line for word in ("://", "@", "--", "+"))


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = {canonicalize_name(entry.name): entry for entry in map(Requirement, LINES)}
    assert len(pinned) == len(LINES)
    for given in map(Requirement, RANGES):
        (first, *_) = pinned[canonicalize_name(given.name)].specifier
        assert given.specifier.contains(first.version), given.name


def test_the_packages_of_the_site_are_in_dev_so_that_ci_builds_it() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras["docs"]) <= set(extras["dev"])


def test_dependencies_have_ranges() -> None:
    for given in map(Requirement, RANGES):
        operators = {part.operator for part in given.specifier}
        assert operators <= {">=", "<"}, given.name
        assert given.url is None
