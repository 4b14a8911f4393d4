"""A headless Chromium, controlled over a pipe: what a page shows, its requests and errors."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
OPTIONS = [
    "--headless",
    "--remote-debugging-pipe",  # descriptors 3 and 4
    "--no-sandbox",  # root has none in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no host but this one
]


class Page:
    """One tab. `requests` and `errors` hold the requested URLs and the reported errors so far."""

    def __init__(self, send: int, receive: int):
        self._send, self._receive = send, os.fdopen(receive, "rb")
        self._last, self._buffer, self._session = 0, b"", None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (reply := self.next_message()).get("id") != self._last:
            pass
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def next_message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = self._receive.read1(1 << 20)
            if not chunk:
                raise RuntimeError("Chromium ended")
            self._buffer += chunk
        content, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(content)
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            case "Log.entryAdded":
                self.errors.append(message["params"]["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]))
        return message

    def show(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Open a file in a window of `width` pixels, and wait until it is loaded."""
        self.look(width=width, dark=dark)
        self.call("Page.navigate", url=path.absolute().as_uri())
        while self.next_message().get("method") != "Page.loadEventFired":
            pass

    def look(self, *, width: int, dark: bool = False, media: str = "") -> None:
        """Give the window another width, theme or medium (`print`), without loading it again."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def click(self, element: str) -> None:
        """Click on the middle of an element, given as an expression."""
        self.evaluate(f"({element}).scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"({element}).getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key: str, text: str = "") -> None:
        """Press a key, which the focused element gets."""
        code = {"Enter": 13, "Tab": 9, " ": 32}[key]
        names = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **names)
        self.call("Input.dispatchKeyEvent", type="keyUp", **names)

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")


@contextmanager
def browser() -> Iterator[Page]:
    """Start Chromium, yield one tab, and stop Chromium."""
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        script = f'exec "$@" 3<&{to_child} 4>&{from_child}'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", CHROMIUM, *OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        try:
            page = Page(from_parent, to_parent)
            yield page
            page._session = None
            page.call("Browser.close")
        finally:
            os.close(from_parent)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
