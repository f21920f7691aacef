"""Check that a checkpoint belongs to the run that resumes from it."""

from collections.abc import Mapping

from switchtitan.config.toml_text import flatten
from switchtitan.errors import CheckpointError

_ABSENT = "(absent)"


def check_same_run(saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Compares two identities, nested mappings of plain values.

    Raises:
        CheckpointError: names every differing key by its dotted path, with both values and the fix.
    """
    before, now = flatten(saved), flatten(current)
    keys = [key for key in {**before, **now} if before.get(key, _ABSENT) != now.get(key, _ABSENT)]
    if not keys:
        return
    differences = "\n".join(
        f"  {key}: saved with {before.get(key, _ABSENT)!r}, now {now.get(key, _ABSENT)!r}"
        for key in keys
    )
    raise CheckpointError(
        f"the checkpoint belongs to another run:\n{differences}\n"
        "set these back to resume that run, or start a new one in another [job] output_dir"
    )
