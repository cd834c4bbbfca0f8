"""A studio on an empty folder, its first pictures drawn; a browser that talks to one in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.studio import wait_for

TOKEN = "a-token-of-the-tests"
SMALL = str(Path(__file__).with_name("small_studio.py"))
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """(a client that is let in, the studio): model loaded, some pictures drawn."""
    from starlette.testclient import TestClient

    from palate.studio.app import make_app

    access = make_app(tmp_path_factory.mktemp("runs"), token=TOKEN)
    found = access.app.state.studio
    found.artist.size = 32
    with TestClient(access, base_url="http://localhost") as client:
        assert client.get(f"/?token={TOKEN}").status_code == 200
        assert found.artist.wait(60), found.artist.problem
        wait_for(lambda: len(found.artist.rows()) >= 32, 60, "pictures")
        yield client, found


class Server:
    """`palate studio` in a process of its own."""

    def __init__(self, runs, port=0):
        self.runs = runs
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, SMALL, "studio", "--port", str(port), "--no-browser", "--runs", str(runs)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.line = self.process.stdout.readline()
        found = re.search(r"http\S+", self.line)
        if not found:
            self.process.kill()
            pytest.fail(f"no link in {self.line!r}: {self.process.communicate()[1]}")
        self.url = found[0]
        self.root = re.match(r"http://[^/]+", self.url)[0]

    def kill(self, number=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.communicate(timeout=30)

    def end(self):
        """The server, and the trainers that it began: those outlive it by design."""
        from palate.studio.process import began

        self.kill()
        for path in (self.runs / "studio" / "processes").glob("*.json"):
            tree = json.loads(path.read_text("utf-8"))
            if tree["began"] and began(tree["pid"]) == tree["began"]:
                os.kill(tree["pid"], signal.SIGKILL)


@pytest.fixture
def serve():
    """serve(runs) -> a running Server; all end with the test."""
    servers = []

    def begin(runs, port=0):
        servers.append(Server(runs, port))
        return servers[-1]

    yield begin
    for server in servers:
        server.end()


def show_on(driver, width, height=900, dark=False):
    """A screen of that size and colour scheme; a phone below 500 pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@pytest.fixture
def show():
    """show(driver, width, height, dark): another screen for a browser that is open."""
    return show_on


@pytest.fixture
def browser():
    """browser(width) -> a headless Chromium; skipped where there is none."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its driver on this machine: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    class Settled(webdriver.Chrome):
        """One whose get and refresh end when the new page is there: the driver's own may end while it is parsed."""

        def get(self, url):
            super().get(url)
            self.settle()

        def refresh(self):
            super().refresh()
            self.settle()

        def settle(self):
            script = "return document.readyState === 'complete' && !!document.body?.childElementCount"
            wait_for(lambda: self.execute_script(script), 60, "the page")

    drivers = []

    def begin(width=1200, height=900, dark=False):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--no-proxy-server", f"--window-size={width},{height}",
        ):  # fmt: skip
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = Settled(options=options, service=Service(DRIVER))
        drivers.append(driver)
        driver.set_page_load_timeout(60)
        show_on(driver, width, height, dark)
        return driver

    yield begin
    for driver in drivers:
        driver.quit()
