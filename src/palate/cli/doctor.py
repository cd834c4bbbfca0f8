"""What Palate finds on this machine: versions, packages that do harm, devices, disk, weights. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

from palate.runtime.errors import InputError, RewardServiceError
from palate.runtime.files import nearest_existing
from palate.runtime.progress import counted

FLOORS = {
    "torch": "2.10",
    "diffusers": "0.42.1",
    "transformers": "5",
    "peft": "0",
    "safetensors": "0",
    "huggingface_hub": "0",
}
HARMFUL = {  # installed beside Palate they break it or bind its user; the reason
    "hpsv2": "does not work beside transformers 5; Palate's own hpsv2 needs only the weights",
    "image-reward": "does not work beside transformers 5; Palate's own image-reward needs only the weights",
    "hpsv3": "pins old versions of torch and transformers",
    "imscore": "pins old versions of transformers",
    "t2v-metrics": "pins old versions of transformers",
    "pyiqa": "its licence is non-commercial",
    "aesthetic-predictor-v2-5": "its licence is AGPL",
}
EXTRAS = {
    "pyarrow": "data",
    "fastapi": "server",
    "uvicorn": "server",
    "python-multipart": "studio",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "bitsandbytes": "bitsandbytes",
}
EMBEDDED = (  # folders of palate/assets that hold weights
    "emoji", "emoji-1step", "emoji-consistency", "reward-emoji", "reward-heldout", "judge", "detector",
)  # fmt: skip
STOPS = ("bad", "missing")  # states of a finding with which a run cannot start


class Finding(NamedTuple):
    """One line of `palate doctor`."""

    state: str  # ok, note, missing, bad
    text: str


def findings() -> Iterator[Finding]:
    """What works on this machine, in the order in which it is printed: versions, devices, memory, extras."""
    yield Finding("ok", f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name, floor in FLOORS.items():
        found = _version(name)
        good = found is not None and Version(found) >= Version(floor)
        yield Finding(
            "ok" if good else "bad",
            f"{name} {found or 'missing'}" + ("" if good else f"; needs >= {floor}: pip install -U {name}"),
        )
    yield from _torchvision()
    for name, reason in HARMFUL.items():
        if found := _version(name):
            yield Finding("bad", f"{name} {found} is installed: {reason}. pip uninstall {name}")
    absent = sorted({extra for name, extra in EXTRAS.items() if _version(name) is None})
    if absent:
        yield Finding("note", f"optional, not installed: {', '.join(absent)} (pip install 'palate[NAME]')")
    yield from _devices()
    yield from _disk()
    yield from _weights()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torchvision() -> Iterator[Finding]:
    """It is not needed, and a build for another torch breaks imports of transformers."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        yield Finding(
            "bad",
            f"torchvision {_version('torchvision')} does not fit this torch ({str(error).splitlines()[0][:80]}); "
            "Palate does not need it: pip uninstall torchvision",
        )


def _devices() -> Iterator[Finding]:
    import torch

    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding(
        "ok",
        f"{counted(os.cpu_count() or 1, 'core')}, torch uses {counted(torch.get_num_threads(), 'thread')}"
        + (f" (OMP_NUM_THREADS={threads})" if threads else ""),
    )
    if not torch.cuda.is_available():
        yield Finding("note", "no accelerator: the embedded model trains here, large models do not")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        whole = torch.version.hip is not None or properties.major >= 8  # older ones compute it by other means, slowly
        yield Finding(
            "ok" if whole else "note",
            f"cuda:{i} {properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            + ("" if whole else "; no bfloat16 of its own: set model.dtype=float32"),
        )


def _disk() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for what, path in (("here", Path.cwd()), ("in the hub's cache", Path(HF_HUB_CACHE))):
        free = shutil.disk_usage(nearest_existing(path)).free / 2**30
        yield Finding("ok" if free > 5 else "note", f"{free:.1f} GiB of disk free {what} ({path})")


def _weights() -> Iterator[Finding]:
    from importlib.resources import files

    from huggingface_hub import get_token

    from palate.rewards.located import standings

    assets = Path(str(files("palate") / "assets"))
    missing = [name for name in EMBEDDED if not any((assets / name).rglob("*.safetensors"))]
    yield Finding(
        "bad" if missing else "ok",
        f"embedded weights missing: {', '.join(missing)}; install Palate again"
        if missing
        else "embedded models, rewards, judge and detector are there",
    )
    absent = []
    for standing in standings({}):
        if standing.found:
            yield Finding("ok", f"reward {standing.name}: {standing.source or 'in the cache of the hub'}")
        else:
            absent.append(standing.name)
    if absent:
        yield Finding("note", f"rewards that are not downloaded: {', '.join(absent)} (palate fetch NAME)")
    yield Finding(
        "ok" if get_token() else "note",
        "a hub token is set" if get_token() else "no hub token: gated models need `hf auth login`",
    )


def try_reward(name: str, source: str | None) -> list[Finding]:
    """What trying a reward says; one that cannot load, or whose service does not answer, is a finding too, so that the
    others are still reported."""
    try:
        return list(check_reward(name, source))
    except (InputError, RewardServiceError) as error:
        return [Finding("bad", f"{name}: {error}")]


def check_reward(name: str, source: str | None) -> Iterator[Finding]:
    """Loads a reward and tries it on four drawn images: finite, repeatable, differentiable where it should be."""
    import torch

    from palate.recipe import load_reward

    reward = load_reward(name, source)
    axis = torch.linspace(0, 1, 224)
    ramp = axis.expand(3, 224, 224)
    disc = ((axis[:, None] - 0.5) ** 2 + (axis - 0.5) ** 2 < 0.1).float()
    red = torch.stack([disc, 0 * disc, 0 * disc])
    noise = torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(0))
    images = torch.stack([ramp, red, noise, torch.full((3, 224, 224), 0.5)])
    prompts = ["a grey gradient", "a red disc", "coloured noise", "a plain grey square"]
    if name.startswith("emoji"):
        prompts = ["a dog", "an apple", "a cat", "a rocket"]
    leaf = images.clone().requires_grad_()
    values = reward(leaf, prompts)
    good = values.shape == (4,) and bool(torch.isfinite(values).all())
    yield Finding(
        "ok" if good else "bad",
        f"{name}: " + ", ".join(f"{text} {value:.5f}" for text, value in zip(prompts, values.tolist(), strict=False)),
    )
    with torch.no_grad():
        spread = float((reward(images, prompts) - values.detach()).abs().max())
    yield Finding(
        "ok" if spread <= 1e-5 * float(values.detach().abs().max().clamp_min(1)) else "bad",
        f"{name}: a second call differs by {spread:.1e}",
    )
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        norms = gradient.flatten(1).norm(dim=1)
        good = bool(torch.isfinite(norms).all()) and bool((norms > 0).any())
        yield Finding(
            "ok" if good else "bad", f"{name}: gradient norms " + ", ".join(f"{n:.2e}" for n in norms.tolist())
        )
    else:
        yield Finding("note", f"{name}: not differentiable, for methods that need no reward gradient")
    yield Finding(
        "note", "no golden values ship with Palate; compare the numbers above with those of a machine you trust"
    )
