"""The page of a report: one HTML file with its own code, style and data."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path

import switchtitan
from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically
from switchtitan.json_values import finite_or_none

_SCRIPTS = ("elements", "numbers", "curves", "state", "chart", "pointer", "tables", "bars", "main")
"""Files of the page's code in order; joined into one, since a page opened from a disk may load no
modules."""
_MARK = b'<meta name="generator" content="switchtitan report">'
_MARK_WITHIN_BYTES = 512
"""A report has its mark among its first bytes."""


def render(contents: Mapping[str, object]) -> str:
    """Returns the page with these contents.

    Its policy lets it load nothing, and run no other code than its own.
    """
    style = _file("style.css")
    script = '"use strict";\n' + "\n".join(_file(f"{name}.js") for name in _SCRIPTS)
    written_at = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    footer = f"Written by switchtitan {switchtitan.__version__} on {written_at}."
    parts = {
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "title": html.escape(f"{contents['title']} - switchtitan"),
        "style": style,
        "contents": embedded({**contents, "footer": footer}),
        "script": script,
    }
    # Split first: a value may contain what looks like another placeholder.
    first, *rest = _file("page.html").split("{{")
    pieces = [first]
    for piece in rest:
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    # The name of a folder may hold bytes that are no UTF-8.
    return "".join(pieces).encode("utf-8", "replace").decode("utf-8")


def embedded(contents: Mapping[str, object]) -> str:
    """Returns JSON that cannot end the script element it is in, nor start a comment there.

    A number that is not finite, which JSON does not have, becomes null.
    """
    text = json.dumps(finite_or_none(contents), allow_nan=False, separators=(",", ":"))
    # Outside of strings, JSON has none of these.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def check_output(output: Path) -> None:
    """Checks that a report may be written to a file: that it is new, or a report.

    Raises:
        ConfigError: if not.
    """
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; give a file, e.g. {output}/report.html")
    if not output.exists():
        return
    try:
        with output.open("rb") as stream:
            is_report = _MARK in stream.read(_MARK_WITHIN_BYTES)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be read: {error}") from error
    if not is_report:
        raise ConfigError(
            f"--output {output}: exists and is not a report of switchtitan; choose another file, "
            "or delete it"
        )


def write_report(page: str, output: Path) -> None:
    """Writes a page atomically, over an older report or to a new file.

    Raises:
        ConfigError: if something else is there, or it cannot be written.
    """
    check_output(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error}") from error


def _file(name: str) -> str:
    return files("switchtitan.report").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
