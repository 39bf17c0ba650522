"""Headless Chromium, driven over a pipe: no port, no package beside the standard library.

    with Browser.start() as browser:
        page = browser.open(Path("page.html"), width=390, dark=True)
        page.click("th:nth-child(2) button")
        print(page.evaluate("document.title"), page.messages, page.requests)
        page.screenshot(Path("page.png"))

For the tests of HTML pages and for the pictures in the documentation.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--disable-default-apps", "--mute-audio", "--disable-dev-shm-usage"),
)
PATIENCE = 240.0  # seconds for an answer, on a machine that is very busy


def find() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A running browser; it speaks the DevTools protocol, JSON with a zero byte behind each message."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._sent, self._rest = 0, b""
        self.pages: dict[str, Page] = {}

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Browser]:
        program = find()
        if program is None:
            raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
        its_read, our_write = os.pipe()
        our_read, its_write = os.pipe()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            # The browser reads file 3 and writes file 4; the shell gives the pipes these numbers.
            command = f'exec "$0" "$@" 3<&{its_read} 4>&{its_write}'
            arguments = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
            process = subprocess.Popen(
                ["bash", "-c", command, *arguments],
                pass_fds=(its_read, its_write),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            os.close(its_read)
            os.close(its_write)
            try:
                yield cls(our_write, our_read)
            finally:
                os.close(our_write)  # at which it ends
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()
                process.wait()
                os.close(our_read)

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1) -> Page:
        """Open a file in a new page of that size, whose console and requests are kept from the first on."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        mode = "dark" if dark else "light"
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
        mobile = width < 600
        size: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in page.events:
            self._receive()
        page.call("Page.bringToFront")  # what lies behind another page gets no pointer
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("the browser does not answer" if not ready else "the browser has ended")
            self._rest += data
        first, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        page = self.pages.get(message.get("sessionId", ""))
        if page is not None and "method" in message:
            page.hear(message["method"], message["params"])
        return message


class Page:
    """One page.

    Attributes:
        messages: what the page wrote to the console, errors that nobody caught, and what its policy refused.
        requests: addresses that were asked for, the page's own first.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.events: set[str] = set()
        self.messages: list[str] = []
        self.requests: list[str] = []

    def hear(self, event: str, about: dict[str, Any]) -> None:
        self.events.add(event)
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in about["args"]))
        elif event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.messages.append(str(details.get("exception", {}).get("description", details["text"])))
        elif event == "Log.entryAdded":
            self.messages.append(str(about["entry"]["text"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, code: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", code))
        return answer["result"].get("value")

    def place(self, selector: str) -> tuple[float, float]:
        """Bring an element into view, and return its middle."""
        find = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{find}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({find}.getBoundingClientRect())")
        return x, y

    def hover(self, selector: str) -> None:
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, pointerType="mouse")

    def click(self, selector: str) -> None:
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, selector: str | None = None) -> None:
        """Press a key, with the focus on an element where one is given."""
        if selector is not None:
            self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        code = {"Enter": 13, "ArrowRight": 39, "ArrowLeft": 37, "Escape": 27, "Tab": 9}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            pressed = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", **pressed, **(text if kind == "keyDown" else {}))

    def screenshot(self, path: Path, top: float = 0, height: float | None = None) -> None:
        """Write a picture of the page, or of a part of that height."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"], "scale": 1}
        more = {"clip": clip, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **more)["data"]))
