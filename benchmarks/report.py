"""python -m benchmarks.report PAGE.html [--out DIR]: pictures of a report, and how long it takes to open, in a real Chromium.

Needs Debian's chromium (or another; CHROMIUM names it) and the wheel of playwright, which downloads nothing for it:
apt-get install chromium; pip install playwright. The pictures: light.png, dark.png (the whole page above the samples),
samples-light.png, samples-dark.png (the browser with an opened sample) and tokens.png (its tokens coloured).
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.errors import InputError
from trainer.cli import run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTH, HEIGHT = 1440, 900
TIMEOUT = 10.0
"""Seconds in which whatever is waited for must come."""
SETTLE = 300.0
"""Milliseconds that a key's work is given before a picture."""


@dataclass(slots=True)
class Opened:
    """A page in a browser. errors: what its console said; requests: the addresses it asked for besides its own file; seconds:
    from navigation until the list had answered a key."""

    page: Page
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def missing() -> str | None:
    """What keeps this machine from opening a page, None for nothing."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright)"
    return None if chromium() else "no chromium on PATH (apt-get install chromium, or CHROMIUM=its path)"


def chromium() -> str | None:
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless Chromium. Raises InputError where there is none."""
    if why := missing():
        raise InputError(f"no browser: {why}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root, which CI often is, has no sandbox in Chromium.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, path: Path, *, scheme: str = "light") -> Iterator[Opened]:
    """The page of a file, ready to use. scheme: what the system prefers, light or dark."""
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce", device_scale_factor=1.5
    )
    page = context.new_page()
    page.set_default_timeout(1000 * TIMEOUT)
    found = Opened(page)
    own = path.resolve().as_uri()
    page.on("console", lambda message: found.errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((own, "data:")) else found.requests.append(request.url))
    try:
        started = time.monotonic()
        page.goto(own, wait_until="commit")
        wait_until(page, "performance.getEntriesByName('interactive').length > 0")
        if page.evaluate("COUNT > 1"):
            page.keyboard.press("j")
            page.wait_for_selector("#option-1[aria-selected=true]")
        found.seconds = time.monotonic() - started
        yield found
    finally:
        context.close()


def wait_until(page: Page, expression: str, argument: object = None) -> None:
    """Until the expression is true in the page. Asked again from here: the page's policy forbids what playwright's own wait does.
    Raises TimeoutError."""
    until = time.monotonic() + TIMEOUT
    while not page.evaluate(expression, argument):
        if time.monotonic() > until:
            raise TimeoutError(f"{expression} did not come true in {TIMEOUT:.0f} s")
        time.sleep(0.02)


def take_pictures(path: Path, out: Path) -> tuple[list[Path], float]:
    """Returns (the files written, seconds until the page could be used)."""
    out.mkdir(parents=True, exist_ok=True)
    written = []

    def shoot(page: Page, name: str, **options) -> None:
        written.append(out / f"{name}.png")
        page.screenshot(path=written[-1], **options)

    with launched() as browser:
        for scheme in ("light", "dark"):
            with opened(browser, path, scheme=scheme) as found:
                page, seconds = found.page, found.seconds
                page.evaluate("scrollTo(0, 0)")
                end = page.evaluate("document.getElementById('samples').offsetTop")
                shoot(page, scheme, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": end})
                if not page.evaluate("COUNT > 0"):
                    continue
                page.evaluate("document.getElementById('samples').scrollIntoView()")
                page.keyboard.press("f")
                page.wait_for_timeout(SETTLE)
                shoot(page, f"samples-{scheme}")
                if scheme == "light":
                    page.keyboard.press("t")
                    page.wait_for_timeout(SETTLE)
                    shoot(page, "tokens")
    return written, seconds


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, metavar="PAGE.html", help="what python -m trainer.report wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go (default: beside the page)")
    arguments = parser.parse_args(argv)
    if not arguments.page.is_file():
        raise InputError(f"{arguments.page}: no such file; write it with python -m trainer.report RUN")
    pictures, seconds = take_pictures(arguments.page, arguments.out or arguments.page.parent)
    for picture in pictures:
        print(picture)
    print(f"could be used after {seconds:.2f} s, {arguments.page.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run(main)
