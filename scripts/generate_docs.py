"""Generates docs/CONFIGURATION.md from the sections, tables of bounds on GPUs from records,
and the results in README and docs (see results.py and pictures.py).

    python scripts/generate_docs.py [--check]

--check writes nothing and exits with status 1 if a file is outdated.
In docs/measurements/GPU.md the table between `<!-- table NAME -->` and `<!-- end -->` is generated
from docs/measurements/NAME.json, which the command in it writes; that of docs/PERFORMANCE.md from
all records of bounds."""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures import CARDS, bound_ratios, pictures
from results import with_results

from switchtitan.config import describe, section_types
from switchtitan.job.config import JobConfig
from switchtitan.registry import NamedSection, Section, toml_value

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "docs" / "CONFIGURATION.md"
WITH_RESULTS = (
    ROOT / "README.md",
    ROOT / "docs" / "RESULTS.md",
    ROOT / "docs" / "results" / "DETAILS.md",
    ROOT / "docs" / "LOG.md",
)
MEASUREMENTS = ROOT / "docs" / "measurements"
WITH_TABLES = (ROOT / "docs" / "PERFORMANCE.md", MEASUREMENTS / "GPU.md")

_GIB = 2**30
_FIRST = ("llama", "switchlora", "galore", "lora", "adamw", "muon")
"""Sections that describe all their keys, as far as possible; others refer to them."""
_TABLE = re.compile(r"<!-- table (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_CONFIGURATION_HEAD = """\
# Configuration

A run is described by one TOML file, see [USAGE.md](USAGE.md#configure).
Every key can be set on the command line as `--section.key value`.
The key `name` of `[model]`, `[method]` and `[optimizer]` chooses which other keys it has.
A key that is the same for several names is described once.

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
        **{page: with_tables(page.read_text(), MEASUREMENTS) for page in WITH_TABLES},
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
        described: dict[str, str] = {}
        for name in sorted(types, key=[*_FIRST, *types].index):
            # The same anchor on GitHub and on the site: no two dropped characters side by side.
            title = f"[{section}] name: {name}" if name else f"[{section}]"
            parts.append(_describe_section(title, types[name], described))
            link = f"[`{name}`](#{section}-name-{name})"
            for text in _described_keys(types[name]).values():
                described.setdefault(text, link)
    return "\n".join(parts)


def _describe_section(title: str, config_type: type[Section], described: dict[str, str]) -> str:
    """Returns a section: keys that `described` (text -> link) lacks, and links to the others."""
    # The heading already has the section's name.
    sentence = re.sub(r"^`\[[^`]*`[:.]\s*", "", " ".join((config_type.__doc__ or "").split()))
    lines = [f"## {title}", ""]
    if sentence:
        lines += [*_wrapped(sentence[0].upper() + sentence[1:]), ""]
    keys = _described_keys(config_type)
    shared: dict[str, list[str]] = {}
    for key, text in keys.items():
        if text in described:
            shared.setdefault(described[text], []).append(f"`{key}`")
    links = [f"Keys as in {link}: {', '.join(names)}." for link, names in shared.items()]
    if links:
        lines += [*_wrapped(" ".join(links)), ""]
    own = [text for text in keys.values() if text not in described]
    return "\n".join([*lines, *own, ""] if own else lines)


def _described_keys(config_type: type[Section]) -> dict[str, str]:
    """Returns the text of each key; not of a `name` that chooses the class, which is a heading."""
    texts = {}
    for key, field in config_type.model_fields.items():
        if key == "name" and issubclass(config_type, NamedSection):
            continue
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            default = "default: none" if value is None else f"default: `{toml_value(value)}`"
        sentences = [f"**`{key}`**: {describe(field)}; {default}.", field.description or ""]
        first, *rest = (line for sentence in sentences for line in _wrapped(sentence, width=118))
        texts[key] = "\n".join([f"- {first}", *(f"  {line}" for line in rest)])
    return texts


def _wrapped(text: str, width: int = 120) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def with_tables(text: str, folder: Path) -> str:
    """Returns `text` with every table generated from its file in `folder`, and its source.

    The table `ratios` is that of `ratio_rows`, of all files of bounds."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name == "ratios":
            records = [json.loads(file.read_text()) for file in folder.glob("gpu_bounds_*.json")]
            rows = ratio_rows(records)
            source = "[All methods and figures](measurements/GPU.md)"
        else:
            record = json.loads((folder / f"{name}.json").read_text())
            rows = bound_rows(record)
            source = f"Commit {record['environment']['commit']}: [figures]({name}.json)"
        rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([f"<!-- table {name} -->", "", *lines, "", source, "", "<!-- end -->"])

    return _TABLE.sub(table, text)


def ratio_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns full rank's bounds and SwitchLoRA's divided by them, the smallest model first."""
    rows = [["size, GPUs"]]
    for card in CARDS:
        rows[0] += [f"full rank, ms on {card.split()[0]}", "rank hidden/4", "hidden/8"]
    sides = [(next(iter(record["rows"].values())), record) for record in records]
    for first, record in sorted(
        sides, key=lambda side: (side[0]["num_flops"], side[1]["num_ranks"])
    ):
        cells = [f"{record['size']}, {record['num_ranks']}"]
        for card in CARDS:
            ratios = [f"{ratio:.2f}" for ratio in bound_ratios(record, "SwitchLoRA", card)]
            cells += [f"{1e3 * first['bounds_s'][card]:.0f}", *ratios]
        rows.append(cells)
    return rows


def bound_rows(record: dict[str, Any]) -> list[list[str]]:
    """Returns the table of the least time of steps: a row for each configuration.

    Bounds are of one rank's step, with their ratio to the first row's.
    """
    title = (
        "{size}; ranks: {num_ranks}; {num_sequences} x {seq_len}; recomputation: {recomputation}"
    )
    heads = [title.format_map(record), "launches", "GB", "TFLOP", "peak, GiB"]
    rows = [heads + [head for card in CARDS for head in (f"{card}, ms", "tokens/s")]]
    num_tokens = record["num_sequences"] * record["seq_len"]
    first = next(iter(record["rows"].values()))["bounds_s"]
    for row in record["rows"].values():
        cells = [row["name"], str(row["num_launches"]), f"{row['num_bytes'] / 1e9:.1f}"]
        cells += [f"{row['num_flops'] / 1e12:.2f}", f"{row['peak'] / _GIB:.2f}"]
        for card in CARDS:
            bound_s = row["bounds_s"][card]
            cells.append(f"{1e3 * bound_s:.1f} ({bound_s / first[card]:.3f})")
            cells.append(f"{num_tokens / bound_s / 1e3:.4g}k")
        rows.append(cells)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
