"""The README.md of an exported model."""

from pathlib import Path

from switchtitan.checkpoint import CheckpointMetadata

# No TOML string that a configuration shows contains the fence at the start of a line.
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [switchtitan]
---

# A language model trained with switchtitan

{files}

| | |
|---|---|
{rows}

The run did not tune it to follow instructions. Its license is for its owner to choose.

## Configuration of the run

~~~~~~~~toml
{config}
~~~~~~~~
"""


def write_model_card(metadata: CheckpointMetadata, folder: Path, command: str, files: str) -> None:
    """Writes what the model is, how it was trained, its losses and its configuration.

    Args:
        command: that exported it.
        files: a sentence on what the folder holds and how to load it.
    """
    state = metadata.train_state
    facts = {
        **{key: metadata.identity_value(key, "name") for key in ("method", "model", "corpus")},
        "steps": metadata.step,
        "tokens seen": state.get("tokens_seen"),
        "started from": state.get("initial_weights") or "random weights",
        "validation loss before training": state.get("first_validation_loss"),
        "last validation loss": state.get("last_validation_loss"),
        "compute dtype": state.get("compute_dtype"),
        "trained with": ", ".join(f"{key} {value}" for key, value in metadata.versions.items()),
        "exported by": f"`{command}`",
    }
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value is not None]
    card = _CARD.format(files=files, rows="\n".join(rows), config=metadata.config.strip())
    (folder / "README.md").write_text(card, encoding="utf-8")


def _cell(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
