"""A diffusers repository, local folder or hub id, read part by part with diffusers' and transformers' own loaders.

Opening one reads its small files only; everything that can be wrong with it is said there, before any weight loads.
Weights come from safetensors alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi, errors, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from palate.runtime.errors import InputError

FAMILIES = {  # denoiser's class -> model.name, to say what a folder of another family is
    "UNet2DConditionModel": "stable-diffusion or sdxl",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "PixArtTransformer2DModel": "pixart",
    "ZImageTransformer2DModel": "z-image",
}
WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-(\d+))?\.safetensors")  # no variants such as fp16
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
SMALL = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"]  # configurations and tokenizers


@dataclass(frozen=True)
class Repository:
    """`source` is what from_pretrained takes; `root` holds at least the small files."""

    source: str
    root: Path
    index: dict[str, Any]  # model_index.json

    def __contains__(self, part: str) -> bool:
        return self.kind(part) is not None

    def kind(self, part: str) -> str | None:
        """The class of a part, None if the repository lacks it."""
        entry = self.index.get(part)
        return entry[1] if isinstance(entry, list) else None

    def config(self, part: str) -> dict[str, Any]:
        file = self.root / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if not file.is_file():
            raise InputError(f"model.folder {self.source} has no {part}/{file.name}; the download is incomplete")
        return _json(file)

    def skeleton(self, part: str) -> nn.Module:
        """A part of diffusers on the meta device: its layers' names and shapes, no weights."""
        with torch.device("meta"):
            return getattr(diffusers, self.kind(part)).from_config(self.config(part))

    def check_lora(self, part: str, folder: str | Path, *, key: str, rank: int | None = None) -> None:
        """ValueError unless the LoRA in `folder` is one of this part: known layers, their shapes, that rank.

        Reads names and shapes only. key: of the recipe, for the message. Names of text encoders, and those of the
        original SDXL, are left to the loader.
        """
        file = Path(folder) / "pytorch_lora_weights.safetensors"
        if not file.is_file():
            raise InputError(f"{key}: no {file.name} in {folder}; expected the folder of a LoRA")
        _check_header(file)
        with safe_open(file, "pt") as lora:
            shapes = {name: lora.get_slice(name).get_shape() for name in list(lora.keys())}
        layers = {
            name: tuple(m.weight.shape)
            for name, m in self.skeleton(part).named_modules()
            if getattr(m, "weight", None) is not None
        }
        layers |= {name.replace(".", "_"): shape for name, shape in layers.items()}
        for name, shape in shapes.items():
            found = re.fullmatch(r"(?:unet\.|transformer\.|lora_unet_)?(.+)\.lora_(A|B|down|up)\.weight", name)
            if found is None or re.match(r"lora_te|text_encoder|.*(input|middle|output)_block", name):
                continue
            layer, down = found[1], found[2] in ("A", "down")
            if layer not in layers or layers[layer][1 if down else 0] != shape[1 if down else 0]:
                what = f"its layer {layer} is not one" if layer not in layers else f"{layer} has another size in those"
                raise InputError(f"{key}: {folder} holds a LoRA of another model; {what} of {self.source}, {part}")
            if down and rank is not None and shape[0] != rank:
                raise InputError(f"{key}: the LoRA in {folder} has rank {shape[0]}; set model.lora_rank={shape[0]}")

    def read(self, part: str, kind: type, dtype: torch.dtype, *, file: str | None = None) -> nn.Module:
        """A network in `dtype`, in evaluation mode, frozen. `file`: its weights in place of the repository's own."""
        try:
            if file is not None:
                network = kind.from_single_file(file, config=str(self.root), subfolder=part, torch_dtype=dtype)
            else:
                name = "torch_dtype" if issubclass(kind, ModelMixin) else "dtype"
                network = kind.from_pretrained(self.source, subfolder=part, use_safetensors=True, **{name: dtype})
        except (OSError, SafetensorError, RuntimeError, LookupError, AttributeError, TypeError) as error:
            what = file or f"{self.source}, {part}"
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{what}: cannot be read as {kind.__name__}; is it another model's? ({why})") from error
        if any(p.is_meta for p in network.parameters()):
            raise InputError(f"{file or self.source}: holds no weights for parts of {kind.__name__}; is it whole?")
        return network.eval().requires_grad_(False)

    def tokenizer(self, part: str, kind: type) -> Any:
        if not any((self.root / part / name).is_file() for name in VOCABULARIES):  # its class would make an empty one
            raise InputError(
                f"model.folder {self.source}: {part} holds no vocabulary ({', '.join(VOCABULARIES)}); "
                "complete the download"
            )
        try:
            return kind.from_pretrained(self.source, subfolder=part)
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise InputError(f"model.folder {self.source}: {part} cannot be read: {why}") from error

    def version(self, parts: Iterable[str]) -> str:
        """What changes when these parts do, whether or not they are here yet: on the hub the commit, else `digest`."""
        return self.digest(parts) if self.root == Path(self.source) else self.root.name

    def digest(self, parts: Iterable[str], *files: str | None) -> str:
        """SHA-256 over the files of `parts` that from_pretrained reads, and over further `files`."""
        found = [p for part in parts for p in sorted((self.root / part).glob("*")) if p.is_file()]
        read = [p for p in found if p.suffix != ".safetensors" or WEIGHTS.fullmatch(p.name)]
        total = hashlib.sha256()
        for path in [*read, *(Path(f) for f in files if f)]:
            total.update(f"{path.parent.name}/{path.name}\n{_sha256(path)}\n".encode())
        return total.hexdigest()


