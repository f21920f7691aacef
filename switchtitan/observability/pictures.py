"""Figures saved as files."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically


def write_picture(figure: Figure, file: Path) -> None:
    """Saves a figure in the format of the file's extension.

    Raises:
        ConfigError: if the extension is unknown or the file cannot be written.
    """
    try:
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format=file.suffix.removeprefix(".") or None)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, picture.getvalue())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: cannot write the figure: {error}") from error
