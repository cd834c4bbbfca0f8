"""Blind comparison of a run with what it began from, or with another run; and pictures of any strength or mix of both.

Which picture is whose lies in a file that no page sends; pictures are named by their content, so names tell nothing.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate import recipe as recipes
from palate.core import Model, Sampler
from palate.data import evenly_spaced, read_prompts
from palate.evaluate import generate, read_index
from palate.evaluate.intervals import win_rate_interval
from palate.evaluate.verdicts import MIN_PROMPTS
from palate.export import Lora, read_adapter
from palate.models.emoji import EmojiModel
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.exclusive import exclusive
from palate.runtime.files import append, file_digest, json_digest
from palate.studio.artist import LOADING, png_of
from palate.studio.undo import adapter_now
from palate.studio.workspace import Workspace
from palate.taste.staging import bring_in, staging

PAIRS = 24  # of a study
SHOWN = 12  # pictures of the live grid
STRONGEST = 1.5
ENOUGH = 5  # answers from which the win rate is shown


class Showing(NamedTuple):
    """How to draw from the base model that a run trains, and the run's own prompts."""

    model: Model
    sampler: Sampler | None
    prompts: list[str]


class Comparing:
    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self._lock = threading.Lock()
        self._models: dict[str, Model] = {}

    # --------------------------------------------------------------------------------------------- blind study

    def name_of(self, run: str, other: str = "") -> str:
        """The study of that run's newest result against `other` ("": what it began from)."""
        steps = [self._step(name) for name in (run, other) if name]
        return ".".join([run, other or "base", *map(str, steps)])

    def existing(self, run: str, other: str = "") -> str | None:
        name = self.name_of(run, other)
        made = self.workspace.read(f"compare/{name}/study.json").get("made")
        if made not in (None, self._made(run, other)):  # of an earlier run of that name
            name = f"{name}.{self._made(run, other)}"
        return name if (self._folder(name) / "study.json").is_file() else None

    def study(self, run: str, other: str = "") -> str:
        """The same study's name; its pictures are drawn if it is new."""
        if run == other:
            raise InputError(f"{run} would be compared with itself; choose another run, or what it began from")
        if (found := self.existing(run, other)) is not None:
            return found
        name = self.name_of(run, other)
        if (self._folder(name) / "study.json").is_file():
            name = f"{name}.{self._made(run, other)}"
        self._folder(name).mkdir(parents=True, exist_ok=True)
        with self._lock, exclusive(self._folder(name)):  # one order of pairs, whatever was answered in it
            if not (self._folder(name) / "study.json").is_file():
                self._make(name, run, other)
        return name

    def _made(self, run: str, other: str) -> str:
        """What tells the results from those of earlier runs of the same names and steps."""
        runs = [self.workspace.run(name) for name in (run, other) if name]
        found = [folder / "checkpoints" / checkpoint.name(self._step(folder.name)) for folder in runs]
        manifests = [folder / checkpoint.MANIFEST for folder in found]
        return json_digest([file_digest(file) if file.is_file() else "" for file in manifests])[:8]

    def _step(self, run: str) -> int:
        found = checkpoint.steps(self.workspace.run(run) / "checkpoints")
        if not found:
            raise InputError(f"{run} holds no result yet; let it make its first steps")
        return found[-1]

    def _make(self, name: str, run: str, other: str) -> None:
        showing = self.showing(run)
        prompts = evenly_spaced(showing.prompts, PAIRS)
        second = self.showing(other) if other else showing  # a LoRA goes onto the model that it was trained for
        sides = {"a": self._draw(showing, prompts, [(1.0, self._lora(run))]),
                 "b": self._draw(second, prompts, [(1.0, self._lora(other))] if other else [])}  # fmt: skip
        order = sorted(range(len(prompts)), key=lambda i: secrets.token_bytes(4))
        store, pairs = self.workspace.store, []
        with staging(store) as staged:
            for i in order:
                files = {side: staged.keep(png_of(images[i])) for side, images in sides.items()}
                pairs.append({"prompt": prompts[i], "left": secrets.choice("ab"), "files": files})
            tree = {"run": run, "other": other, "made": self._made(run, other), "pairs": pairs}
            bring_in(staged, store, lambda: self.workspace.write(f"compare/{name}/study.json", tree))

    def next(self, name: str) -> dict[str, Any] | None:
        """The first pair without an answer: {"number", "of", "prompt", "left", "right"} (files); None at the end."""
        pairs, answers = self._pairs(name), self.answers(name)
        for number, pair in enumerate(pairs):
            if number not in answers:
                left, right = pair["left"], "b" if pair["left"] == "a" else "a"
                return {"number": number, "of": len(pairs), "prompt": pair["prompt"],
                        "left": pair["files"][left], "right": pair["files"][right]}  # fmt: skip
        return None

    def answer(self, name: str, number: int, choice: str) -> None:
        if choice not in ("left", "right", "tie") or not 0 <= number < len(self._pairs(name)):
            raise InputError("expected an answer of left, right or tie to one of the pairs")
        if number in self.answers(name):
            return  # the screen is older; the first answer counts
        line = b"\n" + json.dumps({"pair": number, "choice": choice}).encode() + b"\n"  # after one that was cut short
        append(self._folder(name) / "choices.jsonl", line, durably=True)

    def answers(self, name: str) -> dict[int, str]:
        path = self._folder(name) / "choices.jsonl"
        found: dict[int, str] = {}
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            try:
                row = json.loads(line)
                found.setdefault(int(row["pair"]), str(row["choice"]))
            except (ValueError, KeyError, TypeError):
                continue  # a line that was cut short
        return found

    def win_rate(self, name: str) -> dict[str, Any] | None:
        """How often the run was preferred, a tie counting half, with its interval and whom it met; None before ENOUGH
        answers, or all of a study of fewer pairs. "verdict": more, less or chance; "few" of fewer than MIN_PROMPTS
        pairs, and "" before the last answer: of somebody who prefers neither, the interval leaves out one half at some
        answer from ENOUGH on in one study of five, and after the last in one of twenty."""
        tree, answers = self._tree(name), self.answers(name)
        pairs = tree["pairs"]
        if len(answers) < min(ENOUGH, len(pairs)) or not answers:
            return None
        scores = [0.5 if choice == "tie" else float(choice == ("left" if pairs[i]["left"] == "a" else "right"))
                  for i, choice in answers.items()]  # fmt: skip
        low, high = win_rate_interval(scores)
        verdict = "more" if low > 0.5 else "less" if high < 0.5 else "chance"
        if len(answers) < len(pairs):
            verdict = ""
        elif len(pairs) < MIN_PROMPTS:
            verdict = "few"
        return {"rate": sum(scores) / len(scores), "low": low, "high": high, "of": len(scores), "verdict": verdict,
                "run": tree.get("run", ""), "other": tree.get("other", "")}  # fmt: skip

    def _folder(self, name: str) -> Path:
        return self.workspace.home / "compare" / name

    def _tree(self, name: str) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        if "/" not in name and not name.startswith("."):
            tree = self.workspace.read(f"compare/{name}/study.json")
        if not isinstance(tree.get("pairs"), list):
            raise InputError("there is no such comparison; start it again on the page Compare")
        return tree

    def _pairs(self, name: str) -> list[dict[str, Any]]:
        pairs: list[dict[str, Any]] = self._tree(name)["pairs"]
        return pairs

    # ------------------------------------------------------------------------------------------------ live grid

    def grid(self, run: str, strength: float, other: str = "", mix: float = 0.0) -> list[bytes]:
        """PNGs of the run's first prompts: its LoRA at `strength`, of which the share `mix` is the other run's.

        InputError: out of range, not of the embedded model, or of two models, whose LoRAs do not add up.
        """
        if not (0 <= strength <= STRONGEST and 0 <= mix <= 1):
            raise InputError(f"strength goes from 0 to {STRONGEST}, the mix from 0 to 1")
        parts = [(strength * (1 - mix), self._lora(run))]
        showing = self.showing(run)
        if other:
            if self.showing(other).model is not showing.model:
                raise InputError(f"{run} and {other} train different models, so they do not mix; compare them blind")
            parts.append((strength * mix, self._lora(other)))
        with self._lock:
            images = self._draw(showing, showing.prompts[:SHOWN], parts)
        return [png_of(image) for image in images]

    def showing(self, run: str) -> Showing:
        """InputError for a run that is not a LoRA of the embedded model: drawing others takes too long for a page."""
        recipe = recipes.read(str(self.workspace.run(run) / "recipe.yaml"), stored=True)
        if recipe.model.name != "emoji" or recipe.model.weights != "lora":
            raise InputError(
                f"{run} is no LoRA of the embedded model; see its pictures step by step, or palate compare"
            )
        key = recipe.model.folder or ""
        with LOADING:  # the page asks for its live grid and for a study at once
            if key not in self._models:
                self._models[key] = EmojiModel.load(recipe.model.folder, training="none")
        sampler = recipes.sampler_of(recipes.build_algorithm(recipe))
        asked, given = recipe.prompts.preview, recipe.prompts
        if given.pairs or given.likes or given.images:  # trained on pictures: their captions are no list of prompts
            preview = read_prompts(asked) if asked else self._drawn(run)
        else:
            _, preview = recipes.prompts_of(recipe)
        return Showing(self._models[key], sampler, list(dict.fromkeys(preview)))

    def _drawn(self, run: str) -> list[str]:
        """What the run's own previews show."""
        samples = self.workspace.run(run) / "samples"
        steps = checkpoint.steps(samples)
        rows = read_index(samples / checkpoint.name(steps[0])) if steps else []
        if not rows:
            raise InputError(f"{run} has drawn no picture yet, so there is no prompt to compare on")
        return [row["prompt"] for row in rows]

    def _lora(self, run: str) -> dict[str, Lora]:
        return read_adapter(adapter_now(self.workspace.run(run)))

    def _draw(self, showing: Showing, prompts: list[str], parts: list[tuple[float, dict[str, Lora]]]) -> Tensor:
        with torch.no_grad():
            with_strength(showing.model, parts)
            return generate(showing.model, prompts, [0], sampler=showing.sampler)


def with_strength(model: Model, parts: Sequence[tuple[float, dict[str, Lora]]]) -> None:
    """Set the plain network of `model` to its base plus each LoRA times its strength.

    The base weights are kept at the first call, and every change is of them: that of a DoRA depends on them.
    """
    network = model.weights.network  # type: ignore[attr-defined]
    kept: dict[str, Tensor] = model.__dict__.setdefault("studio_base", {})
    layers = dict(network.named_modules())
    with torch.no_grad():
        for name, base in kept.items():
            layers[name].weight.copy_(base)
        for strength, loras in parts:
            for name, lora in loras.items():
                weight = layers[name].weight
                base = kept.setdefault(name, weight.detach().clone())
                weight.add_(lora.change(base).to(weight), alpha=strength)
