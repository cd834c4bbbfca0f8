"""What a person waits for in the studio: the first pictures, the next pair after a key, the fit after a vote.

    python benchmarks/studio.py [--votes 40] [--runs FOLDER]      on a machine that does nothing else; two cores
    python benchmarks/studio.py --browser                         the next pair as Chromium shows it, with its pictures
    python benchmarks/studio.py --way [--people warm3d ...] [--look 1.5]    votes, alignment, blind verdict, in parts

It opens `palate studio` in a process of its own on an empty folder, as a person would, waits until the pictures of the
pool are drawn ahead, and votes. Figures: seconds from the command to the first pair; milliseconds from a vote to the
answer with the next pair, and with --browser from the key to its two pictures on the screen (median, 95th percentile,
largest); milliseconds of a refit and of the card with its leave-one-out refits after that many votes; bytes of a page.

The whole way is that of simulated people of benchmarks/taste.py, one after the other, each in a studio of its own, who
err in one choice of ten (--errs) and look at each pair for --look seconds: from the command to the last of 24 blind
comparisons, where the better picture wins. Where a taste is not learnt after --votes, 10 more are given, and again. The
judge of the pictures is loaded before the clock starts. Limits: 4 minutes in all, 60 seconds from the click on Align to
the end of the run without loading.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from palate.rewards.emoji import load_reward
from palate.runtime.images import from_pixels
from palate.studio.artist import POOL
from palate.taste.features import features_of
from palate.taste.learner import fit, leave_one_out
from palate.taste.taste import SIDE_STD

LIMITS = {"first pair, s": 10.0, "next pair, ms": 100.0, "fit, ms": 50.0, "page, bytes": 300_000}
WAY = {"all, s": 240.0, "training, s": 60.0}
MOST = 120  # votes


class Studio:
    """`palate studio` in a process of its own, and a client that is let in."""

    def __init__(self, runs: Path):
        self.began = time.perf_counter()
        command = [sys.executable, "-m", "palate", "studio", "--port", "0", "--no-browser", "--runs", str(runs)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http\S+", self.process.stdout.readline())
        if found is None:
            raise RuntimeError("palate studio printed no link")
        self.link = found[0]
        self.root = self.link.partition("/?")[0]

    def client(self) -> httpx.Client:
        made = httpx.Client(base_url=self.root, follow_redirects=True, timeout=60, trust_env=False)
        made.get(self.link)
        return made

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def until(found: Callable[[], Any], seconds: float = 300.0) -> Any:
    """What `found` returns once it is true. RuntimeError after the time."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise RuntimeError("waited too long")


def spread(milliseconds: list[float]) -> str:
    """Median, 95th percentile and largest."""
    return "median {:.0f}, p95 {:.0f}, largest {:.0f}".format(*np.percentile(milliseconds, [50, 95, 100]))


def pair_of(page: str) -> str:
    found = re.search(r'data-pair="(\w+)"', page)
    return found[1] if found else ""


def by_requests(client: httpx.Client, votes: int) -> list[float]:
    """Milliseconds from each vote to the answer that holds the next pair."""
    times = []
    for k in range(votes):
        pair = until(lambda: pair_of(client.get("/choose/pair").text))
        began = time.perf_counter()
        answer = client.post("/choose/vote", data={"pair": pair, "choice": ("left", "right")[k % 2]})
        times.append(1000 * (time.perf_counter() - began))
        if pair_of(answer.text) in ("", pair):
            raise RuntimeError("the next pair did not come with the vote: the pool ran dry")
    return times


SHOWN = """
const done = arguments[0], before = document.querySelector("[data-pair]").dataset.pair, began = performance.now();
const look = () => {
  const pair = document.querySelector("[data-pair]");
  const whole = pair && pair.dataset.pair !== before && [...pair.querySelectorAll("img")].every((i) => i.complete);
  whole ? done(performance.now() - began) : requestAnimationFrame(look);
};
document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
requestAnimationFrame(look);
"""


