"""A diffusers repository, local folder or hub id, read part by part with diffusers' and transformers' own loaders.

Opening one reads its small files only; everything that can be wrong with it is said there, before any weight loads.
Weights come from safetensors alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

from palate.models import lora
from palate.models.adapters import common, shapes_of
from palate.models.facts import Facts
from palate.models.families import LoadOptions
from palate.models.latents import channels_of
from palate.models.quantised import quantise
from palate.models.quiet import quietly
from palate.models.repository_checks import (
    OTHER_NOISE,
    READERS,
    READING_ERRORS,
    WEIGHTS,
    check_file,
    check_header,
    check_quantised,
    check_task,
    check_weights,
    family_with,
)
from palate.models.source import absent, from_hub, loader_place, locate
from palate.runtime.errors import InputError, first_line
from palate.runtime.files import parse_json
from palate.runtime.hub import UNREACHED

# in the names of tensors that no prompt and no picture reads: a language model's eyes and last layer, counts of batches
UNREAD = re.compile(r"\b(visual|vision_tower|multi_modal_projector|lm_head|num_batches_tracked)\b")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class Repository:
    """`source` is what from_pretrained takes; `root` holds at least the small files."""

    source: str
    root: Path
    index: dict[str, Any]  # model_index.json
    files: tuple[str, ...] = ()  # part/file of all there are; where the hub could not be asked, of those in its cache
    quantize: str | None = None  # how the large layers of what `read` reads are stored, `models.quantised`

    def __contains__(self, part: str) -> bool:
        return self.kind(part) is not None

    def kind(self, part: str) -> str | None:
        """The class of a part, None if the repository lacks it."""
        return kinds_in(self.index).get(part)

    def config(self, part: str) -> dict[str, Any]:
        file = self.root / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if not file.is_file():
            raise InputError(f"model.folder {self.source} has no {part}/{file.name}; the download is incomplete")
        return read_settings(file)

    def skeleton(self, part: str) -> nn.Module:
        """A part of diffusers on the meta device: its layers' names and shapes, no weights."""
        with torch.device("meta"):
            return getattr(diffusers, str(self.kind(part))).from_config(self.config(part))

    def variant(self, part: str) -> str | None:
        """ "fp16" if the part has its weights in that form only."""
        found = [match for file in self.files if (match := WEIGHTS.fullmatch(file.removeprefix(f"{part}/")))]
        return "fp16" if found and all(match["first"] or match["last"] for match in found) else None

    def check_lora(self, facts: Facts, source: str | Path, *, key: str, rank: int | None = None) -> None:
        """InputError unless the LoRA at `source` is one of this denoiser: known layers, their shapes, that rank.

        key: of the recipe, for the message.
        """
        part = facts.denoiser
        layers = lora.read(
            lora.find_file(source, key), shapes_of(self.skeleton(part)), facts, key, config=self.config(part)
        )
        if rank is not None and (its := common(layers)[0]) != rank:
            raise InputError(f"{key}: the LoRA in {source} has rank {its}; set model.lora_rank={its}")

    def read(
        self, part: str, kind: Any, dtype: torch.dtype, *, file: str | None = None, whole: Sequence[str] = ()
    ) -> nn.Module:
        """A network in `dtype`, in evaluation mode, frozen. `file`: its weights in place of the repository's own.
        whole: what four bits leave as it is (`models.quantised`)."""
        lacking: list[str] = []
        try:
            if file is not None:
                network = kind.from_single_file(file, config=str(self.root), subfolder=part, torch_dtype=dtype)
            else:
                options: dict[str, Any] = {"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype}
                if not issubclass(kind, ModelMixin):
                    options["trust_remote_code"] = False  # else transformers asks whether the folder's code may run
                if (variant := self.variant(part)) is not None:
                    options["variant"] = variant
                place = loader_place(self.source, self.root)
                with quietly(place):
                    network, told = kind.from_pretrained(
                        place, subfolder=part, use_safetensors=True, output_loading_info=True, **options
                    )
                lacking = sorted(name for name in told["missing_keys"] if not UNREAD.search(name))
        except READING_ERRORS as error:
            if file is None and (missing := absent(self.source, self.root, part)):
                raise missing from error
            what = file or f"{self.source}, {part}"
            raise InputError(
                f"{what}: cannot be read as {kind.__name__}; is it another model's? ({first_line(error)})"
            ) from error
        if lacking:
            raise InputError(
                f"{self.source}: its {part} lacks {len(lacking)} of {len(network.state_dict())} tensors of "
                f"{type(network).__name__}, {lacking[0]} for one; download it again"
            )
        if any(p.is_meta for p in network.parameters()):
            raise InputError(f"{file or self.source}: holds no weights for parts of {kind.__name__}; is it whole?")
        network = network.eval().requires_grad_(False)
        return network if self.quantize is None or part == "vae" else quantise(network, self.quantize, dtype, whole)

    def tokenizer(self, part: str, kind: Any) -> Any:
        if not any((self.root / part / name).is_file() for name in VOCABULARIES):  # its class would make an empty one
            raise InputError(
                f"model.folder {self.source}: {part} holds no vocabulary ({', '.join(VOCABULARIES)}); "
                "complete the download"
            )
        try:
            return kind.from_pretrained(loader_place(self.source, self.root), subfolder=part, trust_remote_code=False)
        except (*UNREACHED, ValueError) as error:
            raise InputError(f"model.folder {self.source}: {part} cannot be read: {first_line(error)}") from error

    def _reads(self, file: Path) -> bool:
        match = WEIGHTS.fullmatch(file.name)
        return match is not None and bool(match["first"] or match["last"]) == (self.variant(file.parent.name) == "fp16")

    def version(self, parts: Iterable[str]) -> str:
        """What changes when these parts do, whether or not they are here yet: on the hub the commit, else `digest`."""
        return self.digest(parts) if self.root == Path(self.source) else self.root.name

    def digest(self, parts: Iterable[str], *files: str | None) -> str:
        """SHA-256 over the files of `parts` that from_pretrained reads, and over further `files`."""
        found = [p for part in parts for p in sorted((self.root / part).glob("*")) if p.is_file()]
        read = [p for p in found if p.suffix != ".safetensors" or self._reads(p)]
        total = hashlib.sha256()
        for path in [*read, *(Path(f) for f in files if f)]:
            total.update(f"{path.parent.name}/{path.name}\n{_sha256(path)}\n".encode())
        return total.hexdigest()


def open_repository(
    folder: str | Path | None,
    *,
    family: str,
    parts: Mapping[str, str],
    options: LoadOptions | None = None,
    optional: Iterable[str] = (),
) -> Repository:
    """The repository, if it has every one of `parts` (name -> class) with safetensors weights; ValueError if not."""
    file = (options or {}).get("file")
    if file is not None:
        check_file(Path(file).expanduser())
    source, path, local = locate(folder, family, file)
    files: list[str] | None
    if local:
        root, files = path, _files_in(path)
    else:
        root, files = from_hub(source)
    if not (root / "model_index.json").is_file():
        why = "does not exist" if not root.exists() else "has no model_index.json"
        raise InputError(
            f"model.folder {source} is not a diffusers folder: it {why}. Convert a checkpoint with "
            "diffusers' from_single_file(...).save_pretrained(folder), or give a hub id (owner/name)"
        )
    index = read_settings(root / "model_index.json")
    known = _files_in(root) if files is None else files  # without the hub those that are here
    repository = Repository(str(path) if local else source, root, index, tuple(known), (options or {}).get("quantize"))
    check_task(source, str(index.get("_class_name")), family)
    for part, kind in parts.items():
        if part in repository or part not in optional:
            _check_part(repository, source, part, kind, family)
    weighty = [p for p in parts if p in repository and not p.startswith((*READERS, "scheduler"))]
    for part in parts:
        if part in repository and not part.startswith(READERS):
            check_quantised(source, part, repository.config(part))
    if file is not None:
        weighty = [p for p in weighty if p not in ("unet", "transformer")]
    if files is not None:
        check_weights(source, files, weighty)
    if local:
        for path in sorted(p for part in weighty for p in (root / part).glob("*.safetensors")):
            check_header(path)
    return repository


def kinds_in(index: Mapping[str, Any]) -> dict[str, str]:
    """Part -> class, of the parts that a model_index.json says are there. It has settings beside them, some of them
    lists: the layers of Krea 2's text encoder."""
    pairs = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {part: kind for part, kind in pairs.items() if isinstance(kind, str)}


def check_channels(repository: Repository, facts: Facts) -> None:
    """InputError for networks that take more than the noisy latents: inpainting, control, editing."""
    expected = facts.packing * channels_of(repository.config("vae"))
    got = repository.config(facts.denoiser).get("in_channels", expected)
    if got != expected:
        raise InputError(
            f"model.folder {repository.source}: its {facts.denoiser} takes {got} channels (inpainting, control or "
            f"editing?); a text-to-image model's takes {expected}"
        )


def check_call(repository: Repository, facts: Facts) -> None:
    """InputError for a network that would draw something else with the calls and the noise of its family: one that is
    told its guidance with the time (a latent consistency model), and one that was trained on noise of another kind."""
    if repository.config(facts.denoiser).get("time_cond_proj_dim"):
        raise InputError(
            f"model.folder {repository.source}: its {facts.denoiser} is told the strength of guidance with the time (a "
            "latent consistency model), which palate does not tell it; give the model that it was distilled from"
        )
    kind = str(repository.kind("scheduler"))
    if OTHER_NOISE.match(kind):
        raise InputError(
            f"model.folder {repository.source} is sampled by {kind}, whose noise is not that of {facts.name}; give a "
            "folder of the base model"
        )


def _check_part(repository: Repository, source: str, part: str, kind: str, family: str) -> None:
    """InputError unless the repository has that part, of that class."""
    index, got = repository.index, repository.kind(part)
    if got is None:
        other = next((found for k in kinds_in(index).values() if (found := family_with(k))), None)
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
            + (f"; set model.name to {other}" if (other := family_with(got)) else "")
        )


def _files_in(path: Path) -> list[str]:
    return [file.relative_to(path).as_posix() for file in path.glob("*/*")]


def read_settings(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a model's folder. InputError: it is damaged."""
    try:
        found = parse_json(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"model.folder: {file} is not valid JSON ({str(error)[:100]}); download it again") from error
    if not isinstance(found, dict):
        raise InputError(f"model.folder: {file} holds no settings; download it again")
    return found


def _sha256(path: Path) -> str:
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:  # the hub's cache names large files by their SHA-256
        return real.name
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
