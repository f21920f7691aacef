"""Figures saved as files."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically


def check_picture_option(file: Path) -> None:
    """Checks that `--output FILE` names a picture's format, before hours of measuring.

    Raises:
        ConfigError: if its extension is unknown, or it is a folder.
    """
    if file.is_dir():
        raise ConfigError(f"--output {file}: is a folder; give a file, e.g. {file}/picture.png")
    known = sorted(Figure().canvas.get_supported_filetypes())
    if (file.suffix.removeprefix(".").lower() or "png") not in known:
        raise ConfigError(
            f"--output {file}: unknown picture format; expected one of {', '.join(known)}; change "
            "the extension"
        )


def write_picture(figure: Figure, file: Path) -> None:
    """Saves a figure in the format of the file's extension.

    Raises:
        ConfigError: if the file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=file.suffix.removeprefix(".") or None)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, picture.getvalue())
    except OSError as error:
        raise ConfigError(f"{file}: cannot write the figure: {error}") from error
