"""Headless Chromium for pages that are files: what it shows, what it complains of, and what it asks the network for."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,900",
)


@contextmanager
def open_browser(profile: Path) -> Iterator[Any]:
    """A selenium driver with a fresh profile; skips where something is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium, or -e '.[test]'")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(programs.values()):
        pytest.skip("there is no chromium with chromedriver: on Debian, apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, path: Path) -> None:
    """Load a file, and forget what was logged before."""
    driver.get("about:blank")
    complaints(driver)
    requests(driver)
    driver.get(path.resolve().as_uri())


def complaints(driver: Any) -> list[str]:
    """What the console says since it was last asked: errors, warnings and breaches of the page's policy."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """Addresses asked for since this was last called, those of files left out."""
    events = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    urls = (event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent")
    return [url for url in urls if not url.startswith(("file:", "data:"))]


@contextmanager
def screen(driver: Any, width: int, height: int = 844, dark: bool = False) -> Iterator[None]:
    """Another screen for a while: that of a phone, or a dark one."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