def by_browser(link: str, root: str, votes: int) -> list[float]:
    """Milliseconds from each key to the next pair's two pictures, in a headless Chromium with its driver."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--no-proxy-server",
    ):  # fmt: skip
        options.add_argument(argument)
    page = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        page.set_script_timeout(60)
        page.get(link)
        page.get(root + "/choose")
        until(lambda: page.execute_script("return !!document.querySelector('[data-pair]')"))
        return [float(page.execute_async_script(SHOWN)) for _ in range(votes)]
    finally:
        page.quit()


def fits(votes: int, repeats: int = 20) -> tuple[list[float], list[float]]:
    """Milliseconds of a refit with all priors, and of the leave-one-out refits, on made-up votes."""
    rng, columns = np.random.default_rng(0), len(features_of(load_reward("emoji"), "emoji").columns)
    d, w = rng.normal(size=(votes, columns)), rng.normal(size=columns)
    y = (rng.random(votes) < 1 / (1 + np.exp(-(d @ w) / 4))).astype(float)
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for times, call in zip(found, (fit, leave_one_out), strict=True):
            began = time.perf_counter()
            call(d, y, side_std=SIDE_STD)
            times.append(1000 * (time.perf_counter() - began))
    return found


class Person:
    """Somebody of a known taste in front of the pages: looks at two pictures, and chooses."""

    def __init__(self, name: str, look: float, errs: float):
        from taste import people

        from palate.evaluate import embedded_panel

        self.utility, self.look, self.errs = people(embedded_panel())[name], look, errs
        self.rng = np.random.default_rng(0)
        self.looked = 0.0  # seconds

    def choice(self, client: httpx.Client, page: str, *, surely: bool = False) -> str:
        """left or right, for the pair on that part of a page. surely: without an error."""
        files = re.findall(r'src="(/picture/[^"]+)"', page)[:2]
        prompt = html.unescape(re.search(r'<h2 class="prompt">([^<]*)', page)[1]).strip()  # type: ignore[index]
        images = torch.stack([from_pixels(np.asarray(Image.open(io.BytesIO(client.get(f).content)))) for f in files])
        with torch.no_grad():
            left, right = self.utility(images, [prompt, prompt]).tolist()
        time.sleep(self.look)
        self.looked += self.look
        return ("left", "right")[(left < right) != (not surely and self.rng.random() < self.errs)]


def vote(client: httpx.Client, person: Person, count: int) -> None:
    """That many choices more."""
    for _ in range(count):
        page = until(lambda: pair_of(found := client.get("/choose/pair").text) and found)
        client.post("/choose/vote", data={"pair": pair_of(page), "choice": person.choice(client, page)})


def state_of(page: str) -> str:
    found = re.search(r'data-testid="run-state" data-state="(\w+)"', page)
    return found[1] if found else ""


def trained(client: httpx.Client, runs: Path) -> tuple[str, dict[str, Any]]:
    """Click on Align, and wait for the end of the run: its name, and seconds of loading, of training and of updates."""
    began = time.perf_counter()
    answer = client.post("/align/start", headers={"hx-request": "true"})
    if "hx-redirect" not in answer.headers:
        raise RuntimeError(f"no alignment is offered: {' '.join(re.sub('<[^>]*>', ' ', answer.text).split())}")
    run = answer.headers["hx-redirect"].partition("run=")[2]
    until(lambda: state_of(client.get("/live", params={"run": run}).text) not in ("", "waiting"), 300)
    loaded = time.perf_counter()
    state = until(
        lambda: (
            (now := state_of(client.get("/live", params={"run": run}).text)) not in ("", "waiting", "running") and now
        ),
        3600,
    )
    ended = time.perf_counter()
    if state != "finished":
        raise RuntimeError(f"the run {state}: {client.get(f'/runs/{run}/log').text[-300:]}")
    rows = [json.loads(line) for line in (runs / run / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [row["step_seconds"] for row in rows if row.get("event") == "step"]
    stopped = [row["verdict"] for row in rows if row.get("event") == "guard" and row.get("action") == "stop"]
    return run, {"loading": loaded - began, "training": ended - loaded, "updates": sum(steps), "steps": len(steps),
                 "ended": f"by the guard: {stopped[-1]}" if stopped else "after all updates"}  # fmt: skip


def the_way(studio: Studio, client: httpx.Client, runs: Path, person: Person, votes: int) -> dict[str, float]:
    """Vote, align, compare blindly; prints each part. Returns the votes given and, in seconds, "all" and "training"."""
    until(lambda: pair_of(client.get("/choose").text))
    first = time.perf_counter() - studio.began
    began, given = time.perf_counter(), votes
    vote(client, person, votes)
    while 'data-testid="align-start" disabled' in client.get("/align").text and given < MOST:
        vote(client, person, 10)
        given += 10
    voting = time.perf_counter() - began
    name, run = trained(client, runs)
    began = time.perf_counter()
    client.post("/compare/start", data={"run": name})
    drawn, looked = time.perf_counter() - began, person.looked
    while pair_of_study(page := client.get("/compare", params={"run": name}).text):
        study, number = pair_of_study(page)
        shown = page[page.index('id="blind"') :]
        client.post(
            "/compare/answer",
            data={"study": study, "number": number, "choice": person.choice(client, shown, surely=True)},
        )
    verdict = time.perf_counter() - began - drawn
    total = time.perf_counter() - studio.began
    rate = re.search(r'data-rate="([\d.]+)">([^<]+)', page)
    print(f"first pair {first:.1f} s after the command")
    print(f"{given} votes {voting:.1f} s, of which looking {looked:.1f}")
    print(f"align: loading {run['loading']:.1f} s, training {run['training']:.1f} s "
          f"({run['steps']} updates in {run['updates']:.1f}, the rest guard, previews, checkpoints), "
          f"ended {run['ended']}")  # fmt: skip
    print(f"blind study: drawing {drawn:.1f} s, answering {verdict:.1f}, of which looking {person.looked - looked:.1f}")
    print(f"in all {total:.1f} s; {rate[2] if rate else 'no win rate'}", flush=True)
    return {"votes": given, "all, s": total, "training, s": run["training"]}


def the_ways(people: list[str], votes: int, look: float, errs: float) -> None:
    """The way of each of the people, in a studio of its own on an empty folder; then all of them beside the limits."""
    print(f"{os.cpu_count()} cores; limits: " + ", ".join(f"{key} {limit:g}" for key, limit in WAY.items()))
    found = {}
    for name in people:
        person = Person(name, look, errs)
        with tempfile.TemporaryDirectory(prefix="palate-studio-") as folder:
            studio = Studio(Path(folder))
            print(f"\n{name}")
            try:
                found[name] = the_way(studio, studio.client(), Path(folder), person, votes)
            except RuntimeError as error:
                print(f"went no further: {error}")
            finally:
                studio.close()
    print()
    for key, limit in WAY.items() if found else ():
        values = [way[key] for way in found.values()]
        print(f"{key}: {sum(value <= limit for value in values)} of {len(people)} within {limit:g}, "
              f"median {np.median(values):.1f}, {min(values):.1f} to {max(values):.1f}")  # fmt: skip


def pair_of_study(page: str) -> tuple[str, str] | None:
    """(study, number) of the pair that a comparison shows; None at its end."""
    found = re.search(r'name="study" value="([^"]+)"><input type="hidden" name="number" value="(\d+)"', page)
    return (found[1], found[2]) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=40)
    parser.add_argument(
        "--runs", type=Path, default=None, help="an empty folder; None = a temporary one, as --way takes"
    )
    parser.add_argument("--pool", type=int, default=POOL, help="pictures that are drawn before the voting begins")
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--way", action="store_true")
    parser.add_argument("--people", nargs="+", default=["warm3d"], help="of --way, by their names in taste.py")
    parser.add_argument("--look", type=float, default=1.5, help="seconds that the person of --way looks at a pair")
    parser.add_argument("--errs", type=float, default=0.1, help="share of that person's votes that are wrong")
    given = parser.parse_args()
    if given.way:
        the_ways(given.people, given.votes, given.look, given.errs)
        return
    runs = given.runs or Path(tempfile.mkdtemp(prefix="palate-studio-"))
    studio = Studio(runs)
    try:
        client = studio.client()
        until(lambda: pair_of(client.get("/choose").text))
        first = time.perf_counter() - studio.began
        page = client.get("/choose").text
        weight = len(page) + sum(len(client.get(x).content) for x in set(re.findall(r'"(/static[^"]+)"', page)))
        pictures = runs / "studio" / "pictures"
        until(lambda: len(list(pictures.iterdir())) >= given.pool, 1800)
        invited = client.post("/invite").text if given.browser else ""
        times = by_browser(invited, studio.root, given.votes) if given.browser else by_requests(client, given.votes)
    finally:
        studio.close()
        if given.runs is None:
            shutil.rmtree(runs, ignore_errors=True)
    refits, cards = fits(given.votes)
    print(f"{os.cpu_count()} cores; limits: " + ", ".join(f"{name} {limit:g}" for name, limit in LIMITS.items()))
    print(f"first pair {first:.1f} s after the command; page {weight} bytes without pictures")
    how = "from the key to the pictures" if given.browser else "from the vote to the answer"
    print(f"next pair, {given.votes} votes, {how}: {spread(times)} ms")
    print(f"fit of {given.votes} votes: {spread(refits)} ms; leave-one-out refits: {spread(cards)} ms")


if __name__ == "__main__":
    main()
