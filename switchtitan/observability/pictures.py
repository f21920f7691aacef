"""Pictures as files."""

from pathlib import Path

from matplotlib.figure import Figure

from switchtitan.errors import ConfigError


def write_picture(figure: Figure, file: Path) -> None:
    """Writes the picture in the format that the file's ending names.

    Raises:
        ConfigError: if the ending names no format or the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--output {file}: the picture cannot be written: {error}") from error
