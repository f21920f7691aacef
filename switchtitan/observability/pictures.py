"""Pictures as files."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically


def write_picture(figure: Figure, file: Path) -> None:
    """Writes the picture in the format that the file's ending names.

    Raises:
        ConfigError: if the ending names no format or the file cannot be written.
    """
    try:
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format=file.suffix.removeprefix(".") or None)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, picture.getvalue())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: the picture cannot be written: {error}") from error
