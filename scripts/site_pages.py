"""A hook of mkdocs.yml: the site also has the pages and files outside docs/ that its pages link.

README.md is the start page. Markdown of the repository's root becomes a page; every other file is
copied to `files/`, so that no link needs the repository.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
"""Pages outside docs/ -> their place on the site."""
_SOURCES = {place: source for source, place in PLACES.items()}
_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lets headings have the anchors that GitHub gives them."""
    config.mdx_configs["toc"]["slugify"] = anchor
    return config


def anchor(heading: str, separator: str) -> str:
    """Returns the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/, and what any page links there."""
    for source, place in PLACES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text("utf-8")))
    for page in [*(ROOT / source for source in PLACES), *(ROOT / "docs").rglob("*.md")]:
        for link, _ in _LINK.findall(page.read_text("utf-8")):
            linked = _linked(page.relative_to(ROOT).as_posix(), link)
            place = _place(linked)
            is_file = place.startswith("files/") and (ROOT / linked).is_file()
            if is_file and place not in files.src_uris:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / linked)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links between files of the repository to their places on the site."""
    parts = _FENCED.split(markdown)
    parts[::2] = [moved_links(part, page.file.src_uri) for part in parts[::2]]
    return "".join(parts)


def moved_links(markdown: str, place: str) -> str:
    """Returns the text of the page at `place`, a path on the site, with links for the site."""
    source = _SOURCES.get(place, f"docs/{place}")

    def move(match: re.Match[str]) -> str:
        target = posixpath.relpath(
            _place(_linked(source, match[1])), posixpath.dirname(place) or "."
        )
        return f"]({target}{match[2] or ''})"

    return _LINK.sub(move, markdown)


def _linked(source: str, link: str) -> str:
    """The path of a linked file in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _place(path: str) -> str:
    """The place on the site of a file of the repository; browsers show a file named `.txt`."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PLACES.get(path, f"files/{path.removesuffix('.txt')}.txt")
