"""Arguments and options that several commands share, and what their values must be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate.runtime.errors import InputError
from palate.runtime.own_files import OWN_FILES
from palate.runtime.trust import only_looking

if TYPE_CHECKING:
    from palate.recipe import Recipe

MAX_SEEDS = 4096


class Seeds(tuple[int, ...]):
    """Seeds as 0-3,8 names them."""

    text: str

    def __new__(cls, text: str) -> Seeds:
        """Raises typer.BadParameter where the text is not a list of whole numbers and ranges."""
        numbers: list[int] = []
        try:
            for part in text.split(","):
                first, dash, last = part.partition("-")
                lowest, highest = int(first), int(last if dash else first)
                if highest - lowest + len(numbers) >= MAX_SEEDS:  # before they are written out
                    raise ValueError
                numbers += range(lowest, highest + 1)
        except ValueError as error:
            raise typer.BadParameter(
                f"expected whole numbers, for example 0-15 or 1,5,9 (at most {MAX_SEEDS}), got {text!r}"
            ) from error
        if not numbers:
            raise typer.BadParameter(f"{text!r} names no seed")
        made = super().__new__(cls, numbers)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text


class Strengths(tuple[float, ...]):
    """Strengths of a LoRA as 0,0.5,1 names them."""

    def __new__(cls, text: str) -> Strengths:
        """Raises typer.BadParameter where the text is not a list of numbers between -10 and 10."""
        try:
            numbers = [float(part) + 0.0 for part in text.split(",")]  # -0 is 0
        except ValueError:
            numbers = []
        if not numbers or not all(-10 <= number <= 10 for number in numbers):
            raise typer.BadParameter(f"expected numbers between -10 and 10, for example 0,0.5,1, got {text!r}")
        return super().__new__(cls, dict.fromkeys(numbers))


class Size(tuple[int, int]):
    """Height and width in pixels as 1024, or 832,1216, names them."""

    def __new__(cls, text: str) -> Size:
        """Raises typer.BadParameter where the text is neither a side nor height,width."""
        try:
            sides = [int(part) for part in text.split(",")]
        except ValueError:
            sides = []
        if len(sides) not in (1, 2) or min(sides) < 1:
            raise typer.BadParameter(f"expected a side in pixels, or height,width as 832,1216; got {text!r}")
        return super().__new__(cls, (sides[0], sides[-1]))


class Words(tuple[str, ...]):
    """Control words as "3d, cartoon" names them."""

    def __new__(cls, text: str) -> Words:
        """Empty parts are left out."""
        return super().__new__(cls, [word.strip() for word in text.split(",") if word.strip()])


def finite(value: float | None) -> float | None:
    """An option's number as it is. typer.BadParameter: nan, inf."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}")
    return value


def _recipe_names(incomplete: str) -> list[str]:
    """For the shell's completion: published recipes, without reading them."""
    folder = Path(__file__).parents[1] / "recipes"
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem.startswith(incomplete))


def run_names(incomplete: str) -> list[str]:
    """For the shell's completion: the folders of runs/."""
    return sorted(str(path.parent) for path in Path("runs").glob("*/recipe.yaml")
                  if str(path.parent).startswith(incomplete))  # fmt: skip


Run = Annotated[Path, typer.Argument(help="The folder of a run, for example runs/NAME.", autocompletion=run_names)]
RecipeName = Annotated[
    str,
    typer.Argument(
        help="A published recipe (see `palate recipes`) or the path of a YAML file.", autocompletion=_recipe_names
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, for example trainer.steps=40.", show_default=False)
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Replace what is already in run.folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Ranks = Annotated[int, typer.Option("--nproc", min=1, help="Processes that share a batch, one per GPU.")]
StrengthsOption = Annotated[Strengths | None, typer.Option("--strength", parser=Strengths, metavar="NUMBERS",
                            show_default=False, help="How much of the LoRA: 0 = base, 1 = trained.")]  # fmt: skip
WantedWords = Annotated[Words | None, typer.Option(parser=Words, metavar="WORDS", show_default=False,
                        help='Words that pictures should match better, for example "3d, cartoon".')]  # fmt: skip
UnwantedWords = Annotated[Words | None, typer.Option(parser=Words, metavar="WORDS", show_default=False,
                          help='Words that they should match less, for example "flat".')]  # fmt: skip


def read_recipe(name: str, overrides: Sequence[str] | None, *, to_run: bool = False) -> Recipe:
    """`palate.recipe.read`. to_run: it is not only looked at, so that code of its own may run."""
    from palate.recipe import read

    with contextlib.nullcontext() if to_run else only_looking("run" if _of_a_run(name) else "recipe"):
        return read(name, overrides or ())


def _of_a_run(name: str) -> bool:
    """Whether the recipe is that of a run, which may be somebody else's."""
    return any((Path(name).parent / file).exists() for file in ("metrics.jsonl", "identity.json"))


def known_device(name: str | None) -> None:
    """InputError where no device has that name: said before the minutes that counting a large model takes."""
    if name is not None:
        from palate.plan.table import find_device

        find_device(name)


def recipe_file(run: Path) -> Path:
    """The recipe of a run folder; InputError where it is none."""
    if run.name == "recipe.yaml" and run.is_file():
        raise InputError(f"{run} is the recipe of a run; give its folder, {run.parent}")
    file = run / "recipe.yaml"
    if not file.is_file():
        raise InputError(f"{run} is not a run (it holds no recipe.yaml); give the folder of one, for example runs/NAME")
    return file


def belongs(option: str, used: bool, other: str, given: bool) -> None:
    """InputError where an option is used without the one that it belongs to."""
    if used and not given:
        raise InputError(f"{option} belongs to {other}; give both, or neither")


def page_file(option: str, path: Path | None) -> None:
    """InputError where the option's page cannot be written: said before anything is drawn for it."""
    if path is not None and path.is_dir():
        raise InputError(f"{option}: {path} is a folder; name the page in it, for example {path / 'page.html'}")
    if path is not None and path.suffix.lower() in (".json", ".yaml", ".jsonl"):
        raise InputError(f"{option}: {path} is no name of a page; give one that ends in .html")


def new_place(option: str, path: Path | None) -> None:
    """InputError where the option names a file, or a run, whose own files would be written over."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise InputError(f"{option}: {path} is a file; name a folder")
    if path.suffix == ".safetensors":
        raise InputError(f"{option}: {path} is the name of a file; name the folder that is to hold it")
    whole = path.resolve()
    for folder in (whole, *whole.parents):
        if (folder / "metrics.jsonl").is_file() and (folder / "recipe.yaml").is_file():
            first = whole.relative_to(folder).parts[:1]
            if not first or (first[0] in OWN_FILES and first[0] != "export"):
                raise InputError(f"{option}: {path} holds files of the run {folder.name}; name a folder outside it")


def all_prompts(prompt: list[str] | None, prompts_file: str | None) -> list[str]:
    """Those of --prompt and of --prompts-file. InputError: there are none, or an empty one."""
    prompts = list(prompt or ())
    if any(not text.strip() for text in prompts):
        raise InputError("--prompt: got an empty prompt")
    if prompts_file:
        from palate.data import read_prompts

        prompts += read_prompts(prompts_file)
    if not prompts:
        raise InputError("no prompt: give --prompt or --prompts-file")
    return prompts
