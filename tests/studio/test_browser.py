"""The studio in a real Chromium: a person's whole way, interruptions, two windows, phone, keyboard, hostile prompts."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from PIL import Image
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.studio import HOSTILE, wait_for

from palate import recipe
from palate.runtime.files import write_atomically
from palate.studio.shared import PAGES
from palate.taste.votes import Picture, Vote, VoteStore

pytestmark = pytest.mark.slow
WARMER = """
const warmth = (image) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, 64, 64);
  const pixels = context.getImageData(0, 0, 64, 64).data;
  let sum = 0;
  for (let k = 0; k < pixels.length; k += 4) sum += pixels[k] - pixels[k + 2];
  return sum;
};
const [left, right] = ["left", "right"].map((side) => document.querySelector(`[data-testid=${side}] img`));
return left.complete && right.complete ? warmth(left) > warmth(right) : null;
"""


def get(page, name):
    return page.find_element(By.CSS_SELECTOR, f'[data-testid="{name}"]')


def text(page, name):
    """The text of an element; "" while it is not there, or is being changed."""
    try:
        return get(page, name).text
    except (NoSuchElementException, StaleElementReferenceException):
        return ""


def click(page, name):
    """Press a button once it can be pressed; a live part may be put in its place anew meanwhile."""

    def pressed():
        try:
            found = get(page, name)
            if not found.is_enabled():
                return False
            found.click()
            return True
        except (NoSuchElementException, StaleElementReferenceException):
            return False

    wait_for(pressed, 60, f"{name} to be pressed")


def press(page, key):
    ActionChains(page).send_keys(key).perform()


def votes(page):
    return int(text(page, "votes") or -1)


def pair_id(page):
    return page.execute_script("return document.querySelector('[data-pair]')?.dataset.pair ?? ''")


def vote(page, count, key=None):
    """Choose `count` times, the warmer picture unless a key is given; the seconds from a key to the next pair."""
    times = []
    for _ in range(count):
        warmer = wait_for(lambda: [page.execute_script(WARMER)] if pair_id(page) else None, 60, "a pair")[0]
        if warmer is None:
            wait_for(lambda: page.execute_script(WARMER) is not None, 60, "its pictures")
            warmer = page.execute_script(WARMER)
        before, began = pair_id(page), time.perf_counter()
        press(page, key or (Keys.ARROW_LEFT if warmer else Keys.ARROW_RIGHT))
        wait_for(lambda before=before: pair_id(page) not in ("", before), 60, "the next pair")
        times.append(time.perf_counter() - began)
    return times


def choose_until_learnt(page, server, most=64):
    """Ends on the Align page. Which pairs come depends on how quickly the keys follow each other, so that 24 choices
    teach the taste on most machines, not on all: as a person would, choose more where the page asks for it."""
    page.get(server.root + "/align")
    while not get(page, "align-start").is_enabled():
        page.get(server.root + "/choose")
        wait_for(lambda: pair_id(page), 60, "a pair")
        assert votes(page) < most, "the taste of whoever chooses the warmer picture is not learnt"
        vote(page, 8)
        page.get(server.root + "/align")


def complaints(page, root):
    """Errors on the console, and requests that went elsewhere."""
    found = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    found = [line for line in found if "favicon" not in line]
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith((root, "data:", "blob:", "about:", "chrome")):
                found.append(url)
    return found


@pytest.fixture
def open_studio(serve, browser):
    """open_studio(runs, width) -> (page, server): let in, the first pair on the screen."""

    def begin(runs, **screen):
        server = serve(runs)
        page = browser(**screen)
        page.get(server.url)
        page.get(server.root + "/choose")
        wait_for(lambda: pair_id(page), 60, "the first pair")
        return page, server

    return begin


def test_a_persons_whole_way(open_studio, show, tmp_path):
    """Vote 24, reload in the middle, align, steer, lose the trainer, resume, stop, compare, export."""
    page, server = open_studio(tmp_path)
    vote(page, 11)
    shown = pair_id(page)
    page.refresh()
    assert votes(page) == 11 and pair_id(page) == shown  # nothing lives in the page
    press(page, Keys.BACKSPACE)
    wait_for(lambda: votes(page) == 10, 60, "the vote taken back")
    vote(page, 14)
    assert votes(page) == 24
    accuracy = wait_for(lambda: text(page, "taste-accuracy"), 60, "the taste")
    assert "% (" in accuracy

    choose_until_learnt(page, server)
    click(page, "align-start")
    wait_for(lambda: "run=align-1" in page.current_url, 60, "the run's page")
    wait_for(lambda: int(text(page, "step") or 0) >= 3, 120, "its first steps")
    assert text(page, "run-state") == "Running"

    pid = json.loads((tmp_path / "studio/processes/align-1.json").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)  # its thirty updates take ten seconds, less than this page on a slow machine
    page.get(server.root + "/steer")
    get(page, "word-add").send_keys("watercolour")
    click(page, "word-wanted")
    assert "near" in wait_for(lambda: text(page, "refused"), 60, "the refusal")
    wait_for(lambda: get(page, "word-add").get_property("value") == "watercolour", 60, "the refused word to come back")
    get(page, "word-add").clear()
    get(page, "word-add").send_keys("cartoon")
    click(page, "word-wanted")
    wait_for(lambda: "from the next step" in text(page, "word-chip"), 60, "the word")
    os.kill(pid, signal.SIGCONT)

    run = tmp_path / "align-1"
    wait_for(lambda: '"steer"' in (run / "metrics.jsonl").read_text("utf-8"), 60, "the trainer to take the word")
    wait_for(lambda: list(run.glob("checkpoints/step-*")), 60, "a checkpoint")
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: "from step" in text(page, "word-chip"), 60, "the step at which the word took effect")
    os.kill(pid, signal.SIGKILL)
    page.get(server.root + "/align?run=align-1")
    wait_for(lambda: text(page, "run-state") == "Died", 60, "the run to show as died")
    reached = int(text(page, "step"))
    click(page, "resume")
    wait_for(lambda: text(page, "run-state") == "Running", 60, "the run to go on")
    wait_for(lambda: int(text(page, "step") or 0) > reached, 120, "more steps")
    click(page, "align-stop")
    wait_for(lambda: text(page, "run-state") in ("Stopped", "Finished"), 60, "the run to stop")

    page.get(server.root + "/compare?run=align-1")
    click(page, "blind-start")
    for number in range(6):
        shown = "return document.querySelector('#blind .prompt')?.textContent ?? ''"
        wait_for(lambda n=number, script=shown: f" {n + 1} of" in page.execute_script(script), 60, "a pair")
        press(page, Keys.ARROW_LEFT if page.execute_script(WARMER) else Keys.ARROW_RIGHT)
    assert "% (" in wait_for(lambda: "% (" in text(page, "win-rate") and text(page, "win-rate"), 60, "the win rate")

    page.get(server.root + "/runs")
    assert get(page, "run-state").text in ("Stopped", "Finished")
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path / "down")})
    click(page, "export-comfyui")
    wait_for(lambda: list((tmp_path / "down").glob("*.safetensors")), 60, "the download")
    for width, dark in SCREENS:
        show(page, width, dark=dark)
        for path in ("/align?run=align-1", "/steer?run=align-1", "/compare?run=align-1", "/runs"):
            check_fit(page, server.root + path)
    assert not complaints(page, server.root)


def test_two_windows_a_killed_server_and_every_key(open_studio, serve, browser, tmp_path):
    page, server = open_studio(tmp_path)
    vote(page, 1, Keys.ARROW_DOWN)
    vote(page, 1, Keys.ARROW_UP)
    first = page.current_window_handle
    page.switch_to.new_window("tab")
    page.get(server.root + "/choose")
    wait_for(lambda: votes(page) == 2, 60, "the other window's votes")
    shown = pair_id(page)
    vote(page, 1, Keys.ARROW_LEFT)
    page.switch_to.window(first)
    assert pair_id(page) == shown  # this window is older
    press(page, Keys.ARROW_RIGHT)  # about a pair that was voted on: it counts once, and the newer pair comes
    wait_for(lambda: pair_id(page) != shown, 60, "the newer pair")
    assert votes(page) == 3
    script = "document.querySelector('details').open = true; document.querySelector('[name=mode]').focus()"
    page.execute_script(script)
    press(page, Keys.ARROW_DOWN)  # the arrow keys of a choice of settings are its own, and no vote
    assert page.execute_script("return document.activeElement.value") == "champion"
    page.execute_script("document.activeElement.blur()")
    server.kill(signal.SIGKILL)
    press(page, Keys.ARROW_LEFT)
    notice = "return document.querySelector('#notice').textContent"
    wait_for(lambda: "does not answer" in page.execute_script(notice), 60, "a word about the studio that has ended")
    again = serve(tmp_path)
    other = browser()
    other.get(again.url)
    other.get(again.root + "/choose")
    wait_for(lambda: votes(other) == 3, 60, "the votes after the server was killed")
    assert [v.choice for v in VoteStore(tmp_path / "studio").read()] == ["tie", "both-bad", "left"]


def test_own_pictures_are_added_by_a_form(open_studio, tmp_path):
    """A form of the browser's own, without htmx: its Origin must be the studio's, or it is refused."""
    page, server = open_studio(tmp_path / "runs")
    for name, shade in (("better", 220), ("worse", 20)):
        Image.new("RGB", (40, 30), (shade, 90, 90)).save(tmp_path / f"{name}.png")
    page.find_element(By.CSS_SELECTOR, "details summary").click()
    for name in ("better", "worse"):
        page.find_element(By.NAME, name).send_keys(str(tmp_path / f"{name}.png"))
    page.find_element(By.NAME, "worse").submit()
    wait_for(lambda: votes(page) == 1, 60, "the vote")
    assert [v.choice for v in VoteStore(tmp_path / "runs/studio").read()] == ["left"]
    assert not complaints(page, server.root)


def test_pictures_are_enlarged_turned_and_held_without_a_keyboard(open_studio, tmp_path, show):
    """A phone has neither arrow keys nor a B to hold; what is shown while a button is held is said."""
    folder = tmp_path / "mine"
    for step, shade in ((0, 10), (5, 200)):
        place = folder / f"samples/step-{step:06d}"
        place.mkdir(parents=True)
        rows = [{"file": f"{k:04d}.png", "prompt": f"a {name}", "seed": 0} for k, name in enumerate(("dog", "owl"))]
        (place / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for k in range(2):
            Image.new("RGB", (64, 64), (shade, 90 * k, 90)).save(place / f"{k:04d}.png")
    (folder / "recipe.yaml").write_text(recipe.dump(recipe.read("direct-emoji", [f"run.folder='{folder}'"])))
    page, server = open_studio(tmp_path, width=390, height=844)
    page.get(server.root + "/compare?run=mine")
    page.find_element(By.CSS_SELECTOR, "[data-lightbox]").click()

    def shown():
        image = page.find_element(By.ID, "lightbox-image").get_attribute("src")
        return image.split("/mine/")[1], page.find_element(By.ID, "lightbox-text").text

    assert shown() == ("5/0000.png", "a dog")
    page.find_element(By.CSS_SELECTOR, "[data-turn='1']").click()
    assert shown() == ("5/0001.png", "an owl")
    hold = page.find_element(By.CSS_SELECTOR, "dialog [data-hold]")
    ActionChains(page).click_and_hold(hold).perform()
    assert shown() == ("0/0001.png", "an owl (before)")
    ActionChains(page).release().perform()
    assert shown() == ("5/0001.png", "an owl")
    page.execute_script("arguments[0].focus()", hold)
    ActionChains(page).key_down(Keys.ENTER).perform()
    assert shown()[0] == "0/0001.png"
    ActionChains(page).key_up(Keys.ENTER).perform()
    assert shown()[0] == "5/0001.png"
    for width, height in ((390, 844), (1200, 620)):
        show(page, width, height)
        bottom = page.execute_script("return document.querySelector('dialog .bar').getBoundingClientRect().bottom")
        assert bottom <= height, (width, bottom)
    press(page, Keys.ESCAPE)
    move = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    for step in (0, 5):  # what is said of the pictures follows the slider as they do
        page.execute_script(move, page.find_element(By.CSS_SELECTOR, "[data-slider]"), step)
        walls = page.find_elements(By.CSS_SELECTOR, "[data-wall] .after")
        assert [image.get_attribute("alt") for image in walls] == [f"a dog, step {step}", f"an owl, step {step}"]
        assert [image.get_attribute("src").split("/mine/")[1][:2] for image in walls] == [f"{step}/"] * 2
    assert not complaints(page, server.root)


def test_the_log_and_the_report_lead_back_on_a_phone_and_a_desk(open_studio, tmp_path, show):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.dump(recipe.read("direct-emoji", [f"run.folder='{folder}'"])))
    (folder / "metrics.jsonl").write_text('{"step": 1, "event": "step", "loss": 0.0, "reward": 0.1}\n')
    page, server = open_studio(tmp_path)
    for width, height in ((1280, 800), (390, 844)):
        show(page, width, height)
        for part in ("Report", "Log"):
            page.get(server.root + "/runs")
            page.find_element(By.LINK_TEXT, part).click()
            wait_for(lambda part=part: part.lower() in page.current_url, 60, part)
            assert page.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
            if part == "Report":
                assert page.execute_script("return document.documentElement.scrollHeight - innerHeight") <= 0
                frame = page.find_element(By.TAG_NAME, "iframe")
                assert frame.size["height"] > height - 120 and frame.size["width"] == width
                page.switch_to.frame(frame)
                wait_for(lambda: page.find_element(By.TAG_NAME, "h1").text == "mine", 60, "the report")
                page.switch_to.default_content()
            page.find_element(By.LINK_TEXT, "Runs").click()
            wait_for(lambda: page.current_url == server.root + "/runs", 60, "the list of runs")
    assert not complaints(page, server.root)


def test_two_presses_start_one_run_and_a_long_link_stays_on_the_screen(open_studio, tmp_path):
    page, server = open_studio(tmp_path, width=390, height=844)
    page.get(server.root + "/")
    page.execute_script("for (const part of document.querySelectorAll('details')) part.open = true;")
    page.find_element(By.CSS_SELECTOR, "[hx-post='/invite']").click()
    wait_for(lambda: "token=" in page.find_element(By.ID, "invitation").text, 60, "the link")
    assert page.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
    page.get(server.root + "/steer")
    get(page, "word-add").send_keys("cartoon", Keys.ENTER)
    wait_for(lambda: text(page, "word-chip"), 60, "the word")
    start = get(page, "steer-start")
    page.execute_script("arguments[0].click(); arguments[0].click();", start)
    wait_for(lambda: "run=steer-1" in page.current_url, 60, "the run's page")
    assert [path.name for path in tmp_path.glob("steer-*")] == ["steer-1"]
    assert not complaints(page, server.root)


def test_fifty_hostile_prompts_run_nothing(open_studio, tmp_path):
    page, server = open_studio(tmp_path)
    vote(page, 1)
    store = VoteStore(tmp_path / "studio")
    pictures = [store.read()[0].left.file, store.read()[0].right.file]
    prompts = (HOSTILE * 3)[:50]
    for i, prompt in enumerate(prompts):
        store.append(Vote(prompt, Picture(pictures[0], prompt), Picture(pictures[1], prompt), "left", id=f"h{i}"))
        tree = {"id": f"x{i}", "prompt": prompt, "repeat_of": None,
                "left": {"file": pictures[0]}, "right": {"file": pictures[1]}}  # fmt: skip
        write_atomically(tmp_path / "studio" / "pair.json", json.dumps(tree).encode())  # an open page may read it now
        page.get(server.root + "/choose")
        assert pair_id(page) == f"x{i}" and page.execute_script("return window.pwned") is None
    page.get(server.root + "/align")
    for word in HOSTILE[:6]:
        page.get(server.root + "/steer")
        get(page, "word-add").send_keys(word)
        click(page, "word-wanted")
        wait_for(lambda: text(page, "refused"), 60, "the refusal")
        assert page.execute_script("return window.pwned") is None
    assert not complaints(page, server.root)


FULL_DISK = """
import builtins, errno, io, os

