"""Files that somebody else made: links that lead out of a run, pictures that start programs, code beside a tokenizer,
servers that want a token."""

from __future__ import annotations

import io
import json
import subprocess
import zipfile

import pytest
from support.pages import fake_run
from transformers import AutoTokenizer

from palate.data.pictures import load_images
from palate.report.pictures import open_picture
from palate.rewards.client import HOSTS, JsonClient, Patience
from palate.rewards.files import pretrained
from palate.runtime import runlock
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import append
from palate.runtime.images import UNREADABLE, read_pixels
from palate.studio.routes_runs import zipped

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.fixture
def victim(tmp_path):
    """A file outside a run; it must stay as it is."""
    path = tmp_path / "victim.txt"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def test_no_link_in_a_run_is_written_through(tmp_path, victim):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".owner").symlink_to(victim)
    with pytest.raises(CheckpointError, match="It is a link"), runlock.owned(run):
        pass
    assert runlock.status(run).owner is None
    (run / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        append(run / "metrics.jsonl", b"{}\n")


def test_a_zip_to_download_holds_no_file_that_a_link_leads_to(tmp_path, victim):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "own.txt").write_text("own")
    (folder / "theirs.txt").symlink_to(victim)
    with zipfile.ZipFile(io.BytesIO(zipped(folder, "mine"))) as archive:
        assert archive.namelist() == ["mine/own.txt"]


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """PIL reads PostScript, under any name, by starting Ghostscript."""
    file = tmp_path / "0000.png"
    file.write_bytes(POSTSCRIPT)

    def started(*_, **__):
        pytest.fail("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    for read in (read_pixels, lambda path: read_pixels(path.read_bytes()), open_picture,
                 lambda path: load_images([path], size=8)):  # fmt: skip
        with pytest.raises((*UNREADABLE, InputError)):
            read(file)


def test_code_beside_a_tokenizer_is_not_even_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\nclass Mine:\n    pass\n")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["evil.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "evil.Mine"}}))
    with pytest.raises(InputError):
        pretrained(AutoTokenizer, "clip-score", str(tmp_path), how="")
    assert not (tmp_path / "it-ran").exists()


def test_a_token_goes_to_no_machine_that_nobody_named(monkeypatch):
    def client(url, token="a-token-of-16-letters"):
        return JsonClient(url, token, Patience(), key="reward.source.remote")

    with pytest.raises(InputError, match=f"set {HOSTS}=judge.evil"):
        client("https://judge.evil/score")
    client("http://127.0.0.1:8411/score")
    client("https://judge.evil/score", None)
    monkeypatch.setenv(HOSTS, "other.lab, judge.evil")
    assert client("https://judge.evil/score?key=SECRET").place == "https://judge.evil/score"


def test_a_page_to_hand_on_names_no_place_on_this_disk(tmp_path, palate):
    run = fake_run(tmp_path / "home/jane/run")
    tree = json.loads((run / "recipe.yaml").read_text())
    tree["run"] = {"folder": str(run)}
    tree["model"] = {**tree.get("model", {}), "folder": str(tmp_path / "home/jane/base")}
    (run / "recipe.yaml").write_text(json.dumps(tree))
    assert palate("report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert "jane" not in page and "palate train run/recipe.yaml run.folder=run-again" in page
