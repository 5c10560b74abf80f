"""Programs that run the page: node, and Chromium without a network.

Chromium is driven by its DevTools protocol, over a pipe.
"""

import base64
import itertools
import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fetal_flax.export import web

SECONDS = 120


@pytest.fixture
def call_in_node(program: Callable[..., str], tmp_path: Path) -> Callable[..., list[Any]]:
    """Calls functions of one of the page's modules, each a name and its arguments.

    Arrays go and come as the page's maps, of uint8 or float32.
    """
    node = program("node")

    def call(module: str, calls: list[tuple[Any, ...]]) -> list[Any]:
        def written(argument: Any, name: str) -> Any:
            if not isinstance(argument, np.ndarray):
                return argument
            array = argument.astype(np.uint8) if argument.dtype == bool else argument
            array.tofile(tmp_path / name)
            size = {"height": array.shape[0], "width": array.shape[1]}
            return {"file": str(tmp_path / name), "type": str(array.dtype), **size}

        def read(values: dict[str, Any]) -> Any:
            if values.keys() != {"data", "height", "width"}:
                return values
            flat = np.fromfile(values["data"], np.uint8)
            return flat.reshape(values["height"], values["width"])

        path = tmp_path / "calls.json"
        path.write_text(
            json.dumps(
                [
                    [name, *(written(a, f"{i}_{j}.bin") for j, a in enumerate(arguments))]
                    for i, (name, *arguments) in enumerate(calls)
                ]
            )
        )
        program_file = Path(__file__).with_name("call_in_node.mjs")
        command = [node, program_file, Path(web.__file__).with_name("page") / module, path]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout, object_hook=read)

    return call


class Browser:
    """A browser with one page, which reaches no host."""

    def __init__(self, executable: str, folder: Path):
        command_read, command_write = os.pipe()
        answer_read, answer_write = os.pipe()
        flags = (
            "--headless=new",
            # In a container there is neither a sandbox nor much of /dev/shm.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={folder}/profile",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--remote-debugging-pipe",
        )
        # The browser reads commands from descriptor 3 and writes to 4.
        redirect = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", executable, *flags, "about:blank"],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self._write, self._read = command_write, answer_read
        self._unread = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.requests: list[str] = []
        """Addresses that the page has asked for."""
        self.complaints: list[str] = []
        """What it has written to the console, and exceptions."""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._read], [], [], SECONDS)
            assert ready, "the browser doesn't answer"
            block = os.read(self._read, 1 << 20)
            assert block, "the browser has ended"
            self._unread += block
        text, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(text)
        parameters = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif message.get("method") in (
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
        ):
            self.complaints.append(json.dumps(parameters))
        return message

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens a file at a window's size; as on a phone if it is narrow."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Returns an expression's value, of a promise what it resolves to."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, (expression, result)
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Waits until an expression holds."""
        end = time.monotonic() + SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never: {expression}; {self.complaints}"
            time.sleep(0.05)

    def choose(self, *files: Path) -> None:
        """Chooses files, as someone does in the dialogue."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], nodeId=node)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Presses a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift)

    def click(self, x: float, y: float) -> None:
        """Clicks at a point of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def save_downloads(self, folder: Path) -> None:
        """Lets what the page downloads appear in a folder."""
        page, self._session = self._session, None
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self._session = page

    def picture(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Ends the browser."""
        self._session = None
        self.call("Browser.close")
        self._process.wait(SECONDS)
        os.close(self._write)
        os.close(self._read)


@pytest.fixture
def open_page(program: Callable[..., str], tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Opens a page in a browser of its own."""
    begun: list[Browser] = []

    def open_(path: Path, **window: Any) -> Browser:
        browser = Browser(program("chromium", "chromium-browser", "google-chrome"), tmp_path)
        begun.append(browser)
        browser.open(path, **window)
        return browser

    yield open_
    for browser in begun:
        browser.close()
