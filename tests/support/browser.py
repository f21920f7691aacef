"""A headless Chromium, driven over its DevTools protocol, as a user's hands and eyes."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_START_S, _ANSWER_S = 60, 60
_NO_ONE_ANSWERS = "127.0.0.1:9"
Point = tuple[float, float]
"""Pixels from the left and the top of the page's visible part."""


class PageError(AssertionError):
    """The page's code raised an error, or cannot be called."""


class Page:
    """A page of the browser. It records every request, and every error of its code."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._num_calls = 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._num_calls += 1
        message = {"id": self._num_calls, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._num_calls:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        kind, of = event.get("method"), event.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(of["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(of["exceptionDetails"])[:800])
        elif kind == "Log.entryAdded" and of["entry"]["level"] == "error":
            self.errors.append(of["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and of["type"] in ("error", "assert"):
            self.errors.append(json.dumps(of["args"])[:800])

    def open(
        self, file: Path, width: int = 1280, height: int = 900, is_phone: bool = False
    ) -> None:
        """Opens a file and waits until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if is_phone else 1, mobile=is_phone,
        )  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        self.requests.clear()
        self.errors.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.wait_for("document.readyState === 'complete'")
        self.settle()

    def use_theme(self, theme: str) -> None:
        """Asks for "light" or "dark" pages, as a user's system does."""
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def value(self, expression: str) -> Any:
        """Returns the value of an expression in JavaScript."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise PageError(json.dumps(answer["exceptionDetails"])[:800])
        return answer["result"].get("value")

    def settle(self) -> None:
        """Waits for two frames, after which everything that is due is drawn."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(() => done(true)))"
        self.value(f"new Promise((done) => {frames})")

    def wait_for(self, expression: str) -> None:
        deadline = time.monotonic() + _ANSWER_S
        while not self.value(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Scrolls to an element; returns its left, top, width and height."""
        query = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{query}.scrollIntoView({{block: 'center'}})")
        self.settle()
        box = self.value(f"JSON.stringify({query}.getBoundingClientRect())")
        return tuple(json.loads(box)[key] for key in ("left", "top", "width", "height"))  # type: ignore[return-value]

    def texts(self, selector: str) -> list[str]:
        """Returns the texts of all elements that match."""
        query = f"document.querySelectorAll({json.dumps(selector)})"
        return self.value(f"[...{query}].map((node) => node.textContent)")

    def move(self, point: Point, **more: object) -> None:
        self._mouse("mouseMoved", point, **more)
        self.settle()

    def drag(self, start: Point, end: Point) -> None:
        self._mouse("mousePressed", start, button="left", clickCount=1)
        for part in (0.25, 0.5, 0.75, 1.0):
            here = tuple(a + part * (b - a) for a, b in zip(start, end, strict=True))
            self._mouse("mouseMoved", here, button="left", buttons=1)  # type: ignore[arg-type]
        self._mouse("mouseReleased", end, button="left", clickCount=1)
        self.settle()

    def click(self, point: Point, num_clicks: int = 1, modifiers: int = 0) -> None:
        for count in range(1, num_clicks + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self._mouse(kind, point, button="left", clickCount=count, modifiers=modifiers)
        self.settle()

    def _mouse(self, kind: str, point: Point, **more: object) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=point[0], y=point[1], **more)

    def screenshot(self, file: Path, is_full: bool = False) -> None:
        """Writes a picture of the visible part, or of the full page."""
        picture = self.call(
            "Page.captureScreenshot", captureBeyondViewport=is_full, **self._clip(is_full)
        )
        file.write_bytes(base64.b64decode(picture["data"]))

    def _clip(self, is_full: bool) -> dict[str, object]:
        if not is_full:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {
            "clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        }


@contextmanager
def headless_browser(folder: Path) -> Iterator[Page]:
    """Starts Chromium with its profile in `folder`; its network leads nowhere.

    Skips the test where there is no Chromium, or no package to talk to it.
    """
    websocket = pytest.importorskip(
        "websocket", reason="needs the package websocket-client, of switchtitan[dev]"
    )
    program = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"needs a browser, one of {', '.join(_NAMES)}, e.g. apt-get install chromium")
    options = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--no-first-run",
        "--hide-scrollbars", f"--proxy-server={_NO_ONE_ANSWERS}", "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]  # fmt: skip
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen([program, *options, "about:blank"], stdout=log, stderr=log)
    try:
        port = _port(folder / "DevToolsActivePort", process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [of for of in json.load(answer) if of["type"] == "page"]
        socket = websocket.create_connection(
            pages[0]["webSocketDebuggerUrl"], timeout=_ANSWER_S, suppress_origin=True
        )
        yield Page(socket)
        socket.close()
    finally:
        process.terminate()
        process.wait(30)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + _START_S
    while not (file.exists() and file.read_text().strip()):
        assert process.poll() is None, f"the browser ended; see {file.with_name('browser.log')}"
        assert time.monotonic() < deadline, "the browser did not start"
        time.sleep(0.05)
    return int(file.read_text().split()[0])
