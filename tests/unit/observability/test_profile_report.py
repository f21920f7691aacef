"""The report of traces: tables, pictures and files."""

import json

import pytest

from switchtitan.observability.profile_report import as_png, pictures, tables, write_summary
from switchtitan.observability.profile_summary import (
    OperationTime,
    ProfileSummary,
    RegionTime,
)


def summary(rank: int, is_on_gpu: bool = False) -> ProfileSummary:
    host_ms = {"step": 1.0, "forward": 10.0, "update": 4.0, "switch": 5.0 + rank, "save": 70.0}
    return ProfileSummary(
        rank=rank,
        num_steps=3,
        step_ms=20.0 + rank,
        regions={
            name: RegionTime(3, ms, ms / 2 if is_on_gpu else 0.0) for name, ms in host_ms.items()
        },
        operations=[
            OperationTime("aten::mm<a|b>", 6, 12.0, 0.75),
            OperationTime("x" * 99, 1, 4, 0.25),
        ],
        memory_mib=[(0.0, 1.0), (5.0, 3.0)],
    )


def test_the_table_has_a_column_for_each_rank_and_the_share_of_the_switch():
    titled = tables([summary(0), summary(2)])
    lines = titled["Time per region"].splitlines()
    assert "| region | calls | rank 0 | rank 2 | share |" in lines
    assert "| switch | 3 | 5.000 | 7.000 | 25.0% |" in lines
    assert "| other | 3 | 1.000 | 1.000 | 5.0% |" in lines
    assert "| save | 3 | 70.000 | 70.000 |  |" in lines
    assert "| step | 3 | 20.000 | 22.000 | |" in lines
    assert "The switch takes 25.0% of the step." in lines
    assert r"| `aten::mm<a\|b>` | 6 | 12.000 | 75.0% |" in titled["Operations"]
    # Every row of a table has as many cells as its header.
    widths = {line.replace(r"\|", "").count("|") for line in titled["Operations"].splitlines()[2:]}
    assert widths == {5}


def test_a_gpu_has_a_table_of_the_devices_time():
    on_device = tables([summary(0, is_on_gpu=True)])["Time per region on the GPU"]
    assert "| forward | 3 | 5.000 | 50.0% |" in on_device
    assert "Time per region on the GPU" not in tables([summary(0)])


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_pictures_are_png_of_the_stated_size(num_ranks):
    figures = pictures([summary(rank) for rank in range(num_ranks)])
    assert list(figures) == ["regions", "operations", "memory"]
    for figure in figures.values():
        data, width, height = as_png(figure)
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == width
        assert int.from_bytes(data[20:24], "big") == height


def test_files_hold_all_ranks(tmp_path):
    write_summary(tmp_path, [summary(0), summary(1)])
    assert (
        (tmp_path / "profile_summary.md").read_text().startswith("# Profile\n\n## Time per region")
    )
    saved = json.loads((tmp_path / "profile_summary.json").read_text())
    assert [entry["rank"] for entry in saved] == [0, 1]
    assert saved[1]["regions"]["switch"]["host_ms"] == 6
    assert saved[0]["operations"][0]["self_ms"] == 12
