"""What the parts of a save take is measured on a file of its own."""

from pathlib import Path

from switchtitan.benchmark.save_parts import time_parts


def test_each_part_of_a_save_is_timed_and_the_file_is_deleted(tmp_path: Path):
    parts = time_parts(tmp_path / "file", (1 << 22) + 3)
    assert list(parts) == ["checksum", "write", "flush to disk", "read back"]
    assert min(parts.values()) > 0
    assert list(tmp_path.iterdir()) == []