def full(path):
    path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    return os.path.exists(os.environ["FULL_DISK"]) and str(path).startswith(os.environ["FULL_FOLDER"])

def refusing(call, writes):
    def asked(path, *given, **named):
        if writes(given, named) and full(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return call(path, *given, **named)
    return asked

opens = refusing(open, lambda given, named: set(str((*given, named.get("mode", "r"))[0])) & set("wax+"))
builtins.open = io.open = opens
for name in ("mkdir", "replace", "rename"):
    setattr(os, name, refusing(getattr(os, name), lambda given, named: True))
"""


def test_a_full_disk_is_said_and_loses_nothing(open_studio, tmp_path, monkeypatch):
    """Every write of the server and of the trainer below the runs fails while a file lies there, as on a full disk."""
    flag, runs = tmp_path / "full", tmp_path / "runs"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FULL_DISK)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("FULL_DISK", str(flag))
    monkeypatch.setenv("FULL_FOLDER", str(runs))
    page, server = open_studio(runs)
    vote(page, 2)
    shown = pair_id(page)
    flag.touch()
    press(page, Keys.ARROW_LEFT)
    wait_for(lambda: "free some space" in page.find_element(By.ID, "notice").text, 60, "the sentence")
    page.refresh()
    assert votes(page) == 2 and pair_id(page) == shown
    flag.unlink()
    vote(page, 1)
    assert votes(page) == 3 and len(VoteStore(runs / "studio").read()) == 3

    page.get(server.root + "/steer")
    get(page, "word-add").send_keys("cartoon")
    click(page, "word-wanted")
    wait_for(lambda: text(page, "word-chip"), 60, "the word")
    click(page, "steer-start")
    wait_for(lambda: int(text(page, "step") or 0) >= 6, 180, "a checkpoint")
    flag.touch()
    wait_for(lambda: text(page, "run-state") == "Died", 120, "the run to end")
    said = page.find_element(By.CSS_SELECTOR, "#live .notice").text
    assert "No space left" in said and "cannot write" in said
    flag.unlink()
    reached = int(text(page, "step"))
    click(page, "resume")
    wait_for(lambda: text(page, "run-state") == "Running", 90, "the run to go on")
    wait_for(lambda: int(text(page, "step") or 0) > reached, 120, "more steps")
    click(page, "align-stop")
    wait_for(lambda: text(page, "run-state") in ("Stopped", "Finished"), 90, "the run to stop")


def check_fit(page, address):
    """Nothing wider than the screen, contrast of texts at least 4.5, targets large enough for a finger."""
    page.get(address)
    wait_for(lambda: page.execute_script(SETTLED), 60, f"{address} to be whole")
    page.execute_script("for (const part of document.querySelectorAll('details')) part.open = true;")
    assert not page.execute_script(OUTSIDE), (address, page.execute_script(OUTSIDE))
    width = page.execute_script("return innerWidth")
    assert page.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0, (address, width)
    assert not page.execute_script(UNREADABLE), (address, width, page.execute_script(UNREADABLE))
    if width < 500:
        assert not page.execute_script(SMALL), (address, page.execute_script(SMALL))


def test_pages_fit_the_screen_and_can_be_read(open_studio, show, tmp_path):
    """Before and after the first taste; those of a run are looked at in the person's whole way."""
    page, server = open_studio(tmp_path)
    for count in (0, 20):
        page.get(server.root + "/choose")
        vote(page, count)
        for width, dark in SCREENS:
            show(page, width, dark=dark)
            for path, _ in PAGES:
                check_fit(page, server.root + path)
                assert bool(count) == bool(text(page, "taste-accuracy")) or path not in ("/choose", "/align")
    assert not complaints(page, server.root)


SCREENS = [(390, False), (390, True), (1200, False), (1200, True)]
SETTLED = "return document.readyState === 'complete' && !document.querySelector('.htmx-request')"
UNREADABLE = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
  .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] > 0.9) return colour;
  }
  return [255, 255, 255];
};
const found = [];
for (const node of document.querySelectorAll("main *, nav a")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!own || node.closest(":disabled, .sr, .skip, dialog, option") || !node.offsetParent) continue;
  const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) found.push(`${node.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
}
return found;
"""
OUTSIDE = """
return [...document.querySelectorAll("main .panel *")].filter((node) => node.offsetParent && !node.closest("svg, .sr"))
  .filter((node) => node.getBoundingClientRect().right > node.closest(".panel").getBoundingClientRect().right + 1)
  .map((node) => node.outerHTML.slice(0, 80));
"""
SMALL = """
return [...document.querySelectorAll("main button, main .button, main summary, nav a")]
  .filter((node) => node.offsetParent && !node.closest(".chip, .notice, dialog"))
  .filter((node) => node.getBoundingClientRect().height < 30)
  .map((node) => node.textContent.trim());
"""


def test_the_keyboard_alone_reaches_everything(open_studio, tmp_path):
    page, server = open_studio(tmp_path)
    page.get(server.root + "/steer")
    seen = []
    for _ in range(16):
        press(page, Keys.TAB)
        name, visible = page.execute_script(
            "const e = document.activeElement;"
            "if (e === document.body) return ['', false];"
            "return [e.dataset.testid ?? (e.textContent.trim() || e.name), e.matches(':focus-visible')]"
        )
        if not name:  # past the last element; the focus is not lost before
            assert "steer-start" in seen, seen
            continue
        assert visible, f"{name} has no visible focus"
        seen.append(name)
        if name == "word-add":
            ActionChains(page).send_keys("large", Keys.ENTER).perform()
            wait_for(lambda: text(page, "word-chip"), 60, "the word")
    for name in ("Skip to the page", "Choose", "word-add", "word-wanted", "word-unwanted", "steer-start"):
        assert name in seen, (name, seen)