def open_repository(
    folder: str | Path | None,
    *,
    family: str,
    parts: Mapping[str, str],
    file: str | None = None,
    optional: Iterable[str] = (),
) -> Repository:
    """The repository, if it has every one of `parts` (name -> class) with safetensors weights; ValueError if not."""
    if folder is None:
        raise InputError(
            f"model.folder: {family} needs a diffusers folder or a hub id, like "
            "stabilityai/stable-diffusion-xl-base-1.0"
        )
    source, path = str(folder), Path(folder).expanduser()
    if path.is_file():
        raise InputError(
            f"model.folder {source} is a file; give the diffusers folder or hub id that it belongs to as "
            f"model.folder, and the file as model.file"
        )
    local = path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1
    if local:
        root, files = path, [p.relative_to(path).as_posix() for p in path.glob("*/*")]
    else:
        root, files = _from_hub(source)
    if not (root / "model_index.json").is_file():
        why = "does not exist" if not root.exists() else "has no model_index.json"
        raise InputError(
            f"model.folder {source} is not a diffusers folder: it {why}. Convert a checkpoint with "
            "diffusers' from_single_file(...).save_pretrained(folder), or give a hub id (owner/name)"
        )
    index = _json(root / "model_index.json")
    repository = Repository(str(path) if local else source, root, index)
    for part, kind in parts.items():
        got = repository.kind(part)
        if got is None and part in optional:
            continue
        if got is None:
            other = next((FAMILIES[k] for k in map(repository.kind, index) if k in FAMILIES), None)
            if other is not None and part in ("unet", "transformer"):
                raise InputError(
                    f"model.folder {source} holds {index.get('_class_name')}, not a {family} model; set "
                    f"model.name to {other}"
                )
            raise InputError(
                f"model.folder {source} has no {part}, which {family} needs; complete the download, or "
                "use a repository that has it"
            )
        if kind != got and part in ("unet", "transformer", "vae"):
            raise InputError(
                f"model.folder {source}: its {part} is a {got}, {family} needs a {kind}"
                + (f"; set model.name to {FAMILIES[got]}" if got in FAMILIES else "")
            )
    weighty = [p for p in parts if p in repository and not p.startswith(("tokenizer", "scheduler"))]
    if file is not None:
        weighty = [p for p in weighty if p not in ("unet", "transformer")]
        if not Path(file).is_file() or Path(file).suffix != ".safetensors":
            raise InputError(f"model.file {file}: expected a .safetensors file with the denoiser's weights")
        _check_header(Path(file))
    for part in parts:
        if part in repository and not part.startswith("tokenizer"):
            repository.config(part)
    if files is not None:
        _check_weights(source, files, weighty)
    if local:
        for path in sorted(p for part in weighty for p in (root / part).glob("*.safetensors")):
            _check_header(path)
    return repository


def _from_hub(source: str) -> tuple[Path, list[str] | None]:
    """The hub's small files in the local cache, and the names of all files if the hub could be asked."""
    try:
        root = Path(snapshot_download(source, allow_patterns=SMALL))
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
    except (errors.HFValidationError, OSError) as error:
        raise InputError(
            f"model.folder {source}: no such folder, and the hub cannot be reached "
            f"({type(error).__name__}); download it first, `hf download {source}`"
        ) from error
    try:
        return root, HfApi().list_repo_files(source)
    except OSError:
        return root, None  # offline with everything in the cache: from_pretrained will say what is missing


def _check_weights(source: str, files: list[str], parts: Iterable[str]) -> None:
    for part in parts:
        found = [name for name in files if name.startswith(f"{part}/")]
        whole = [match for name in found if (match := WEIGHTS.fullmatch(name.rpartition("/")[2]))]
        if whole:
            shards = int(whole[0][3] or 1)  # of diffusion_pytorch_model-00001-of-00003.safetensors
            if len(whole) < shards and not any(match[3] is None for match in whole):
                raise InputError(
                    f"model.folder {source}: {part} holds {len(whole)} of {shards} shards of its weights; "
                    "complete the download"
                )
            continue
        if any(name.endswith((".bin", ".pt", ".ckpt")) for name in found):
            raise InputError(
                f"model.folder {source}: the weights of {part} are pickles (.bin), which can run code "
                'when loaded. Convert them once, where you trust them: python -c "from diffusers import '
                f"DiffusionPipeline as P; P.from_pretrained('{source}').save_pretrained('converted')\""
            )
        variants = " (variants as fp16 are not read)" if any(name.endswith(".safetensors") for name in found) else ""
        raise InputError(
            f"model.folder {source}: {part} holds no .safetensors weights{variants}; complete the download"
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({str(error)[:100]}); download it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no settings; download it again")
    return found


def _check_header(file: Path) -> None:
    """A .safetensors file says in its first bytes how long it is; ValueError if it is cut short or something else."""
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged or incomplete ({str(error)[:100]}); download it again") from error


def _sha256(path: Path) -> str:
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:  # the hub's cache names large files by their SHA-256
        return real.name
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
