"""Pages in a headless Chromium, spoken to over its debugging pipe: no driver, no network, no further package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome")

LOOK = """(() => {
  const images = [...document.images];
  const inside = element => element.closest('.scroll') !== null;
  const wide = [...document.querySelectorAll('body *')].filter(
    e => !inside(e) && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  return JSON.stringify({
    width: document.documentElement.clientWidth,
    scroll: document.documentElement.scrollWidth,
    images: images.length,
    broken: images.filter(i => !(i.complete && i.naturalWidth > 0 && i.clientWidth > 0)).map(i => i.alt),
    unnamed: images.filter(i => !i.hasAttribute('alt')).length,
    plots: images.filter(i => i.src.startsWith('data:image/svg')).map(i => i.alt),
    wide: wide.slice(0, 5).map(e => e.tagName + '.' + e.className),
    scripts: document.scripts.length,
    text: document.body.innerText.length,
    title: document.title,
  });
})()"""


class Seen(NamedTuple):
    """What a browser made of a page.

    Attributes:
      look: the measurements of :data:`LOOK`.
      errors: messages of the console and exceptions.
      requests: addresses that were asked for, the page itself and data inside it left out.
    """

    look: dict[str, Any]
    errors: list[str]
    requests: list[str]


def find_browser() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A headless Chromium; a context manager."""

    def __init__(self, executable: str, profile: pathlib.Path):
        """Args:
        executable: the browser.
        profile: an empty folder for what it writes.
        """
        self._executable, self._profile = executable, profile
        self._count, self._buffer = 0, b""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        read_there, self._out = os.pipe()
        self._in, write_there = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        # A container's shared memory may be small; the crash reporter needs a folder that may be written.
        flags += ["--disable-dev-shm-usage", "--disable-crash-reporter", f"--user-data-dir={self._profile}"]
        # The browser reads from descriptor 3 and writes to 4, whatever numbers the pipes have here.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_there, write_there)]
        start = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])".format(*ends)
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, self._executable, *flags],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (read_there, write_there, *ends):
            os.close(end)
        try:
            self._open_page()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open_page(self) -> None:
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session=self._session)

    def __exit__(self, *_) -> None:
        try:
            self._call("Browser.close")
            self._process.wait(timeout=20)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def look(self, page: pathlib.Path, width: int, picture: pathlib.Path | None = None) -> Seen:
        """Opens a page at a width and measures it; saves a picture of the whole page."""
        self._events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self._call("Emulation.setDeviceMetricsOverride", size, session=self._session)
        self._call("Page.navigate", {"url": page.resolve().as_uri()}, session=self._session)
        self._until(lambda: any(event["method"] == "Page.loadEventFired" for event in self._events))
        answer = self._call("Runtime.evaluate", {"expression": LOOK, "returnByValue": True}, session=self._session)
        if picture is not None:
            options = {"captureBeyondViewport": True, "format": "png"}
            data = self._call("Page.captureScreenshot", options, session=self._session)["data"]
            picture.write_bytes(base64.b64decode(data))
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        errors = [json.dumps(event["params"])[:300] for event in self._events if event["method"] in methods]
        asked = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        own = page.resolve().as_uri()
        requests = [url for url in asked if url != own and not url.startswith("data:")]
        return Seen(json.loads(answer["result"]["value"]), errors, requests)

    def _call(self, method: str, params: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params or {}}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        number, found = self._count, []

        def answered() -> bool:
            found.extend(event for event in self._events if event.get("id") == number)
            return bool(found)

        self._until(answered)
        if "error" in found[0]:
            raise RuntimeError(f"{method}: {found[0]['error']}")
        self._events = [event for event in self._events if "id" not in event]
        return found[0]["result"]

    def _until(self, done, timeout: float = 120.0) -> None:
        end = time.monotonic() + timeout
        while not done():
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._in, 2**20)
            if not part:
                raise OSError("the browser has ended")
            *messages, self._buffer = (self._buffer + part).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message or "method" in message:
                    self._events.append(message)
