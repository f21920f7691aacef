"""Imports go down only: a module imports from a lower level or from its own package."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import switchtitan

ROOT = Path(switchtitan.__file__).parent
LEVELS = (
    ("train",),
    ("launch",),
    ("comparison",),
    ("benchmark",),
    ("build",),
    ("rank_telemetry", "run_spectra"),
    ("weight_change",),
    ("trainer", "initial_weights", "run_description", "run_output", "run_tensors"),
    ("evaluate",),
    ("job_config", "train_state"),
    ("job_checks",),
    ("job_sections",),
    ("methods", "checkpoint", "hub", "observability"),
    ("distributed", "models", "data", "optim"),
    ("registry", "contracts"),
    ("config",),
    ("atomic_file", "garbage"),
)
"""From the top down; names are packages and modules of switchtitan."""
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py")


def part_of(file: Path) -> str:
    """The package or module right below switchtitan that a file belongs to."""
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imported_parts(source: str) -> Iterator[str]:
    """The packages and modules of switchtitan that a module imports, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "switchtitan" else [base]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == "switchtitan" and parts and parts[0] != "__version__":
                yield parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    part = part_of(file)
    assert part in LEVEL_OF, f"give {part} a level"
    for imported in imported_parts(file.read_text()):
        is_below = LEVEL_OF[imported] > LEVEL_OF[part]
        assert imported == part or is_below, f"{part} may not import {imported}"


def test_imports_are_found_in_every_form() -> None:
    source = (
        "import switchtitan.data.shards\n"
        "from switchtitan import registry, build\n"
        "def f():\n    from switchtitan.models.llama import x\n"
        "import torch\n"
    )
    assert set(imported_parts(source)) == {"data", "registry", "build", "models"}
