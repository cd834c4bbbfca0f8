"""Python code that a recipe names: `my_reward.py:score`, a file and an object in it, or `package.module:object`.

The code runs with all rights of the user, as anything that is imported does: name only files that you have read. Its
SHA-256 is kept with the run, so that a changed file is noticed; that of a run or recipe which is only looked at is not
imported unless it has run before (`runtime.trust`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from palate.runtime.errors import InputError
from palate.runtime.files import file_digest
from palate.runtime.trust import admit

PATH_MARK = ".py:"  # what tells a file and its object from the name of a published part


def names_a_file(name: str) -> bool:
    """Whether `name` is FILE.py:OBJECT."""
    return PATH_MARK in name


def split_name(name: str) -> tuple[Path, str]:
    """The file and the object of FILE.py:OBJECT."""
    path, _, found = name.rpartition(PATH_MARK)
    return Path(f"{path}.py").expanduser(), found


def short_name(name: str) -> str:
    """The name without its folder, as metrics and pages show it."""
    if not names_a_file(name):
        return name
    path, found = split_name(name)
    return f"{path.name}:{found}"


def code_digest(name: str) -> str:
    """SHA-256 of the file that FILE.py:OBJECT names, or package.module:object; "" where there is no such file."""
    if names_a_file(name):
        path, _ = split_name(name)
    else:
        path = _module_file(name.partition(":")[0])
    return file_digest(path) if path.is_file() else ""


def _module_file(module: str) -> Path:
    """The file of a module, found without importing the packages above it; an empty path where there is none."""
    top, *below = module.split(".")
    with importable(Path.cwd()):
        try:
            found = importlib.util.find_spec(top)
            for k, part in enumerate(below, 1):
                places = found.submodule_search_locations if found else None
                name = ".".join([top, *below[:k]])
                found = importlib.machinery.PathFinder.find_spec(name, list(places)) if places and part else None
        except (ImportError, ValueError, AttributeError):
            found = None
    return Path((found and found.origin) or "")


def load_object(name: str, *, key: str) -> Any:
    """The object that FILE.py:OBJECT names. InputError: no such file or object, or the file cannot be imported.

    `key` is the key of the recipe that its errors name. A file is imported once in a process.
    """
    path, attribute = split_name(name)
    if not path.is_file():
        raise InputError(f"{key}: {path} does not exist; give a file and its object, for example my_code.py:thing")
    if not attribute.isidentifier():
        raise InputError(f"{key}: {name!r} names no object; write FILE.py:NAME, for example my_code.py:thing")
    path = path.resolve()
    admit(path, key)
    module = _import_file(path, key)
    if attribute not in vars(module):
        own = [each for each in vars(module) if not each.startswith("_")]
        raise InputError(f"{key}: {path} has no {attribute}; it has {', '.join(own) or 'nothing'}")
    return vars(module)[attribute]


def refused_call(function: Any, *arguments: Any, **named: Any) -> str:
    """Why the function cannot be called so, as "missing a required argument: 'x'"; "" where it can, or may."""
    if not (inspect.isroutine(function) or isinstance(function, functools.partial)):
        function, arguments = type(function).__call__, (function, *arguments)  # an object may be a stand-in for another
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        return str(error)
    except ValueError:  # it has no signature that can be read, as of one in C
        pass
    return ""


def imported(module: str, attribute: str) -> Any:
    """That attribute of a module, which is imported first. ModuleNotFoundError or AttributeError: there is none."""
    return getattr(importlib.import_module(module), attribute)


def load_module_object(name: str, *, key: str) -> Any:
    """The object that package.module:object names, looked for in the current folder as well. InputError: none."""
    module, colon, attribute = name.partition(":")
    with importable(Path.cwd()):
        try:
            return imported(module, attribute) if colon and attribute else None
        except Exception as error:  # importing runs the user's own code
            raise InputError(f"{key}: cannot import {name!r} ({type(error).__name__}: {error})") from error


def _import_file(path: Path, key: str) -> ModuleType:
    name = f"palate_part_{path.stem}_{file_digest(path)[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{key}: {path} cannot be imported; expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        with importable(path.parent):  # the modules beside it
            spec.loader.exec_module(module)
    except Exception as error:  # importing runs the user's own code
        del sys.modules[name]
        raise InputError(f"{key}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    return module


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """The folder on the path of imports, as with `python -m`; the console script leaves the current one out."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
