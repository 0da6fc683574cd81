"""A page in headless Chromium, through the DevTools protocol: its console, its size, and a picture of it."""

import asyncio
import atexit
import base64
import functools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)

# The elements that reach beyond the right edge of the window, except inside a container that scrolls.
MEASURE = """(() => {
  const width = document.documentElement.clientWidth;
  const inside = e => { for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return true; return false; };
  const wide = [...document.body.querySelectorAll('*')].filter(
    e => e.getBoundingClientRect().right > width + 1 && !inside(e)).map(e => e.tagName + '.' + e.className);
  const images = [...document.images];
  return {width, scroll: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
          wide: wide.slice(0, 9), images: images.length, broken: images.filter(i => !i.naturalWidth).length,
          smallest: Math.min(...images.map(i => i.getBoundingClientRect().width)),
          font: parseFloat(getComputedStyle(document.querySelector('p')).fontSize)};
})()"""


@dataclass
class Seen:
    """What a browser made of a page: `problems` are console messages of warning or worse, exceptions, and requests
    for anything but the page itself and data URLs."""

    page: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)  # of the scripts, in their order


def look(
    page: Path | str,
    width: int,
    picture: Path | None = None,
    height: int = 900,
    scripts: Sequence[str] = (),
    whole: bool = True,
    javascript: bool = True,
) -> Seen:
    """Open a file, or an address of this machine, in a window of CSS pixels; run scripts on it one after the other.

    The page is measured after the scripts. With `picture`, keep a PNG of the whole page, or of the window alone.
    """
    address = page if isinstance(page, str) else page.resolve().as_uri()
    visit = Visit(address, width, height, picture, tuple(scripts), whole, javascript)
    return asyncio.run(asyncio.wait_for(_look(_port(), visit), timeout=90))


@functools.cache
def _port() -> int:
    """The port of a browser that is started once and ends with this process."""
    profile = Path(tempfile.mkdtemp(prefix="chromium"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def end() -> None:
        browser.terminate()
        browser.wait(timeout=20)
        shutil.rmtree(profile, ignore_errors=True)  # its helpers may still write

    atexit.register(end)
    file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
    while not (file.exists() and file.read_text().count("\n")):
        assert time.monotonic() < deadline and browser.poll() is None, "Chromium does not start"
        time.sleep(0.05)
    return int(file.read_text().split()[0])


@dataclass(frozen=True)
class Visit:
    address: str
    width: int
    height: int
    picture: Path | None
    scripts: tuple[str, ...]
    whole: bool
    javascript: bool


async def _look(port: int, visit: Visit) -> Seen:
    import aiohttp

    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            tab = await answer.json()
        try:
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                return await _Tab(socket).visit(visit)
        finally:
            async with session.get(f"http://127.0.0.1:{port}/json/close/{tab['id']}"):
                pass


class _Tab:
    def __init__(self, socket: Any):
        self.socket, self.seen, self.count, self.loaded = socket, Seen(), 0, False
        self.address = ""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        number = self.count
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._next()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def _next(self) -> dict[str, Any]:
        message = json.loads((await self.socket.receive()).data)
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.seen.problems.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error", "assert"):
            self.seen.problems.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.seen.problems.append(str(params["exceptionDetails"]))
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith("data:") and not url.startswith(self.address):
                self.seen.problems.append(f"asked for {url}")
        return message

    async def evaluate(self, script: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def visit(self, visit: Visit) -> Seen:
        self.address = visit.address
        for domain in ("Page", "Log", "Runtime", "Network"):
            await self.call(f"{domain}.enable")
        size = {"width": visit.width, "height": visit.height, "deviceScaleFactor": 1, "mobile": visit.width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        if not visit.javascript:  # the page's own; that of `scripts` still runs
            await self.call("Emulation.setScriptExecutionDisabled", value=True)
        self.loaded = False
        await self.call("Page.navigate", url=visit.address)
        while not self.loaded:
            await self._next()
        for script in visit.scripts:
            self.seen.answers.append(await self.evaluate(script))
        self.seen.page = await self.evaluate(MEASURE)
        if visit.picture:
            shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=visit.whole)
            visit.picture.write_bytes(base64.b64decode(shot["data"]))
        return self.seen
