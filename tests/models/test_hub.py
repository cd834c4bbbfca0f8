"""Hub ids without a network: one try, then the local cache alone; and single files, which know their published base."""

from __future__ import annotations

import ast
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import close_session
from safetensors.torch import save_file
from support.tiny_families import FAMILIES, saved
from transformers import T5EncoderModel

import palate
from palate.cli import model_source
from palate.cli.fetch import download
from palate.models import source
from palate.rewards import files
from palate.rewards.published import PUBLISHED
from palate.runtime import hub
from palate.runtime.errors import InputError

BASE = "black-forest-labs/FLUX.1-schnell"
PACKAGED = {("models", "emoji.py"), ("rewards", "emoji.py")}  # folders of the package
HUB_CALLS = {"hf_hub_download", "snapshot_download", "list_repo_files", "from_pretrained", "from_single_file"}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, an empty cache; the list of connections that were tried."""
    tried = []

    def connect(*address, **_):
        tried.append(address)
        raise OSError("no network")

    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setattr("socket.socket.connect", connect)
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    hub.reachable.cache_clear()
    yield tried, cache
    hub.reachable.cache_clear()


def into_cache(cache: Path, name: str, repository: str) -> Path:
    """A tiny pipeline as the hub's cache holds a repository."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("c0ffee")
    shutil.copytree(saved(name)[0], home / "snapshots" / "c0ffee")
    return home / "snapshots" / "c0ffee"


def opened(name: str, folder: str | None, **options):
    family = FAMILIES[name]
    return family.model.load(folder, dtype="float32", device="cpu", training="none", **{**family.load, **options})


WAYS = {
    "models": lambda: opened("flux-schnell", BASE),
    "sample --model": lambda: model_source.load_base(BASE),
    "fetch": lambda: download(PUBLISHED["pickscore"].weights, "pickscore"),
    "reward": lambda: files.weights_file("hpsv2", BASE, default="model.safetensors", how="It is published there."),
}


@pytest.mark.parametrize("way", WAYS)
def test_without_a_network_it_is_tried_once_and_one_sentence_says_so(way, offline):
    for _ in range(2):
        with pytest.raises(InputError) as told:
            WAYS[way]()
        assert len(str(told.value).splitlines()) == 1
    assert len(offline[0]) == hub.TRIES


def test_what_is_in_the_cache_loads_without_a_network_and_what_is_not_is_named(offline, tmp_path):
    tried, cache = offline
    snapshot = into_cache(cache, "flux-schnell", BASE)
    theirs = saved("flux-schnell")[1].transformer.state_dict()
    assert {k: v.shape for k, v in opened("flux-schnell", BASE).weights.network.state_dict().items()} == {
        k: v.shape for k, v in theirs.items()
    }
    # a single file alone: the other parts are those of the published base that its tensors tell of
    file = tmp_path / "tuned.safetensors"
    save_file({key: value + 0.5 for key, value in theirs.items()}, file)
    # diffusers' own names say nothing of the kind, so the family's first base is taken
    assert source.published_base(file, "flux") == "black-forest-labs/FLUX.1-dev"
    into_cache(cache, "flux-schnell", "black-forest-labs/FLUX.1-dev")
    ours = opened("flux-schnell", None, file=str(file)).weights.network.state_dict()
    assert all(torch.allclose(ours[key], theirs[key] + 0.5) for key in theirs)
    next((snapshot / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match=f"model.folder {BASE}: its vae is not in the local cache, and the hub cannot"):
        opened("flux-schnell", BASE)
    assert len(tried) == hub.TRIES


def test_a_cached_repository_with_the_variant_fp16_alone_loads_without_a_network(offline):
    snapshot = into_cache(offline[1], "flux-schnell", BASE)
    for file in snapshot.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    theirs = saved("flux-schnell")[1].transformer.state_dict()
    ours = opened("flux-schnell", BASE).weights.network.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture
def refusing(offline, monkeypatch):
    """A hub behind a proxy that lets the first question pass and refuses every other connection, with an error of the
    client's HTTP library, which is no OSError."""

    class Refused(HfHubHTTPError.__bases__[0]):
        pass

    def refuse(*_, **__):
        raise Refused("Connection refused")

    assert not issubclass(Refused, OSError)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    hub.reachable.cache_clear()
    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    monkeypatch.setattr(source, "snapshot_download", refuse)
    monkeypatch.setattr(source.HfApi, "list_repo_files", refuse)
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", refuse)
    return offline[1]


@pytest.mark.parametrize(
    "way", [*WAYS.values(), lambda: files.pretrained(T5EncoderModel, "clip-score", BASE, how="It is published there.")]
)
def test_a_connection_that_is_refused_is_a_sentence(way, refusing):
    with pytest.raises(InputError, match=r"Connection refused|cannot be reached") as told:
        way()
    assert len(str(told.value).splitlines()) == 1


def test_what_is_in_the_cache_serves_where_the_hub_refuses(refusing, monkeypatch):
    snapshot = into_cache(refusing, "flux-schnell", BASE)
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: str(snapshot))
    assert source.from_hub(BASE) == (snapshot, None)


def test_what_is_in_the_cache_loads_behind_a_proxy_that_lets_nothing_pass(tmp_path, monkeypatch):
    """Its client takes the answer 403 for one about the file, and does not look into the cache."""

    class Closed(BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    snapshot = into_cache(tmp_path, "flux-schnell", BASE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Closed) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_address[1]}")
        close_session()  # which keeps the proxy that it began with
        hub.reachable.cache_clear()
        try:
            assert source.from_hub(BASE) == (snapshot, None)
            assert hub.hub_file(BASE, "model_index.json") == snapshot / "model_index.json"
        finally:
            close_session()
            hub.reachable.cache_clear()
            proxy.shutdown()


KEYS = {
    "black-forest-labs/FLUX.1-schnell": ("flux", ["double_blocks.0.img_attn.norm.key_norm.scale"]),
    "black-forest-labs/FLUX.1-dev": (
        "flux", ["double_blocks.0.img_attn.norm.key_norm.scale", "guidance_in.in_layer.bias", "img_in.weight"]
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "sdxl", ["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"]
    ),
    "fal/AuraFlow-v0.3": ("aura-flow", ["anything"]),
}  # fmt: skip


@pytest.mark.parametrize("base", KEYS)
def test_a_single_file_knows_its_published_base(base, tmp_path):
    family, keys = KEYS[base]
    save_file({key: torch.zeros(2, 64) for key in keys}, tmp_path / "file.safetensors")
    assert source.published_base(tmp_path / "file.safetensors", family) == base
    assert source.locate(None, family, str(tmp_path / "file.safetensors"))[0] == base
    with pytest.raises(InputError, match=f"model.folder: {family} needs a diffusers folder or a hub id"):
        source.locate(None, family)


def test_every_call_of_the_hub_knows_whether_it_can_be_reached():
    """The module that makes it asks `runtime.hub` or `models.source`; a new loader that forgets is found here."""
    root, bad = Path(palate.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        called = {
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
        }
        asked = called & {"reachable", "loader_place"}
        if called & HUB_CALLS and not asked and path.relative_to(root).parts not in PACKAGED:
            bad.append(f"{path.relative_to(root)}: {called & HUB_CALLS}")
    assert not bad
