"""Weights are fetched, converted without running their code, and listed by what a recipe needs."""

from __future__ import annotations

import errno
import io
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from support.commands import short

from palate import recipe
from palate.cli import fetch, requirements
from palate.data import published
from palate.plan import Unit, plan
from palate.rewards import client, located
from palate.runtime.errors import InputError


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_becomes_the_same_tensors(tmp_path, palate, monkeypatch, wrapped):
    monkeypatch.chdir(tmp_path)
    state = {"a.weight": torch.randn(3, 4).T, "b": torch.arange(3.0), "step": 7}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "weights.pt")
    code, out, _ = palate("fetch", "hpsv2", "--from", "weights.pt")
    target = tmp_path / "weights/hpsv2/HPS_v2.1_compressed.safetensors"
    assert code == 0 and "ready: reward.source.hpsv2=weights/hpsv2/HPS_v2.1_compressed.safetensors" in out
    found = load_file(target)
    assert set(found) == {"a.weight", "b"} and torch.equal(found["a.weight"], state["a.weight"])
    assert [path.name for path in target.parent.iterdir()] == [target.name]


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("content", [pickle.dumps({"w": Evil()}), b"", b"half a file", b"PK\x03\x04cut"])
def test_code_in_a_pickle_never_runs_and_nothing_is_left(tmp_path, palate, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(content)
    code, out, error = palate("fetch", "image-reward", "--from", "evil.pt")
    assert code == 2 and short(error) and "evil.pt is no checkpoint" in error and "code ran" not in out + error
    assert not list((tmp_path / "weights").rglob("*.safetensors")) if (tmp_path / "weights").exists() else True


def test_a_file_of_any_bytes_is_no_checkpoint_and_no_fault(tmp_path):
    """What a pickle's reader raises depends on the first signs: a text file began with one that empties its stack."""
    for content in (b"a fox on a blue background\n", *(bytes([first, 0x80, 2, 46]) for first in range(256))):
        (tmp_path / "any.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"any\.pt (is no checkpoint of plain|holds no named) tensors"):
            fetch.convert(tmp_path / "any.pt", tmp_path / "any.safetensors")


def test_what_cannot_be_fetched_is_a_sentence_with_the_way_round(tmp_path, palate, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def offline(*_):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(fetch, "hub_file", offline)
    code, _, error = palate("fetch", "hpsv2")
    assert code == 2 and short(error) and "cannot be reached" in error and "--from FILE" in error
    for arguments in (["hpsv4"], ["hpsv2", "--from", "none.pt"]):
        code, _, error = palate("fetch", *arguments)
        assert code == 2 and short(error)


def test_a_file_from_elsewhere_is_advised_and_taken_only_where_it_is_of_use(tmp_path, palate, monkeypatch):
    """--from is for weights that are converted, or linked beside the rest; all else goes into the hub's cache."""
    monkeypatch.chdir(tmp_path)

    def offline(place, file):
        if place in ("xswu/HPSv2", "MizzenAI/HPSv3"):
            return tmp_path / file
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(fetch, "hub_file", offline)
    for name, place in (
        ("hpsv2", "openai--clip-vit-large-patch14"),
        ("hpsv3", "Qwen--Qwen2-VL-7B-Instruct"),
        ("clip-score", "openai--clip-vit-large-patch14"),
        ("pickscore", "yuvalkirstain--PickScore_v1"),
    ):
        code, _, error = palate("fetch", name)
        assert code == 2 and "--from" not in error and f"copy models--{place} of its hub cache" in error
        assert "tokenizer.json" in error and "merges.txt" in error  # every file, by one command
    (tmp_path / "notweights.txt").write_text("no weights")
    for name, said in (
        ("clip-score", "reward.source.clip-score=FOLDER"),
        ("pickscore", "reward.source.pickscore=FOLDER"),
        ("hpsv3", "give the downloaded HPSv3.safetensors"),
        ("parti", "palate evaluate RUN --protocol parti --prompts-file FILE"),
        ("drawbench", "palate evaluate RUN --protocol drawbench --prompts-file FILE"),
    ):
        code, out, error = palate("fetch", name, "--from", "notweights.txt")
        assert code == 2 and short(error) and said in error and "expected one of" not in error and "ready" not in out


def test_prompts_that_cannot_be_reached_are_given_to_the_evaluation(palate, monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(published, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    code, _, error = palate("fetch", "parti")
    assert code == 2 and short(error) and "--protocol parti --prompts-file FILE" in error and "--from" not in error
    code, _, error = palate("fetch", "aesthetic")
    assert code == 2 and short(error) and "palate fetch aesthetic --from FILE" in error


def test_a_missing_tokenizer_form_is_passed_over_but_missing_weights_are_not(tmp_path, monkeypatch):
    def hub(place, file):
        if file in ("merges.txt", "gone.safetensors"):
            raise EntryNotFoundError("none")
        return tmp_path / file

    monkeypatch.setattr(fetch, "hub_file", hub)
    what = fetch.Download("a/b", ("vocab.json", "merges.txt"), 0.1)
    assert [path.name for path in fetch.download(what, "hpsv2")] == ["vocab.json"]
    with pytest.raises(InputError, match=r"has no gone\.safetensors any more"):
        fetch.download(what._replace(files=("gone.safetensors",)), "hpsv2")


UNITS = {
    "denoiser": Unit(12 * 10**9, 1e12, 2e12, 1e9, 1e8, 1e8, 10**7, 24e9),
    "decoder": Unit(10**8, 1e11, 2e11, 1e8, 1e8, 1e7),
    "encoder": Unit(10**8, 1e11, 0.0, 0.0, 0.0, 0.0),
    "reward": Unit(10**9, 1e10, 2e10, 1e8, 1e8, 0.0, 0, 4e9),
}


@pytest.fixture
def flux(monkeypatch, tmp_path):
    """The needs of srpo-flux by what they are called, with an empty hub cache."""
    monkeypatch.setattr(requirements, "plan", lambda made: plan(made, units=UNITS))
    monkeypatch.setattr(requirements, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(requirements, "get_token", lambda: None)
    cached: set[str] = set()
    for module in (requirements, located):
        monkeypatch.setattr(
            module, "try_to_load_from_cache", lambda place, file: f"{place}/{file}" if place in cached else None
        )

    def of(*overrides):
        found = requirements.requirements(recipe.read("srpo-flux", overrides), "rtx-4090")
        return {need.what.split(" black-forest")[0]: need for need in found}, cached

    return of


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    for folder in ("./mysdxl", str(tmp_path / "sdxl")):
        read = recipe.read("srpo-sdxl-24gb", [f"model.folder={folder}"])
        (found,) = [need for need in requirements.files_required(read, None) if need.what.startswith("model")]
        assert found.state == "bad" and "no folder here" in found.text
    lost = recipe.read("srpo-sdxl-24gb", [f"model.file={tmp_path / 'lost.safetensors'}"])
    assert "bad" in {need.state for need in requirements.files_required(lost, None) if need.what == "model.file"}


def test_every_file_of_a_recipe_is_listed_with_one_command(flux, tmp_path):
    found, cached = flux()
    assert found["model"].state == "missing" and "hf download black-forest-labs/FLUX.1-dev" in found["model"].command
    (line,) = (found["model"].command,)
    assert line.count(" --include ") == len(line.split()) // 2 - 1  # hf takes one pattern each
    assert found["model"].gigabytes == pytest.approx(2 * (12 + 4.88) + 0.17)
    assert found["access to"].command == "hf auth login"
    assert found["reward hpsv2"].command == "palate fetch hpsv2"
    assert found["held-out reward clip-score"].state == "note" and found["prompts"].state == "ok"
    assert found["memory"].state == "bad" and "24 GiB on rtx-4090" in found["memory"].text
    cached.add("openai/clip-vit-large-patch14")
    weights = tmp_path / "hps.safetensors"
    save_file({"a": torch.zeros(1)}, weights)
    found, _ = flux(f"reward.source={json.dumps({'hpsv2': str(weights)})}")
    assert found["reward hpsv2"].state == found["held-out reward clip-score"].state == "ok"
    found, _ = flux("prompts={file: none.txt}")
    assert found["prompts"].state == "bad" and "none.txt" in found["prompts"].text


def test_what_lies_in_the_hubs_cache_counts_where_a_recipe_reads_it_from_there(flux, tmp_path, monkeypatch):
    """pickscore by its hub id, as the released recipes name it, or by none; hpsv3 from a folder alone."""
    monkeypatch.chdir(tmp_path)
    of_hub = 'reward={name: pickscore, source: {pickscore: "yuvalkirstain/PickScore_v1"}}'
    found, cached = flux(of_hub)
    assert found["reward pickscore"].command == "palate fetch pickscore"
    cached |= {"yuvalkirstain/PickScore_v1", "MizzenAI/HPSv3"}
    for named in (of_hub, "reward={name: pickscore}"):
        assert flux(named)[0]["reward pickscore"].state == "ok"
    elsewhere = flux('reward={name: pickscore, source: {pickscore: "somebody/else"}}')[0]
    assert elsewhere["reward pickscore"].state == "missing"
    assert flux("reward={name: hpsv3}")[0]["reward hpsv3"].command == "palate fetch hpsv3"
    (tmp_path / "weights/hpsv3").mkdir(parents=True)
    for file in ("HPSv3.safetensors", "config.json", "prompt.txt"):
        (tmp_path / "weights/hpsv3" / file).touch()
    assert flux("reward={name: hpsv3}")[0]["reward hpsv3"].command == "add reward.source.hpsv3=weights/hpsv3"


def test_doctor_reports_a_reward_that_cannot_load_beside_all_others(palate):
    code, out, _ = palate("doctor", "--reward", "hpsv2", "--json")
    found = json.loads(out)
    assert code == 2 and found[-1]["state"] == "bad" and "published as a pickle" in found[-1]["text"]
    assert any(finding["text"].startswith("torch ") for finding in found)


def test_doctor_reports_a_service_that_does_not_answer_beside_all_others(palate, monkeypatch):
    monkeypatch.setenv(client.TOKEN, "a-token-of-twenty-six-bytes")
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    code, out, _ = palate("doctor", "--reward", "remote", "--source", "http://127.0.0.1:1/score", "--json")
    found = json.loads(out)
    assert code == 2 and found[-1]["state"] == "bad" and "no answer" in found[-1]["text"] and len(found) > 5


def test_prompt_sets_are_fetched_where_their_licence_allows_it(palate, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "hub_file", lambda place, file, repo_type: Path(f"/{repo_type}/{place}/{file}"))
    code, out, _ = palate("fetch", "hpdv2")
    assert code == 0 and "ready: palate evaluate RUN --protocol hpdv2 (4 files, Apache-2.0)" in out
    monkeypatch.setattr(published, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "palate").mkdir()
    (tmp_path / "palate" / "PartiPrompts.tsv").write_text("Prompt\tCategory\na dog\tAnimals\n")
    code, out, _ = palate("fetch", "parti")
    assert code == 0 and "--protocol parti (1 file," in out
    code, _, error = palate("fetch", "drawbench")
    assert code == 2 and short(error) and "none stated by its authors" in error and "--prompts-file FILE" in error

    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(fetch, "hub_file", offline)
    code, _, error = palate("fetch", "hpdv2")
    assert code == 2 and short(error) and "cannot be reached" in error and "benchmark/photo.json" in error


@pytest.mark.parametrize("promised", [40, 100])
def test_a_download_that_broke_off_is_not_kept(palate, monkeypatch, tmp_path, promised):
    """Read to its end, an answer that is too short raises nothing; a later fetch would take it for the whole file."""

    class Half(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(b"x" * 40)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(published, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Half) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/prompts.tsv"
        if promised == 40:
            assert fetch._download_address(address, "parti", "").read_bytes() == b"x" * 40
        else:
            with pytest.raises(InputError, match=r"broke off, 60 bytes before the end\). Download it elsewhere"):
                fetch._download_address(address, "parti", "Download it elsewhere")
        server.shutdown()
    assert [path.name for path in (tmp_path / "palate").iterdir()] == (["prompts.tsv"] if promised == 40 else [])


def test_a_full_disk_is_no_address_that_cannot_be_reached(monkeypatch, tmp_path):
    class Answer(io.BytesIO):
        length = 0

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(published, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda _: Answer(b"prompts"))
    monkeypatch.setattr(fetch, "open", lambda *_: Full(), raising=False)
    with pytest.raises(OSError, match="No space left"):
        fetch._download_address("http://127.0.0.1/prompts.tsv", "parti", "Download it elsewhere")
