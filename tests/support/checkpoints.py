"""Checkpoints with other metadata, as another version or run would have written them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def rewrite_metadata(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Applies `change` to the contents of `metadata.json`, and updates its checksum.

    Formats before 3 have no checksum.
    """
    file = checkpoint / "metadata.json"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    checksum = checkpoint / "metadata.json.sha256"
    if metadata["format_version"] < 3:
        checksum.unlink(missing_ok=True)
    else:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        checksum.write_text(f"{digest}  metadata.json\n")
