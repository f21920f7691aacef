"""Figures saved as files."""

import io
import os
from pathlib import Path

from matplotlib.figure import Figure

from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically


def check_picture_option(file: Path | None) -> None:
    """Checks that `--output FILE` names a picture's format, before hours of measuring.

    Raises:
        ConfigError: if its extension is unknown, or it is a folder.
    """
    if file is None:
        return
    if os.path.isdir(file):  # not Path.is_dir, which raises for a name that is too long
        raise ConfigError(f"--output {file}: is a folder; give a file, e.g. {file}/picture.png")
    known = sorted(Figure().canvas.get_supported_filetypes())
    extension = file.suffix.removeprefix(".").lower()
    if extension and extension not in known:
        raise ConfigError(
            f"--output {file}: unknown picture format {extension!r}; expected one of "
            f"{', '.join(known)}; change the extension"
        )


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
