"""The README and docs/: links, anchors, length."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_anchors_resolve(page):
    broken = []
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_have_at_most_120_columns(page):
    assert not [line for line in page.read_text().splitlines() if len(line) > 120]


def test_readme_has_at_most_200_lines_and_says_early_that_no_gpu_has_run_the_code():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert any("No GPU has run this code yet" in line for line in lines[:20])


def pages_without_link(readme: str) -> set[str]:
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    return {page for page in pages if f"]({page})" not in readme}


def test_readme_links_every_page():
    readme = (ROOT / "README.md").read_text()
    assert pages_without_link(readme) == set()
    assert pages_without_link(readme.replace("](docs/DATA.md)", "")) == {"docs/DATA.md"}


def test_link_checks_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading: with `code`\n[gone](gone.md)\n[here](#a-heading-with-code)\n[not](#nowhere)\n"
    )
    assert anchors(page) == {"a-heading-with-code"}
    with pytest.raises(AssertionError, match=r"gone.md.*#nowhere"):
        test_relative_links_and_anchors_resolve(page)
