"""Makes the pages of results from the templates and the CSV files of docs/results.

`scripts/generate_docs.py` writes and checks the pages. In a template every number from our runs is
an expression. Numbers with a decimal point, a percent sign or a deviation are refused elsewhere,
except in backticks (values of keys) and in `{% call published() %}` (figures of papers)."""

import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import results_tables
from jinja2 import Environment, StrictUndefined, nodes
from results_data import adjusted_for, between, changes, read_comparison
from results_laws import fit_laws, per_doubling

from switchtitan.comparison.statistics import LEVEL

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "results"
RESULTS = ROOT / "docs" / "RESULTS.md"
PAGES = {
    "RESULTS.md.jinja": RESULTS,
    "RESULTS_ONE_RATE.md.jinja": ROOT / "docs" / "RESULTS_ONE_RATE.md",
    "README.md.jinja": FOLDER / "README.md",
}
"""Template -> the page that is made of it."""
DEFINITIONS = "definitions.jinja"
"""What all templates can use: it is read before each of them."""
GEOMETRY = "geometry_python.csv"
"""What `scripts/measure_geometry.py` of commit 8c82658 measured."""
REPORTED = "reported.csv"
"""Figures without a CSV file of their runs, as an earlier version of the page reported them."""

_LEVEL = f"{100 * (1 - LEVEL):.0f} %"
_PUBLISHED = "published"
_FUNCTIONS = (
    *("interval", "percent", "number", "mean", "millions", "seeds", "missing", "mean_loss"),
    *("overview_table", "results_table", "changes_table", "ablation_table", "geometry_table"),
    *("budget_table", "size_table", "rate_table", "distance_table", "law_table"),
    *("in_words", "p_value", "num_switches", "rank_correlation"),
)
"""Functions of `results_tables` that the template can call."""
_CODE_OR_LINK = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv \d{4}\.\d{5}", re.DOTALL)
_WIDTH = 120
_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
_TEXT = r"(?!- |#|\||<!--|!\[)\S.*"
"""A line that is no item of a list, heading, row of a table, comment or picture."""
_PARAGRAPH = re.compile(
    rf"^(?P<start> *)(?P<marker>(?:- )?)(?P<text>{_TEXT}(?:\n *{_TEXT})*)", re.MULTILINE
)
_UNBROKEN = re.compile(r"`[^`]*`|[+-]?\d[\d.]*(?: %)? \([^()]* to [^()]*\)")
"""Code, and a number with its interval: not broken into two lines."""
# Not in names (`ratio-0.4`) and versions (`2.13.0`).
_NUMBER = re.compile(r"(?<![\w.])(?<!\w-)[+-]?(?:\d*\.\d+(?!\.?\d)|\d+(?= ?%)|\d+(?= ?±))(?:\s?%)?")


def results_pages(folder: Path = FOLDER) -> dict[Path, str]:
    """Returns the text of every page, from the templates and the CSV files in `folder`.

    Raises:
        ValueError: if the template has a number from no expression, or a claim that does not hold.
        UndefinedError: if the template has an unknown name.
    """
    environment = _environment()
    environment.globals.update(
        comparison=cache(partial(read_comparison, folder)),
        cost_table=partial(results_tables.cost_table, folder / REPORTED),
        geometry=results_tables.read_geometry(folder / GEOMETRY),
    )
    definitions = _checked(folder / DEFINITIONS)
    return {
        page: wrapped(environment.from_string(definitions + _checked(folder / template)).render())
        for template, page in PAGES.items()
    }


def _checked(template: Path) -> str:
    """Returns the text of a template, which has no number that no expression computes."""
    source = template.read_text(encoding="utf-8")
    if typed := typed_numbers(source):
        raise ValueError(
            f"{template.name}: numbers that no expression computes: {', '.join(typed)}; compute "
            "them from the CSV files, or mark values of keys as code and figures of papers as "
            "published"
        )
    return source


def typed_numbers(source: str) -> list[str]:
    """Returns the numbers of a template's text that no expression computes, with what follows."""
    text = _CODE_OR_LINK.sub(" ", "".join(_literals(Environment().parse(source))))
    return [
        text[match.start() : match.end() + 20].split("\n")[0] for match in _NUMBER.finditer(text)
    ]


def _literals(node: nodes.Node) -> Iterator[str]:
    """Yields all text and constants of a template, without what is marked as published."""
    if isinstance(node, nodes.CallBlock) and _is_published(node.call):
        return
    if isinstance(node, nodes.TemplateData):
        yield node.data
    elif isinstance(node, nodes.Const):
        yield f" {node.value} " if isinstance(node.value, str | float) else " "
    elif isinstance(node, nodes.Output):
        for part in node.nodes:
            if isinstance(part, nodes.Const):
                yield str(part.value)
            else:
                yield from _literals(part)
    else:
        for child in node.iter_child_nodes():
            yield from _literals(child)


def _is_published(call: nodes.Call) -> bool:
    return isinstance(call.node, nodes.Name) and call.node.name == _PUBLISHED


def _environment() -> Environment:
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.globals.update({name: getattr(results_tables, name) for name in _FUNCTIONS})
    environment.globals.update({_PUBLISHED: published, "require": require, "level": _LEVEL})
    environment.globals.update(
        {"changes": changes, "between": between, "adjusted_for": adjusted_for}
    )
    environment.globals.update({"fit_laws": fit_laws, "per_doubling": per_doubling})
    return environment


def wrapped(page: str) -> str:
    """Returns Markdown with paragraphs and items of lists in lines of at most 120 characters."""
    parts = _FENCED.split(page)
    parts[::2] = [_PARAGRAPH.sub(_wrapped, part) for part in parts[::2]]
    return "".join(parts)


def _wrapped(match: re.Match[str]) -> str:
    start, marker, text = match.group("start", "marker", "text")
    text = _UNBROKEN.sub(lambda found: found[0].replace(" ", "\0"), " ".join(text.split()))
    lines = textwrap.fill(
        text,
        _WIDTH,
        initial_indent=start + marker,
        subsequent_indent=start + " " * len(marker),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.replace("\0", " ")


def published(caller: Callable[[], str]) -> str:
    """Returns the text of a block with figures of papers."""
    return caller()


def require(holds: bool, claim: str) -> str:
    """Returns nothing, as a check of a sentence next to it.

    Raises:
        ValueError: if the claim does not hold.
    """
    if not holds:
        raise ValueError(f"the CSV files do not show: {claim}; change the sentence")
    return ""
