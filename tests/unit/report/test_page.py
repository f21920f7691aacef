"""The page: text cannot become code, nothing else is loaded, only reports are replaced."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from switchtitan.errors import ConfigError
from switchtitan.report.page import check_output, embedded, render, write_report

HOSTILE = '</script><b>&amp;<!--<script> ]]> \u2028 \ud800 {{script}} "'


class Elements(HTMLParser):
    """All elements of a page, and the text of its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        self.names.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.names and self.names[-1] in self.inside:
            self.inside[self.names[-1]].append(data)


def contents(title: str) -> dict[str, object]:
    return {"title": title, "subtitle": title, "notes": [title], "series": [], "sections": []}


def test_hostile_text_adds_no_element_and_reads_back() -> None:
    plain, hostile = Elements(render(contents("run"))), Elements(render(contents(HOSTILE)))
    assert hostile.names == plain.names
    data = json.loads(hostile.inside["script"][0])
    assert data["notes"] == [HOSTILE]
    assert "{{" not in render(contents("run"))


def test_text_that_is_not_escaped_would_be_found() -> None:
    raw = render(contents("run")).replace('"run"', f'"{HOSTILE}"')
    assert Elements(raw).names != Elements(render(contents("run"))).names


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "\u2028", "a&b", HOSTILE])
def test_embedded_json_has_no_markup(text: str) -> None:
    found = embedded({text: [text, 1.5]})
    assert found.isascii()
    assert not set(found) & set("<>&")
    assert json.loads(found) == {text: [text, 1.5]}


def test_the_policy_allows_the_pages_own_code_and_nothing_else() -> None:
    page = render(contents("run"))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    found = Elements(page)
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(found.inside[kind][-1].encode()).digest())
        assert f"{kind}-src 'sha256-{digest.decode()}'" in policy
    assert not {name for name, _ in found.attributes} & {"src", "href", "srcset", "onload"}
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    output = tmp_path / "new folder" / "report.html"
    write_report(render(contents("first")), output)
    write_report(render(contents("second")), output)
    assert "second" in output.read_text()
    assert [file.name for file in output.parent.iterdir()] == ["report.html"]
    for other in ("", "<!doctype html><p>mine</p>", " " * 600 + render(contents("late"))):
        output.write_text(other)
        with pytest.raises(ConfigError, match="exists and is not a report of switchtitan"):
            write_report(render(contents("third")), output)
        assert output.read_text() == other


def test_a_folder_and_a_place_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give a file"):
        check_output(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report("", tmp_path / "file" / "report.html")
