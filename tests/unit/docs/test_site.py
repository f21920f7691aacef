"""mkdocs builds the site of README.md and docs/ without a warning, and its links work."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROOT_PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text_of(site: Path, page: Path) -> str:
    """The HTML of a page of the repository, without navigation."""
    is_in_root = page.parent == ROOT
    place = page.relative_to(ROOT if is_in_root else ROOT / "docs")
    is_index = place.name == "README.md"
    file = place.with_name("index.html") if is_index else place.with_suffix(".html")
    html = (site / file).read_text()
    return html.partition('<div class="section"')[2].partition("<footer>")[0]


@pytest.mark.parametrize(
    "page",
    [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").rglob("*.md"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_lists_tables_and_code_are_those_that_github_shows(site: Path, page: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    theirs = markdown_it.MarkdownIt("commonmark").enable("table").render(page.read_text())
    ours = text_of(site, page)
    for tag in ("h1", "h2", "h3", "ul", "ol", "li", "pre", "tr", "blockquote", "code"):
        counts = [len(re.findall(rf"<{tag}\b", html)) for html in (theirs, ours)]
        assert counts[0] == counts[1], tag


def test_every_link_of_the_site_leads_to_a_file_and_an_anchor_of_it(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    ids = {page: set(re.findall(r'\bid="([^"]+)"', page.read_text())) for page in pages}
    broken, num_links = [], 0
    for page in pages:
        for link in re.findall(r'\b(?:href|src)="([^"]+)"', page.read_text()):
            if "://" in link or link.startswith(("data:", "mailto:")):
                continue
            num_links += 1
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.is_file() or (anchor and anchor not in ids.get(target, set())):
                broken.append((page.relative_to(site).as_posix(), link))
    assert num_links > 500
    assert not broken


def test_the_start_page_is_the_readme_and_links_its_files(site: Path) -> None:
    html = (site / "index.html").read_text()
    assert 'src="switch.svg"' in html
    assert 'href="USAGE.html"' in html
    assert (site / "files" / "LICENSE.txt").read_text() == (ROOT / "LICENSE").read_text()


def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    loaded = re.compile(r'<(?:script|link|img)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]*)"')
    for page in site.rglob("*.html"):
        assert not loaded.findall(page.read_text()), page


@pytest.mark.parametrize(
    ("name", "added", "message"),
    [
        ("docs/USAGE.md", "[a](NOWHERE.md)", "NOWHERE.md"),
        ("docs/USAGE.md", "[a](DATA.md#no-such-heading)", "no-such-heading"),
        ("README.md", "[a](docs/NOWHERE.md)", "NOWHERE.md"),
        ("README.md", "[a](scripts/nowhere.py)", "nowhere.py"),
        ("docs/UNLISTED.md", "# Unlisted", "UNLISTED.md"),
    ],
)
def test_the_build_refuses(tmp_path: Path, name: str, added: str, message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "docs", copy / "docs")
    (copy / "scripts").mkdir()
    linked = ("mkdocs.yml", "scripts/site_pages.py", "LICENSE", "pyproject.toml", "constraints.txt")
    for file in (*ROOT_PAGES, *linked):
        shutil.copyfile(ROOT / file, copy / file)
    with (copy / name).open("a") as page:
        page.write(f"\n{added}\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
