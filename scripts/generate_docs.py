"""Generates docs/CONFIGURATION.md from the sections, tables of docs/PERFORMANCE.md from records,
and the results in README and docs (see results.py and pictures.py).

    python scripts/generate_docs.py [--check]

--check writes nothing and exits with status 1 if a file is outdated.
In PERFORMANCE.md the table between `<!-- table NAME -->` and `<!-- end -->` is generated from
docs/measurements/NAME.json, which the command in it writes."""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures import pictures
from results import with_results

from switchtitan.config import describe, section_types
from switchtitan.job.config import JobConfig
from switchtitan.registry import Section, toml_value

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "docs" / "CONFIGURATION.md"
PERFORMANCE = ROOT / "docs" / "PERFORMANCE.md"
WITH_RESULTS = (
    ROOT / "README.md",
    ROOT / "docs" / "RESULTS.md",
    ROOT / "docs" / "results" / "DETAILS.md",
    ROOT / "docs" / "LOG.md",
)
MEASUREMENTS = ROOT / "docs" / "measurements"

_GIB = 2**30
_CARDS = ("A100 80GB SXM", "H100 SXM")
"""Columns of bounds."""
_TABLE = re.compile(r"<!-- table (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_CONFIGURATION_HEAD = """\
# Configuration

A run is described by one TOML file, see [USAGE.md](USAGE.md#configure).
Every key can be set on the command line as `--section.key value`.

This page is generated from the code by `python scripts/generate_docs.py`.
"""


def main(argv: Sequence[str]) -> None:
    """Writes all files, or checks that they are up to date.

    Raises:
        SystemExit: with status 1 if `--check` finds an outdated file.
    """
    parser = argparse.ArgumentParser(prog="scripts/generate_docs.py", allow_abbrev=False)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a file is outdated"
    )
    options = parser.parse_args(argv)
    texts = {
        CONFIGURATION: configuration_page(),
        PERFORMANCE: with_tables(PERFORMANCE.read_text(), MEASUREMENTS),
        **{page: with_results(page.read_text()) for page in WITH_RESULTS},
    }
    for text in list(texts.values()):
        texts |= pictures(text)
    outdated = [
        path for path, text in texts.items() if not path.exists() or path.read_text() != text
    ]
    if options.check and outdated:
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in outdated)
        print(f"outdated: {names}; run python scripts/generate_docs.py", file=sys.stderr)
        raise SystemExit(1)
    for path in outdated:
        path.write_text(texts[path])


def configuration_page() -> str:
    """Returns docs/CONFIGURATION.md: all sections, with type, default and description of every
    key."""
    parts = [_CONFIGURATION_HEAD]
    for section, types in section_types(JobConfig).items():
        for name, config_type in types.items():
            # The same anchor on GitHub and on the site: no two dropped characters side by side.
            title = f"[{section}] name: {name}" if name else f"[{section}]"
            parts.append(_describe_section(title, config_type))
    return "\n".join(parts)


def _describe_section(title: str, config_type: type[Section]) -> str:
    # The heading already has the section's name.
    sentence = re.sub(r"^`\[[^`]*`[:.]\s*", "", " ".join((config_type.__doc__ or "").split()))
    lines = [f"## {title}", ""]
    if sentence:
        lines += [*_wrapped(sentence[0].upper() + sentence[1:]), ""]
    fields = config_type.model_fields
    for key in sorted(fields, key=lambda key: key != "name"):
        field = fields[key]
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            default = "default: none" if value is None else f"default: `{toml_value(value)}`"
        sentences = [f"**`{key}`**: {describe(field)}; {default}.", field.description or ""]
        first, *rest = (line for sentence in sentences for line in _wrapped(sentence, width=118))
        lines += [f"- {first}", *(f"  {line}" for line in rest)]
    return "\n".join([*lines, ""])


def _wrapped(text: str, width: int = 120) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def with_tables(text: str, folder: Path) -> str:
    """Returns `text` with every table generated from its file in `folder`, and its source."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        record = json.loads((folder / f"{name}.json").read_text())
        rows = bound_rows(record)
        rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        source = f"Commit {record['environment']['commit']}: [figures](measurements/{name}.json)"
        return "\n".join([f"<!-- table {name} -->", "", *lines, "", source, "", "<!-- end -->"])

    return _TABLE.sub(table, text)


def bound_rows(record: dict[str, Any]) -> list[list[str]]:
    """Returns the table of the least time of steps: a row for each configuration.

    Bounds are of one rank's step, with their ratio to the first row's.
    """
    title = (
        "{size}; ranks: {num_ranks}; {num_sequences} x {seq_len}; recomputation: {recomputation}"
    )
    heads = [title.format_map(record), "launches", "GB", "TFLOP", "peak, GiB"]
    rows = [heads + [head for card in _CARDS for head in (f"{card}, ms", "tokens/s")]]
    num_tokens = record["num_sequences"] * record["seq_len"]
    first = next(iter(record["rows"].values()))["bounds_s"]
    for row in record["rows"].values():
        cells = [row["name"], str(row["num_launches"]), f"{row['num_bytes'] / 1e9:.1f}"]
        cells += [f"{row['num_flops'] / 1e12:.2f}", f"{row['peak'] / _GIB:.2f}"]
        for card in _CARDS:
            bound_s = row["bounds_s"][card]
            cells.append(f"{1e3 * bound_s:.1f} ({bound_s / first[card]:.3f})")
            cells.append(f"{num_tokens / bound_s / 1e3:.4g}k")
        rows.append(cells)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
