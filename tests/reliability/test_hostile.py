"""Files and texts from outside are data: none of them runs code, writes outside the run, or reaches the terminal raw.

An audit hook watches while each artefact is read: unpickling, child processes, sockets and every write are recorded.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save
from support.commands import RECIPE, short
from support.loop import run
from support.pages import fake_run

from palate import recipe
from palate.data import RecipeError, captioned_images, load_images, read_prompts
from palate.report import write_report
from palate.rewards.files import read_tensors, weights_file
from palate.runtime import checkpoint
from palate.runtime.progress import printable
from palate.testing import tiny_reward as reward
from palate.train import read_metrics

CANARY = "canary-3f9a1c"  # a secret; and the name of the file that hostile code would write


# ------------------------------------------------------------------------------------------------ the watch

WATCH: list[tuple[str, str]] | None = None
RUNS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
WRITES = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.symlink": 1,
    "os.link": 1,
    "shutil.rmtree": 0,
}


def _hook(event: str, arguments: tuple) -> None:
    if WATCH is None:
        return
    if event in RUNS:
        WATCH.append((event, str(arguments)[:200]))
    elif (
        event == "open"
        and isinstance(arguments[0], (str, bytes, Path))
        and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    ):
        WATCH.append(("write", os.fsdecode(arguments[0])))
    elif event in WRITES:
        WATCH.append(("write", str(arguments[WRITES[event]])))


sys.addaudithook(_hook)


@contextmanager
def watched(folder: Path):
    """AssertionError if what happens inside runs foreign code, or writes outside of `folder`."""
    global WATCH
    WATCH = []
    try:
        yield
    finally:
        seen, WATCH = WATCH, None
    inside = os.path.realpath(folder)
    for event, what in seen:
        assert event == "write", f"{event}: {what}"
        real = os.path.realpath(what)
        own = real.startswith(inside + os.sep) or real == inside or what == os.devnull
        assert own or "__pycache__" in real or "/torch" in real, f"wrote {what}"
    assert not [*Path(folder).rglob(f"*{CANARY}*"), *Path(folder).parent.glob(f"*{CANARY}*")]


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def bomb(folder: Path) -> bytes:
    return pickle.dumps(Bomb(folder.parent / CANARY))


def torch_bomb(folder: Path) -> bytes:
    data = io.BytesIO()
    torch.save({"a": Bomb(folder.parent / CANARY)}, data)
    return data.getvalue()


def test_the_watch_sees_what_it_should(tmp_path):
    (tmp_path / "in").mkdir()
    for act in (lambda: pickle.loads(bomb(tmp_path / "in" / "x")), lambda: (tmp_path / "out").write_text("x"),
                lambda: subprocess.run(["true"])):  # fmt: skip
        with pytest.raises(AssertionError), watched(tmp_path / "in"):
            act()
    (tmp_path / "in" / CANARY).unlink()  # which the first of them wrote
    with watched(tmp_path / "in"):
        (tmp_path / "in" / "file").write_text("x")


# ------------------------------------------------------------------------- pickles in the place of weights

EXTENSIONS = ("safetensors", "bin", "pt", "pth", "ckpt", "pkl", "pickle", "npy", "npz", "h5", "msgpack", "json",
              "yaml", "txt",
              "png", "jsonl")  # fmt: skip


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_pickle_under_any_extension_is_never_loaded(tmp_path, extension, kind):
    """As the weights of a reward, a recipe, a prompt file, a picture and a metrics file: refused by each, run by
    none."""
    folder = tmp_path / "in"
    folder.mkdir()
    file = folder / f"x.{extension}"
    file.write_bytes((bomb if kind == "pickle" else torch_bomb)(folder))
    shutil.copy(file, folder / "metrics.jsonl")
    with watched(folder):
        for read in (lambda: read_tensors(weights_file("hpsv2", str(file), default="x", how="")),
                     lambda: read_tensors(weights_file("hpsv2", str(folder), default=file.name, how="")),
                     lambda: recipe.read(str(file)), lambda: read_prompts(str(file)),
                     lambda: load_images([file], size=8), lambda: read_metrics(folder / "metrics.jsonl")):  # fmt: skip
            with pytest.raises(ValueError) as caught:
                read()
            assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("part", [checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST, "extra.pt", "model.bin"])
def test_a_pickle_inside_a_checkpoint_is_never_loaded(tmp_path, part):
    path = checkpoint.save(tmp_path / "in", 1, {"a": torch.zeros(2)}, {"trains": []})
    (path / part).write_bytes(bomb(tmp_path / "in"))
    with watched(tmp_path / "in"):
        if part in (checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST):
            assert checkpoint.verify(path)
        else:
            assert torch.equal(checkpoint.load(path).tensors["a"], torch.zeros(2))


def manifest(path: Path, **changes) -> None:
    files = {part: checkpoint.file_digest(path / part) for part in (checkpoint.STATE, checkpoint.TENSORS)}
    forged = {"schema": checkpoint.SCHEMA, "step": 1, "files": files} | changes
    (path / checkpoint.MANIFEST).write_bytes(checkpoint.canonical_json(forged))


@pytest.mark.parametrize("changes", [
    {"step": "../../x"}, {"step": -1}, {"step": None}, {"step": [1]}, {"files": {"../../../etc/passwd": "0"}},
    {"files": 3},
    {"files": {checkpoint.STATE: "0", "/etc/passwd": "0"}}, {"schema": "1"}, {"schema": 99},
])  # fmt: skip
def test_a_manifest_cannot_point_out_of_its_folder(tmp_path, changes):
    path = checkpoint.save(tmp_path / "in", 1, {"a": torch.zeros(2)}, {"trains": []})
    manifest(path, **changes)
    with watched(tmp_path / "in"):
        assert checkpoint.verify(path)


def header(length: int, text: bytes) -> bytes:
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize("data", [
    header(2**63, b"{}"), header(2**40, b"{}"), header(2, b"{}")[:5], header(8, b'{"a": 1}'),
    header(70, b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}    ') + b"0000",
    header(70, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999]}}      '), header(5000, b"[" * 5000),
])  # fmt: skip
def test_a_safetensors_header_that_lies_is_refused_without_its_gigabytes(tmp_path, data):
    path = checkpoint.save(tmp_path / "in", 1, {"a": torch.zeros(1)}, {"trains": []})
    (path / checkpoint.TENSORS).write_bytes(data)
    manifest(path)
    with watched(tmp_path / "in"):
        assert "unreadable" in checkpoint.verify(path)


# ------------------------------------------------------------------------------------------ bombs and archives


def png(width: int, height: int, chunks: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    data = b"Comment\0\0" + zlib.compress(b"a" * (200 << 20), 9)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../" + CANARY, "x")
        archive.writestr("zeros", b"\0" * (20 << 20))
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name in (f"../../{CANARY}", f"/tmp/{CANARY}"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    return data.getvalue()


BOMBS = {
    "huge.png": lambda: png(60_000, 60_000), "wide.png": lambda: png(2**31 - 1, 1), "flat.png": lambda: png(0, 0),
    "text.png": lambda: png(4, 4, text_bomb()), "cut.png": lambda: png(4000, 4000), "zip.png": zipped,
    "tar.png": tarred,
    "gzip.png": lambda: gzip.compress(b"\0" * (20 << 20)), "svg.png": lambda: b'<svg onload="alert(1)"/>',
    "empty.png": lambda: b"",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_is_a_bomb_is_refused(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(BOMBS[name]())
    with watched(folder), pytest.raises(RecipeError, match="cannot read the image"):
        load_images([folder / name], size=8)


@pytest.mark.parametrize("make", [zipped, tarred, lambda: gzip.compress(b"a dog\n"), lambda: b"\xff\xfe\x00" * 9])
def test_an_archive_in_the_place_of_text_is_refused(tmp_path, make):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "prompts.txt").write_bytes(make())
    with watched(folder):
        for read in (read_prompts, recipe.read):
            with pytest.raises(RecipeError):
                read(str(folder / "prompts.txt"))


def test_a_prompt_file_without_end_is_refused_by_its_size(tmp_path):
    with open(tmp_path / "big.txt", "wb") as file:
        file.truncate(1 << 40)  # a sparse file
    with watched(tmp_path), pytest.raises(RecipeError, match="larger than"):
        read_prompts(str(tmp_path / "big.txt"))


@pytest.mark.parametrize(
    "name", ["../../outside.png", "/etc/passwd", "..\\x.png", "a/../../x.png", "\0.png", "~/.ssh/id_rsa"]
)
def test_names_in_caption_files_are_names_only(tmp_path, name):
    """A row about a file elsewhere neither reads nor writes it: only pictures of the folder itself count."""
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    rows = [{"file_name": name, "text": "stolen"}, {"file_name": "a.png", "text": "a dog"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with watched(folder):
        try:
            assert [(path.name, text) for path, text in captioned_images(folder)] == [("a.png", "a dog")]
        except RecipeError as error:
            assert "stolen" not in str(error)


# --------------------------------------------------------------------------------------------------------- YAML

YAML = [
    "!!python/object/apply:os.system ['touch {canary}']", "!!python/object/new:os.system ['touch {canary}']",
    "!!python/object:subprocess.Popen {{args: [touch, '{canary}']}}", "!!python/name:os.system", "!!python/module:os",
    "!!python/object/apply:builtins.eval ['1']", "!!binary {canary}", "!exec 'touch {canary}'", "!!set {{a, b}}",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']", "!include /etc/passwd", "!ENV '${{HOME}}'",
    "&a [*a]", "[&a 1, *a]", "{{<<: &x {{a: 1}}, b: *x}}", "[[[[" * 1000, "{{a: " * 2000, "\0", "\x1b[2J", "*undefined",
]  # fmt: skip


@pytest.mark.parametrize("value", YAML, ids=range(len(YAML)))
def test_yaml_is_data(tmp_path, value):
    """As a whole recipe, as a value in it; an override is a text, or refused, and never more."""
    value = value.format(canary=tmp_path.parent / CANARY)
    good = RECIPE.format(folder="runs/x")
    with watched(tmp_path):
        for text in (value, good + f"\nsample: {value}\n"):
            with pytest.raises(RecipeError) as caught:
                recipe.parse(text)
            assert len(str(caught.value)) < 2000
        try:
            assert recipe.parse(good, [f"run.folder={value}"]).run.folder.endswith(value)
        except RecipeError as error:
            assert len(str(error)) < 2000


# ------------------------------------------------------------------------------------------------------ prompts

RAN = "document.documentElement.setAttribute('data-ran', '1')"
HTML = [
    f"<script>{RAN}</script>", f'"><script>{RAN}</script>', f"'><script>{RAN}</script>",
    f"<img src=x onerror=\"{RAN}\">",
    f"<svg onload=\"{RAN}\">", f"<body onload={RAN!r}>", f"<iframe srcdoc='<script>parent.{RAN}</script>'>",
    "javascript:" + RAN,
    f"<a href=\"javascript:{RAN}\" autofocus onfocus=\"{RAN}\">x</a>", f"<details open ontoggle=\"{RAN}\">",
    f"<input autofocus onfocus=\"{RAN}\">", f"<video><source onerror=\"{RAN}\">",
    f"<math><mtext></mtext><script>{RAN}</script></math>",
    f"</title><script>{RAN}</script>", f"</style><script>{RAN}</script>", f"</textarea><script>{RAN}</script>",
    f"--><script>{RAN}</script>", f"]]><script>{RAN}</script>", f"<scr<script>ipt>{RAN}</script>",
    f"<SCRIPT>{RAN}</SCRIPT>",
    f"<script/x>{RAN}</script>", f"<script\n>{RAN}</script\n>",
    f"<object data=\"data:text/html,<script>{RAN}</script>\">",
    f"<embed src=\"data:text/html,<script>{RAN}</script>\">", f"<link rel=stylesheet href=\"javascript:{RAN}\">",
    "<meta http-equiv=refresh content=\"0;url=data:text/html,<script>alert(1)</script>\">",
    f"<base href=\"javascript:{RAN}//\">",
    f"<form action=\"javascript:{RAN}\"><button autofocus>x</button></form>", f"<marquee onstart=\"{RAN}\">x</marquee>",
    f"<style>@import 'javascript:{RAN}'</style>", f"<img src=`x`onerror={RAN!r}>", f"\" onmouseover=\"{RAN}\" x=\"",
    f"' autofocus onfocus='{RAN}' x='", f"&lt;script&gt;{RAN}&lt;/script&gt;",
    f"&#60;script&#62;{RAN}&#60;/script&#62;",
    f"\\u003cscript\\u003e{RAN}\\u003c/script\\u003e", f"%3Cscript%3E{RAN}%3C/script%3E", f"<!--<script>-->{RAN}",
]  # fmt: skip
OTHER = [
    "{{ 7*7 }}", "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch x') }}", "${7*7} #{7*7} <%= 7*7 %>",
    "{0.__class__} {prompt} {control} %s %n",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "\u202eevil\u2066x\u2069",
    "a\0b",
    "../../../../etc/passwd", "C:\\Windows\\x", "$(touch x) `touch x` ; touch x | touch x && touch x", "-rf --fresh",
    "\r\noverwritten",
    "x" * 10_000_000,
]  # fmt: skip


def test_there_are_enough_of_them():
    artefacts = 2 * len(EXTENSIONS) + 5 + 9 + 7 + len(BOMBS) + 4 + 1 + 6 + len(YAML) + len(HTML) + len(OTHER)
    assert artefacts >= 60 and len(HTML) + len(OTHER) - 1 >= 50
    assert len(set(HTML)) == len(HTML)


def test_prompts_and_control_words_reach_no_file_name_and_no_terminal(tmp_path, capsys):
    """A run on every hostile text, previews included: files have numbers for names, the terminal gets plain text."""
    prompts = [text.replace("unknownword", "") for text in (*HTML, *OTHER)]
    (tmp_path / "run").mkdir()
    with watched(tmp_path / "run"):
        run(tmp_path / "run", prompts=prompts, steps=2, batch_size=8, preview_every=2, preview=prompts[-20:-1],
            preview_prompts=99, checkpoint_every=0, progress=True)  # fmt: skip
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    known = {"samples", "checkpoints", "recipe.yaml", "identity.json", ".owner", "grid.png", "index.html",
             "adapter", "metrics.jsonl", "environment.json", "index.jsonl",
             "tiny.safetensors",
             "step-000000", "step-000002", checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST}  # fmt: skip
    assert all(name in known or (name.endswith(".png") and name[:-4].isdigit()) for name in names)
    index = (tmp_path / "run" / "samples" / "step-000002" / "index.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in index] == prompts[-20:-1]
    out, err = capsys.readouterr()
    assert not set("\x1b\x07\0\u202e") & set(out + err)
    for text in OTHER[:-1]:
        assert not set("\x1b\x07\0\u202e\r") & set(printable(text))


def test_hostile_texts_in_errors_are_short_and_plain(tiny, palate):
    for text in (*OTHER[5:-1], "y" * 100_000):
        for arguments in (
            ("train", text),
            ("train", "tiny.yaml", f"algorithm.positve={text}"),
            ("sample", text, "--prompt", "a"),
        ):
            if ("\0" in text and arguments[0] == "sample") or text.startswith("-"):
                continue
            code, out, err = palate(*arguments)
            assert code in (2, 4) and short(err) and len(err) < 20_000, arguments[0]
            assert not set("\x1b\x07\0\u202e") & set(out + err)


# ------------------------------------------------------------------------------------------------------- report


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.root: dict[str, str | None] = {}
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag == "html":
            self.root = dict(attributes)


def rendered(page: Path) -> Tags:
    """The page's tree after headless Chromium has run whatever it would run."""
    command = [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--no-first-run", f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=2000",
               "--dump-dom",
               page.as_uri()]  # fmt: skip
    return Tags(subprocess.run(command, capture_output=True, text=True, timeout=300).stdout)


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory):
    prompts = [*HTML, *OTHER[:-1]]
    return write_report(fake_run(tmp_path_factory.mktemp("report") / "run", prompts=prompts, steps=2))


