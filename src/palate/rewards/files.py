"""Where a reward's weights come from: a local file or folder, or a repository of the hub. safetensors only.

Every error names the recipe's key, reward.source.NAME, and what to do about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.utils import logging as of_transformers

from palate.models.quiet import quietly
from palate.runtime.errors import InputError, first_line
from palate.runtime.files import in_shell
from palate.runtime.hub import UNREACHED, hub_file, reachable

OFFLINE = "and the hub cannot be reached"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = (
    "python -c \"import sys, torch; from safetensors.torch import save_file; w = torch.load(sys.argv[1], 'cpu', "
    "weights_only=True); w = w.get('state_dict', w); save_file({k: v.clone().contiguous() for k, v in w.items() "
    'if torch.is_tensor(v)}, sys.argv[2])"'
)

M = TypeVar("M", bound=nn.Module)


def convert_command(path: Path) -> str:
    """The shell command that turns a pickled checkpoint into safetensors, without running code from it."""
    return f"{CONVERT} {in_shell(path)} {in_shell(path.with_suffix('.safetensors'))}"


def weights_file(reward: str, source: str, *, default: str, how: str) -> Path:
    """The one .safetensors file of `source`: the file itself, the one in a folder, or `default` in a hub repository.

    `how` says where the weights are published; it ends every error.
    """
    key = f"reward.source.{reward}"
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1 or (path / default).is_file():
            return path / default if (path / default).is_file() else found[0]
        if found:
            raise InputError(
                f"{key}: {path} holds {len(found)} .safetensors files; give one of them, or name it {default}"
            )
        pickled = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
        if not pickled:
            raise InputError(f"{key}: {path} holds no weights. {how}")
        path = pickled[0]
    if path.suffix in PICKLES:
        raise InputError(
            f"{key}: {path} is a pickle, which can run code when it is loaded; only .safetensors is read. "
            f"Convert it once with\n{convert_command(path)}"
        )
    if path.is_file():
        return path
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or path.suffix == ".safetensors":
        raise InputError(f"{key}: {source} does not exist. {how}")
    try:
        return hub_file(source, default)
    except GatedRepoError as error:
        raise InputError(
            f"{key}: {source} is gated; accept its terms on huggingface.co and run `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        if not reachable():
            raise InputError(f"{key}: {source} is not in the local cache, {OFFLINE}. {how}") from error
        raise InputError(f"{key}: {source} holds no reachable {default} ({first_line(error)}). {how}") from error
    except (HFValidationError, *UNREACHED) as error:
        raise InputError(f"{key}: {source} holds no reachable {default} ({first_line(error)}). {how}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; InputError names a file that cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors ({first_line(error)}); fetch or convert it again"
        ) from error


def pretrained(kind: Any, reward: str, source: str, *, how: str, **options: Any) -> Any:
    """kind.from_pretrained(source); `kind` is a transformers model or tokenizer class. InputError where a tensor of the
    model is missing or of another shape, which transformers would leave random."""
    key, folder = f"reward.source.{reward}", Path(source)
    weights = issubclass(kind, nn.Module) if isinstance(kind, type) else False
    if weights and folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
        what = (
            f"only a pickle; convert it once with\n{convert_command(pickled[0])}" if pickled else f"no weights. {how}"
        )
        raise InputError(f"{key}: {folder} holds {what}")
    if weights:
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    remote = not folder.exists()
    if remote and not reachable():
        options["local_files_only"] = True
    try:
        with quietly(source), _without_report():
            found = kind.from_pretrained(source, trust_remote_code=False, **options)
    except (*UNREACHED, ValueError, SafetensorError) as error:
        if options.get("local_files_only"):
            raise InputError(f"{key}: {source} is not in the local cache, {OFFLINE}. {how}") from error
        hint = "accept its terms on huggingface.co and run `hf auth login`" if "gated" in str(error) else how
        raise InputError(
            f"{key}: {source} cannot be loaded as {kind.__name__} ({first_line(error)}). {hint}"
        ) from error
    if not weights:
        return found
    model, told = found
    if wrong := sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}):
        raise InputError(
            f"{key}: {source} is no {kind.__name__}, or not whole: {len(wrong)} of {len(model.state_dict())} tensors "
            f"are missing or of another shape, {wrong[0]} for one. {how}"
        )
    return model


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Inside, transformers prints no table of tensors that a file has too many or too few; errors it does."""
    before = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        of_transformers.set_verbosity(before)


def load_state(
    build: Callable[[], M], state: Mapping[str, Tensor], *, reward: str, path: Path, dtype: torch.dtype
) -> M:
    """The module, frozen, with every one of its tensors from `state`; a missing or left-over key is an error."""
    with no_init_weights():  # every weight is overwritten below
        module = build()
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    wrong = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name] != state[name].shape
    )
    if wrong:
        raise InputError(
            f"reward.source.{reward}: {path} holds another architecture: {len(wrong)} of {len(own)} tensors are "
            f"missing, left over or of another shape, {wrong[0]} for one"
        )
    module.load_state_dict(dict(state))
    return module.to(dtype).eval().requires_grad_(False)
