"""A real Chromium, driven through chromedriver's own HTTP protocol (W3C WebDriver and Chrome's DevTools commands)."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE, wait_until
from tests.ports import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
]


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self._base = f"{address}/session/{session}"

    def open(self, url: str) -> None:
        _request("POST", f"{self._base}/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value that a script returns."""
        return _request("POST", f"{self._base}/execute/sync", {"script": script, "args": []})

    def wait(self, script: str) -> Any:
        """Run a script until it returns a true value."""
        return wait_until(lambda: self.run(script), 0.1)

    def size(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """The window's size in CSS pixels, and which colour scheme the reader prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", {"features": scheme})

    def mouse(self, kind: str, x: float, y: float, *, pressed: bool = False) -> None:
        """Move, press or release ("mouseMoved", "mousePressed", "mouseReleased") at a place of the window."""
        how = {"button": "left", "clickCount": 1} if kind != "mouseMoved" or pressed else {}
        self.devtools(
            "Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "buttons": int(pressed), **how}
        )

    def picture(self, path: Path) -> Path:
        """A screenshot as PNG."""
        path.write_bytes(base64.b64decode(_request("GET", f"{self._base}/screenshot")))
        return path

    def messages(self) -> list[str]:
        """The errors on the page's console."""
        entries = _request("POST", f"{self._base}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        """What a command of Chrome's DevTools protocol returns."""
        return _request("POST", f"{self._base}/goog/cdp/execute", {"cmd": command, "params": parameters})


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A fresh Chromium with an empty profile; both processes are gone afterwards."""
    port = free_port()
    driver = subprocess.Popen(
        [str(CHROMEDRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(f"{address}/status", driver)
        options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = _request("POST", f"{address}/session", {"capabilities": {"alwaysMatch": capabilities}})
        try:
            yield Browser(address, made["sessionId"])
        finally:
            _request("DELETE", f"{address}/session/{made['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(timeout=PATIENCE)


def wait_for_server(url: str, process: subprocess.Popen[Any]) -> None:
    """Return when the address answers."""

    def answers() -> bool:
        assert process.poll() is None, f"{url} does not answer: its server has ended"
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return True
        return False

    wait_until(answers, 0.05)


def _request(method: str, url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {json.load(error)['value']['message'][:300]}") from None