def test_a_report_of_hostile_prompts_holds_its_own_script_alone_and_loads_nothing(hostile_report):
    tags = Tags(hostile_report.read_text())
    assert [tag for tag, _ in tags.found].count("script") == 1
    assert not {"iframe", "object", "embed", "base", "form", "link"} & {tag for tag, _ in tags.found}
    for _tag, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "data:image/").startswith(("data:image/", "#"))


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_runs_no_script_of_a_report_with_fifty_hostile_prompts(hostile_report, tmp_path):
    control = tmp_path / "control.html"
    control.write_text(f"<html><body>{HTML[0]}</body></html>")
    assert rendered(control).root.get("data-ran") == "1"  # so a script that ran would be seen
    page = rendered(hostile_report)
    assert len(page.found) > 50 and "data-ran" not in page.root


# ------------------------------------------------------------------------------------------------------- secret


def test_a_secret_in_the_environment_is_in_no_output(tiny, palate, monkeypatch):
    secret = f"hf_{CANARY}"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "PALATE_SECRET"):
        monkeypatch.setenv(name, secret)
    said = []
    for arguments in (("train", "tiny.yaml"), ("resume", "runs/tiny", "trainer.steps=6"), ("checkpoints", "runs/tiny"),
                      ("sample", "runs/tiny", "--prompt", "a red fox", "--seeds", "0", "--out", "drawn"),
                      ("report", "runs/tiny"),
                      ("train", "$PALATE_SECRET"),
                      ("train", "tiny.yaml", "run.folder=${HF_TOKEN}", "trainer.stepz=1")):  # fmt: skip
        said += palate(*arguments)[1:]

    def sick(images, prompts):
        return reward(images, prompts) * (float("nan") if images.requires_grad else 1.0)

    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda settings: (sick, None))
    said += palate("train", "tiny.yaml", "run.folder=runs/sick")[1:]
    assert not any(secret in text for text in said)
    files = [path for path in tiny.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_safe_file_is_read(tmp_path):
    """The refusals above are not for want of reading anything."""
    (tmp_path / "x.safetensors").write_bytes(save({"a": torch.ones(2)}))
    with watched(tmp_path):
        assert torch.equal(read_tensors(tmp_path / "x.safetensors")["a"], torch.ones(2))
