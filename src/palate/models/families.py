"""Model families by name, `model.name` of a recipe: Palate's own files in this folder, and those of installed packages.

An installed package adds a family by an entry point, whose object is the class with `load` and `predict`:

    [project.entry-points."palate.models"]
    my-family = "my_package.my_family:MyFamily"

Nothing here imports a family, or torch, before `Family.load_class` is called: a recipe waits for its own family alone.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

from palate import models
from palate.runtime.code import imported, load_object, names_a_file, split_name
from palate.runtime.errors import InputError

GROUP = "palate.models"
# The modules beside the families. Every other file in this folder is a family, my_family.py that of "my-family".
MECHANISM = frozenset(
    {
        "adapters",
        "autoencoder",
        "delta",
        "facts",
        "families",
        "gaussian",
        "latents",
        "lora",
        "merge",
        "options",
        "original",
        "parts",
        "placement",
        "quantised",
        "quiet",
        "saved",
        "selection",
        "source",
        "repository",
        "repository_checks",
        "schedules",
        "sgm",
        "sizes",
        "text_cache",
        "vocabulary",
    }
    | {"weights"}
)
GIVEN = ("training", "lora_rank", "lora_alpha", "lora_targets", "names")  # what a recipe gives to every `load`


class LoadOptions(TypedDict, total=False):
    """What the `load` of every family over a diffusers folder takes; `models.options.Options` has the defaults."""

    training: str
    lora_rank: int
    lora_alpha: float | None
    lora_targets: Sequence[str] | None
    names: Sequence[str]
    dtype: str
    device: str | None
    gradient_checkpointing: bool
    image_size: int | Sequence[int] | None
    file: str | None
    quantize: str | None
    attention: str | None
    compile: bool
    offload: bool
    text_cache: str | Path | None
    cut: bool


@dataclass(frozen=True)
class Family:
    """One family, not yet imported. keys: those of the recipe's `model` that its `load` reads beside what all read."""

    name: str
    module: str
    kind: str  # the class
    keys: tuple[str, ...]

    def load_class(self) -> Any:
        """The class, after importing its module. InputError: the package or file that names it does not have it."""
        if names_a_file(self.module):
            return load_object(self.module, key="model.name")
        try:
            return imported(self.module, self.kind)
        except ModuleNotFoundError as error:
            if error.name is None or not self.module.startswith(error.name):
                raise
            raise InputError(
                f"model.name {self.name}: there is no module {self.module}; reinstall its package"
            ) from error
        except AttributeError as error:
            raise InputError(
                f"model.name {self.name}: {self.module} has no {self.kind}; reinstall its package"
            ) from error


def names() -> tuple[str, ...]:
    """Every family's name, sorted."""
    return tuple(sorted(_places()))


def find(name: str) -> Family:
    """The family of that name, or of FILE.py:CLASS. InputError: there is none."""
    if names_a_file(name):
        path, kind = split_name(name)
        return Family(name, name, kind, _signature_in(path, kind)[1] if path.is_file() else ())
    places = _places()
    if name not in places:
        raise InputError(f"model.name got {name!r}; expected one of {', '.join(sorted(places))}")
    module, _, kind = places[name].partition(":")
    kind, keys = _signature(module, kind)
    return Family(name, module, kind, keys)


def _places() -> dict[str, str]:
    """Name -> "module" of Palate's own families, "module:Class" of entry points. Palate's own come first."""
    found = {point.name: point.value for point in _installed()}
    for module in pkgutil.iter_modules(models.__path__):
        if module.name not in MECHANISM:
            found[module.name.replace("_", "-")] = f"{models.__name__}.{module.name}"
    return found


@cache
def _installed() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _signature(module: str, kind: str) -> tuple[str, tuple[str, ...]]:
    """The class of a family's module, the one with `load` and `predict`, and `load`'s own arguments.

    The source is read, not run: importing it would import torch. A module without source gets no keys of its own.
    """
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return kind, ()
    return _signature_in(Path(spec.origin), kind)


def _signature_in(file: Path, kind: str) -> tuple[str, tuple[str, ...]]:
    status = file.stat()
    return _signature_as_of(file, kind, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _signature_as_of(file: Path, kind: str, modified: int, size: int) -> tuple[str, tuple[str, ...]]:
    """Of a file that is read once, however many recipes are: each recipe asks every family for its keys."""
    try:
        classes = list(_classes(file.read_text("utf-8")))
    except (SyntaxError, UnicodeDecodeError):  # told when it is imported
        return kind, ()
    for node, methods in classes:
        if node.name == kind or (not kind and {"load", "predict"} <= methods.keys()):
            load = methods.get("load")
            if load is None:
                return node.name, ()
            shared = LoadOptions.__annotations__ if load.args.kwarg else ()  # **options: Unpack[LoadOptions]
            taken = [*shared, *(a.arg for a in (*load.args.args, *load.args.kwonlyargs))]
            return node.name, tuple(key for key in taken if key not in (*GIVEN, "cls", "folder"))
    return kind, ()


def _classes(source: str) -> Iterator[tuple[ast.ClassDef, Mapping[str, ast.FunctionDef]]]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            yield node, {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
