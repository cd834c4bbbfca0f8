"""Where a diffusers repository comes from: a folder here, a hub id, or of a single file the hub id that it belongs to.

A machine without a network is known after one short try (`runtime.hub`); then only the hub's local cache is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import HfApi, errors, snapshot_download
from safetensors import SafetensorError, safe_open

from palate.models.facts import facts_of
from palate.runtime.errors import InputError
from palate.runtime.hub import UNREACHED, reachable

SMALL = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"]  # configurations and tokenizers


def locate(folder: str | Path | None, family: str, file: str | None = None) -> tuple[str, Path, bool]:
    """What was given, as text and as a path, and whether it is a folder here rather than a hub id.

    file: a checkpoint of the denoiser alone; without `folder`, its other parts are those of its published base.
    """
    if folder is None and file is not None:
        folder = published_base(Path(file).expanduser(), family)
    if folder is None:
        raise InputError(
            f"model.folder: {family} needs a diffusers folder or a hub id, like "
            "stabilityai/stable-diffusion-xl-base-1.0"
        )
    source, path = str(folder), Path(folder).expanduser()
    if path.is_file():
        weights = path.suffix == ".safetensors"
        remedy = "give it as model.file, and leave model.folder out" if weights else "give the diffusers folder"
        raise InputError(f"model.folder {source} is a file; {remedy}")
    return source, path, path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1


OTHER_PREDICTION = {"v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max"}  # empty tensors that ComfyUI reads


def published_base(file: Path, family: str) -> str | None:
    """The hub id of the base model that a single file belongs to, by its tensors' names and shapes; None without one.

    A file that diffusers does not know by itself gets the family's first published base.
    """
    with safe_open(file, "pt") as opened:
        other = OTHER_PREDICTION & set(opened.keys())
    if other:
        raise InputError(
            f"model.file {file} holds {', '.join(sorted(other))}, by which it predicts otherwise than the base which "
            "its tensors tell of; give model.folder too, the same model as a diffusers folder"
        )
    known = list(facts_of(family).licences)
    found = _by_tensors(file)
    return found if found in known else known[0] if known else None


def _by_tensors(file: Path) -> str | None:
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in list(opened.keys())}
        told: dict[str, Any] = fetch_diffusers_config(
            {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        )
    except (OSError, SafetensorError, LookupError, AttributeError, ValueError):
        return None  # what is wrong with the file is said when it is read
    return told.get("pretrained_model_name_or_path")


def from_hub(source: str) -> tuple[Path, list[str] | None]:
    """The hub's small files in the local cache, and the names of all files if the hub could be asked."""
    try:
        root = Path(snapshot_download(source, allow_patterns=SMALL, local_files_only=not reachable()))
    except errors.GatedRepoError as error:
        raise InputError(
            f"model.folder {source} is gated: accept its licence at https://huggingface.co/{source}, then "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"model.folder {source}: no such folder, and the hub has no such repository. If it is "
            "private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except (errors.HFValidationError, *UNREACHED) as error:
        raise InputError(
            f"model.folder {source}: no such folder, and the hub cannot be reached "
            f"({type(error).__name__}); download it first, `hf download {source}`"
        ) from error
    try:
        return root, HfApi().list_repo_files(source) if reachable() else None
    except UNREACHED:
        return root, None


def loader_place(source: str, root: Path) -> str:
    """What from_pretrained is given: without a network the hub's local copy, so that it does not try over and over."""
    return source if Path(source).expanduser().exists() or reachable() else str(root)


def absent(source: str, root: Path, part: str) -> InputError | None:
    """The mistake of a part that is neither here nor can be fetched; None where something else is wrong with it."""
    if loader_place(source, root) == source or ((root / part).is_dir() and any((root / part).glob("*.safetensors"))):
        return None
    return InputError(
        f"model.folder {source}: its {part} is not in the local cache, and the hub cannot be reached; download it "
        f"first, `hf download {source}`"
    )
