"""Recipes: YAML read into typed dataclasses; every mistake is reported at once, before any weight loads.

`read` gives a checked `Recipe`; `build` turns it into the objects that `palate.train` takes. A published recipe is
named without its folder or ending (`srpo-emoji`), any other by its path; overrides are `trainer.steps=40`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from palate.data import (
    RecipeError,
    captioned_images,
    check_images,
    encode_images,
    preference_pairs,
    read_prompts,
    read_text,
    spread,
)  # fmt: skip
from palate.models import families
from palate.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from palate.core import Algorithm, Model, Reward
    from palate.evaluate import EvaluationPanel
    from palate.train import Check

YAML_LIMIT = 256 * 1024  # bytes; a recipe is a page of text
YAML_DEPTH = 100


# model.name -> module, class, keys of ModelSettings that it reads beside those that all read
MODELS = {f.name: (f.module, f.kind, f.keys) for f in map(families.find, families.names())}
ALGORITHMS = {  # name -> module, class, dataclass of its settings
    "srpo": ("palate.algorithms.srpo", "SRPO", "SRPOSettings"),
    "sqdf": ("palate.algorithms.sqdf", "SQDF", "SQDFSettings"),
    "refl": ("palate.algorithms.refl", "ReFL", "ReFLSettings"),
    "draft": ("palate.algorithms.draft", "DRaFT", "DRaFTSettings"),
    "ddpo": ("palate.algorithms.ddpo", "DDPO", "DDPOSettings"),
    "flow_grpo": ("palate.algorithms.flow_grpo", "FlowGRPO", "FlowGRPOSettings"),
    "nft": ("palate.algorithms.nft", "NFT", "NFTSettings"),
    "dpo": ("palate.algorithms.dpo", "DPO", "DPOSettings"),
    "distar": ("palate.algorithms.distar", "Distar", "DistarSettings"),
}
EMBEDDED_REWARDS = ("emoji", "emoji-heldout")
HELD_OUT = ("clip-score", "pickscore", "hpsv2")  # two towers: their image features measure distances
ORACLES = ("jpeg-size", "hidden-judge", "colour-position")
SIMPLE_REWARDS = ("colourfulness", "brightness", "warmth", "saturation", "high_frequency", "jpeg_size")
PUBLISHED_REWARDS = {  # name -> module, function that loads it from reward.source.NAME
    "clip-score": ("palate.rewards.clip", "load_clip_score"),
    "pickscore": ("palate.rewards.clip", "load_pickscore"),
    "hpsv2": ("palate.rewards.clip", "load_hpsv2"),
    "aesthetic": ("palate.rewards.aesthetic", "load_aesthetic"),
    "image-reward": ("palate.rewards.image_reward", "load_image_reward"),
    "hpsv3": ("palate.rewards.hpsv3", "load_hpsv3"),
    "remote": ("palate.rewards.remote", "load_remote"),
    "vlm-judge": ("palate.rewards.vlm", "load_vlm"),
}
SERVICES = {  # rewards behind a URL, with an example of one
    "remote": "http://127.0.0.1:8411/score", "vlm-judge": "http://127.0.0.1:8000/v1/chat/completions#MODEL",
}  # fmt: skip

WITHOUT_GRADIENT = ("jpeg_size", *SERVICES)
WITHOUT_WORDS = (*SIMPLE_REWARDS, "aesthetic")  # rewards that read no prompt
CLIMBERS = ("srpo", "distar", "refl", "draft", "sqdf")  # algorithms that need the reward's gradient

HARMLESS = ("steps", "checkpoint_every", "keep_checkpoints", "preview_every", "preview_prompts", "threads",
            "micro_batches",
            "sharding")  # of trainer: may change when a run is resumed  # fmt: skip

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PromptList = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
RewardName = Literal[(*EMBEDDED_REWARDS, *SIMPLE_REWARDS, *PUBLISHED_REWARDS)]
_STRICT = ConfigDict(extra="forbid")


def _image_size(value: Any) -> int | tuple[int, int]:
    given = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if any(type(side) is not int or side < 1 for side in given):
        raise InputError(f"expected pixels a side, or [height, width], got {value!r}")
    return tuple(given) if len(given) == 2 else value


ImageSize = Annotated[Any, PlainValidator(_image_size)]


@dataclass(frozen=True)
class RunSettings:
    __pydantic_config__ = _STRICT
    folder: Annotated[str, Field(min_length=1)] = "runs/unnamed"
    rank_timeout_seconds: Positive = 600  # of several ranks: how long one waits for another that is alive but silent


@dataclass(frozen=True)
class RelativeSettings:
    """(1 + k) R(x, "positive. prompt") - R(x, "negative. prompt") in place of R; an empty word leaves the prompt."""

    __pydantic_config__ = _STRICT
    positive: str = ""
    negative: str = ""
    k: Finite = 0.0


@dataclass(frozen=True)
class ModelSettings:
    """Keys that are None have the family's own default; a family reads those that its `load` takes (docs/models.md)."""

    __pydantic_config__ = _STRICT
    name: Literal[tuple(MODELS)] = "emoji"
    weights: Literal["lora", "full"] = "lora"
    lora_rank: Positive = 16
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # None = lora_rank
    lora_targets: Annotated[list[str], Field(min_length=1)] | None = None  # ends of layer names; None = the family's
    start: str | None = None  # an earlier run's adapter folder, whose policy this one begins with; or emoji-1step
    folder: str | None = None  # a diffusers folder or hub id; None = the weights in the package (emoji)
    consistency: str | None = None  # folder of a consistency LoRA (LCM-LoRA); None = the one in the package (emoji)
    file: str | None = None  # a .safetensors file whose denoiser takes the place of the folder's
    dtype: Literal["float32", "bfloat16"] | None = None  # of frozen weights and of computation; bfloat16
    device: str | None = None  # cpu, cuda, cuda:N; None = the accelerator if there is one
    gradient_checkpointing: bool | None = None  # of denoiser and VAE decoder; on
    image_size: ImageSize | None = None  # pixels a side, or [height, width]; None = as the model was trained
    text_tokens: Positive | None = None  # of the long text encoder; None = as the model was trained
    text_cache: str | None = None  # folder of text embeddings; None = palate/text in the user's cache folder
    distilled_guidance: NonNegative | None = None  # what FLUX.1-dev is told; 3.5
    rollout_distilled_guidance: NonNegative | None = None  # and in calls without gradient; None = the same


@dataclass(frozen=True)
class RewardSettings:
    """One reward by name, or a weighted sum of several. docs/rewards.md lists them."""

    __pydantic_config__ = _STRICT
    name: RewardName | None = None
    weights: dict[RewardName, Finite] | None = None
    source: dict[Literal[tuple(PUBLISHED_REWARDS)], Annotated[str, Field(min_length=1)]] = field(default_factory=dict)
    # ^ of published weights: a file, a folder, a hub id; of "remote": a URL
    dtype: Literal["float32", "bfloat16"] | None = None  # of published rewards; None = bfloat16 for hpsv3, else float32
    scale: dict[RewardName, tuple[Finite, Annotated[float, Field(gt=0, allow_inf_nan=False)]]] = field(
        default_factory=dict
    )
    # ^ (mean, std) on images you trust: (R - mean) / std is what is weighed
    noised: dict[RewardName, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = field(default_factory=dict)
    # ^ std of the noised image that serves as the negative of a reward that reads no prompt
    relative: RelativeSettings | None = None  # of the whole reward; not of srpo, which has words of its own


@dataclass(frozen=True)
class PromptSettings:
    """Where prompts come from: a file (a path, or a name in the package), a list, captioned images, or pairs."""

    __pydantic_config__ = _STRICT
    file: str | None = None
    list: PromptList | None = None
    images: str | None = None  # a folder of captioned images: offline training on them
    pairs: str | None = None  # preference pairs for dpo: HPDv2's train.json or Pick-a-Pic's .parquet, ties left out
    preview: str | None = None  # a file as above; None = spread over the training prompts


@dataclass(frozen=True)
class GuardSettings:
    """Watches quantities that are NOT optimised, on fixed prompts and seeds, against their values before training."""

    __pydantic_config__ = _STRICT
    every: Count = 10  # steps between checks; 0 = off
    prompts: Positive = 48
    heldout_drop: NonNegative = 0.10  # largest fall of the held-out reward, in its own units
    concept_drop: NonNegative = 0.05  # largest fall of the share of images that still show the prompt's concept
    diversity_ratio: Share = 0.80  # smallest diversity inside a prompt and style, as a share of the base model's
    best: str | None = None  # the best step: highest in this metric among checks inside every limit; None = the newest
    action: Literal["stop", "rollback", "warn"] = "stop"
    rollbacks: Count = 2  # then stop; each one halves the learning rate


@dataclass(frozen=True)
class TrainerSettings:
    __pydantic_config__ = _STRICT
    steps: Positive = 40
    batch_size: Positive = 16
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    lrs: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None  # of single names, as assistant
    weight_decay: NonNegative = 1e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip_norm: NonNegative = 1.0  # 0 = off
    warmup: Count = 0  # steps over which the learning rate rises to lr
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # 0 = off; else previews and the result use the average
    seed: Count = 0
    checkpoint_every: Count = 20  # 0 = only at the end
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # beside the guard's best
    preview_every: Count = 0  # 0 = never; otherwise before, every so many steps, and after
    preview_prompts: Positive = 16
    threads: Count = 0  # 0 = torch's own choice
    # parts that a rank's share of the batch goes through in, one after the other: less memory
    micro_batches: Positive = 1
    # weights = full on several ranks: FSDP2; hybrid = inside a machine
    sharding: Literal["none", "full", "hybrid"] = "none"
    guard: GuardSettings = field(default_factory=GuardSettings)


@dataclass(frozen=True)
class SampleSettings:
    """How previews are sampled. None = the model's own default."""

    __pydantic_config__ = _STRICT
    steps: Positive | None = None
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class EvaluateSettings:
    __pydantic_config__ = _STRICT
    file: str | None = None  # as prompts.file; None = prompts.preview, else the training prompts
    prompts: Positive = 64
    seeds: Positive = 4
    heldout: Literal[HELD_OUT] | None = None  # judges other models than emoji; None = the first that is not optimised


@dataclass(frozen=True)
class OracleSettings:
    """Who is asked: give exactly one of name, function, command, url."""

    __pydantic_config__ = _STRICT
    name: Literal[ORACLES] | None = None  # built in
    function: str | None = None  # module:function, (images, prompts) -> numbers; its code runs
    command: Annotated[list[str], Field(min_length=1)] | None = None  # program and arguments, no shell
    url: Annotated[str, Field(pattern="^https?://")] | None = None
    noise: NonNegative = 0.0  # standard deviation, added to a built-in oracle's answer
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0  # seconds a batch
    retries: Count = 2  # of the same images; each counts as a question
    batch: Positive = 16  # images a call


@dataclass(frozen=True)
class OptimizeSettings:
    """`palate optimize`: questions to an oracle, and the surrogate that the algorithm climbs in place of reward."""

    __pydantic_config__ = _STRICT
    oracle: OracleSettings = field(default_factory=OracleSettings)
    budget: Positive = 2000  # questions in all, failed ones included
    rounds: Positive = 4  # each asks twice as often as the one before, then makes trainer.steps updates
    surrogate: Literal["bootstrap", "ucb"] = "bootstrap"
    heads: Positive = 4  # of the bootstrap; the surrogate is the largest
    exploration: NonNegative = 1.0  # of ucb: standard deviations of its posterior
    features: Literal["emoji", "clip-score", "pickscore", "hpsv2"] = "emoji"  # whose image tower the heads stand on
    features_source: str | None = None  # of a published one, as reward.source


@dataclass(frozen=True)
class Recipe:
    __pydantic_config__ = _STRICT
    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    algorithm: Any = None  # the algorithm's own settings, SRPOSettings for one
    reward: RewardSettings = field(default_factory=RewardSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    optimize: OptimizeSettings | None = None  # of `palate optimize` only
    algorithm_name: str = "srpo"


class Parts(NamedTuple):
    """What a recipe builds: the arguments of `palate.train`."""

    model: Model
    algorithm: Algorithm
    reward: Reward
    prompts: list[str]
    preview_prompts: list[str]
    latents: Tensor | None


# ---------------------------------------------------------------------------------------------------- reading


def published() -> dict[str, str]:
    """Name -> first comment line of every recipe in the package."""
    folder = importlib.resources.files("palate") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name[: -len(".yaml")]: f.read_text("utf-8").splitlines()[0].lstrip("# ") for f in files}


def text_of(source: str) -> str:
    """The YAML text of a published recipe or of the file at a path."""
    if source in published():
        return (importlib.resources.files("palate") / "recipes" / f"{source}.yaml").read_text("utf-8")
    path = Path(source)
    if not path.is_file():
        known = published()
        near = difflib.get_close_matches(source, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"published recipes: {', '.join(known)}"
        raise RecipeError(f"no recipe named {source!r} and no such file; {hint}")
    return read_text(path, limit=YAML_LIMIT)


def read(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe. Raises RecipeError with every mistake in it, a line each."""
    return parse(text_of(source), overrides)


def parse(text: str, overrides: Sequence[str] = ()) -> Recipe:
    if len(text.encode()) > YAML_LIMIT:
        raise RecipeError(f"the recipe is larger than {YAML_LIMIT // 1024} KiB")
    tree = _mapping(_yaml(text, "recipe"))
    mistakes: list[str] = []
    for override in overrides:
        _override(tree, override, mistakes)
    recipe = _validate(tree, mistakes)
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return recipe


def dump(recipe: Recipe) -> str:
    """The complete recipe as YAML, defaults included; `parse` reads it back to an equal one."""
    return yaml.safe_dump(as_tree(recipe), sort_keys=False, allow_unicode=True)


def as_tree(recipe: Recipe) -> dict[str, Any]:
    tree = json.loads(json.dumps(dataclasses.asdict(recipe)))
    name = tree.pop("algorithm_name")
    tree["algorithm"] = {"name": name, **tree["algorithm"]}
    return tree


def fingerprint(recipe: Recipe) -> str:
    """Hash of what decides the numbers of a run; its length, folder, previews and checkpoints do not."""
    tree = as_tree(recipe)
    for key in ("run", "evaluate", "sample"):
        del tree[key]
    for key in ("device", "text_cache"):
        del tree["model"][key]
    for key in HARMLESS:
        del tree["trainer"][key]
    if tree["reward"]["relative"] is None:
        del tree["reward"]["relative"]  # so that runs from before this key can be resumed
    tree["optimize"] = None  # palate optimize has an identity of its own
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _yaml(text: str, what: str) -> Any:
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):  # the scanner's time is quadratic in the depth
        depth += 1 if bracket in "[{" else -1
        if depth > YAML_DEPTH:
            raise RecipeError(f"the {what} is YAML nested deeper than {YAML_DEPTH} levels; a recipe has three")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise RecipeError(
                f"the {what} uses YAML aliases (*name), which can grow without limit; write the values out"
            )
        if twice := _repeated_key(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise RecipeError(f"{twice.value}: given twice (line {twice.start_mark.line + 1} of the {what}); keep one")
        return yaml.safe_load(text)
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"the {what} is not valid YAML{where}: {problem}") from error


def _repeated_key(node: yaml.Node | None) -> yaml.Node | None:
    """The first key that a mapping holds twice, where YAML would silently keep the last."""
    seen: set[str] = set()
    below: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                return key
            seen.add(str(key.value))
            below = [*below, value]
    return next((found for child in below if (found := _repeated_key(child))), None)


def _mapping(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else type(tree).__name__
        raise RecipeError(f"a recipe is a mapping of sections (run, model, algorithm, ...), got {got}")
    return tree


def _override(tree: dict[str, Any], override: str, mistakes: list[str]) -> None:
    key, equals, value = override.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        mistakes.append(f"{override}: an override is written section.key=value, for example trainer.steps=40")
        return
    for position, part in enumerate(names[:-1]):
        below = tree.setdefault(part, {})
        if below is None:
            below = tree[part] = {}
        if not isinstance(below, dict):
            mistakes.append(f"{key}: {'.'.join(names[: position + 1])} is a value, not a section")
            return
        tree = below
    try:
        tree[names[-1]] = _yaml(value, f"value of {key}")
    except RecipeError as error:
        mistakes.append(str(error))


def check_trainer(values: dict[str, Any]) -> TrainerSettings:
    """The same checks for settings that come from Python. Raises RecipeError with every mistake."""
    mistakes: list[str] = []
    settings = _check(TrainerSettings, values, "", mistakes)
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return settings


def algorithm_settings(name: str) -> type:
    """The dataclass of an algorithm's hyperparameters."""
    module, _, settings = ALGORITHMS[name]
    return getattr(importlib.import_module(module), settings)


def _validate(tree: dict[str, Any], mistakes: list[str]) -> Recipe | None:
    rest = {key: value for key, value in tree.items() if key != "algorithm"}
    for key, value in list(rest.items()):
        if value is None and key in _SECTIONS:
            del rest[key]  # an empty section means its defaults
    algorithm, name = None, None
    section = tree.get("algorithm")
    if not isinstance(section, dict):
        mistakes.append(f"algorithm: expected a mapping with a name, one of {', '.join(ALGORITHMS)}")
    else:
        name = section.get("name")
        if name not in ALGORITHMS:
            got = "none given" if name is None else f"got {name!r}{_near(str(name), ALGORITHMS)}"
            mistakes.append(f"algorithm.name: {got}; one of {', '.join(ALGORITHMS)}")
        else:
            fields = {key: value for key, value in section.items() if key != "name"}
            algorithm = _check(algorithm_settings(name), fields, "algorithm.", mistakes)
    if "algorithm_name" in rest:
        mistakes.append("algorithm_name: unknown key; did you mean algorithm.name?")
        del rest["algorithm_name"]
    recipe = _check(Recipe, rest, "", mistakes)
    if recipe is not None:
        _check_together(recipe, mistakes)
    if recipe is None or algorithm is None:
        return None
    _check_reward(recipe.reward, name, algorithm, mistakes)
    if hasattr(algorithm, "check_batch"):
        try:
            algorithm.check_batch(recipe.trainer.batch_size // recipe.trainer.micro_batches)
        except ValueError as error:
            mistakes.append(str(error))
    if recipe.prompts.pairs is not None and name != "dpo":
        mistakes.append(f"prompts.pairs: {name} does not read pairs, only dpo does; give prompts.file")
    if recipe.prompts.images is not None and name == "dpo":
        mistakes.append("prompts.images: dpo reads pairs of images; give prompts.pairs, or prompts.file to draw them")
    trained = trained_names(name)
    for key in sorted(set(recipe.trainer.lrs or ()) - set(trained)):
        mistakes.append(f"trainer.lrs.{key}: {name} trains {', '.join(trained)}{_near(key, trained, 'trainer.lrs.')}")
    return dataclasses.replace(recipe, algorithm=algorithm, algorithm_name=name)


def _check(kind: type, values: dict[str, Any], prefix: str, mistakes: list[str]) -> Any:
    checked = kind if hasattr(kind, "__pydantic_config__") else checked_dataclass(kind, frozen=True, config=_STRICT)
    try:
        made = TypeAdapter(checked).validate_python(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        unknown = [problem for problem in problems if problem["type"] == "unexpected_keyword_argument"]
        mistakes += [_sentence(kind, problem, prefix) for problem in unknown or problems]
        if not unknown:
            return None
        for problem in unknown:  # they hide what else is wrong
            values = _without(values, problem["loc"])
        return _check(kind, values, prefix, mistakes)
    except ValueError as error:
        mistakes.append(f"{prefix.rstrip('.') or 'recipe'}: {error}")
        return None
    return made if checked is kind else kind(**{f.name: getattr(made, f.name) for f in dataclasses.fields(kind)})


def _without(tree: dict[str, Any], where: Sequence[str | int]) -> dict[str, Any]:
    """A copy that lacks the key at the end of `where`."""
    head, *rest = where
    left = {key: value for key, value in tree.items() if key != head}
    return {**left, head: _without(tree[head], rest)} if rest else left


def _sentence(kind: type, problem: dict[str, Any], prefix: str) -> str:
    where = [str(part) for part in problem["loc"]]
    key = prefix + ".".join(where)
    if problem["type"] == "unexpected_keyword_argument":
        valid = [f.name for f in dataclasses.fields(_at(kind, where[:-1])) if f.name != "algorithm_name"]
        hint = (
            _near(where[-1], valid, prefix + "".join(f"{part}." for part in where[:-1]))
            or f"; valid keys: {', '.join(valid)}"
        )
        return f"{key}: unknown key{hint}"
    key = key.rstrip(".") or "recipe"
    if problem["type"] == "value_error":  # the settings' own check, which says what it got
        return f"{key}: {problem['msg'].removeprefix('Value error, ')}"
    got = repr(problem.get("input"))
    got = got if len(got) <= 60 else got[:57] + "..."
    message = problem["msg"]
    near = ""
    if problem["type"] == "literal_error" and isinstance(problem.get("input"), str):
        choices = problem["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        near = _near(problem["input"], choices)
    return f"{key}: {message[0].lower()}{message[1:]}, got {got}{near}"


def _at(kind: type, where: list[str]) -> type:
    for part in where:
        if kind is Recipe:
            kind = _SECTIONS.get(part, Recipe)
        else:  # a section inside a section: trainer.guard
            hint = get_type_hints(kind).get(part)
            kind = next((k for k in (hint, *get_args(hint)) if dataclasses.is_dataclass(k)), kind)
    return kind


def _near(word: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _check_together(recipe: Recipe, mistakes: list[str]) -> None:
    prompts, reward, model = recipe.prompts, recipe.reward, recipe.model
    reads = MODELS[model.name][2]
    for key in sorted({key for _, _, keys in MODELS.values() for key in keys} - set(reads)):
        if getattr(model, key, None) is not None:
            mistakes.append(f"model.{key}: {model.name} does not read it; its own keys: {', '.join(reads) or 'none'}")
    if model.name != "emoji" and model.folder is None:
        mistakes.append(f"model.folder: {model.name} needs a diffusers folder or a hub id")
    given = [key for key in ("file", "list", "images", "pairs") if getattr(prompts, key) is not None]
    if len(given) != 1:
        got = "none" if not given else " and ".join(f"prompts.{key}" for key in given)
        mistakes.append(
            f"prompts: give exactly one of prompts.file, prompts.list, prompts.images, prompts.pairs; got {got}"
        )
    if recipe.optimize is not None:
        _check_oracle(recipe, mistakes)
    elif (reward.name is None) == (not reward.weights):
        mistakes.append("reward: give reward.name, or reward.weights with at least one name and its weight")
    used = _used(reward)
    if recipe.evaluate.heldout is not None:
        if model.name == "emoji":
            mistakes.append("evaluate.heldout: the embedded model has a judge and a held-out reward of its own")
        if recipe.evaluate.heldout in used:
            mistakes.append(
                f"evaluate.heldout: {recipe.evaluate.heldout} is what is optimised; give another of "
                f"{', '.join(HELD_OUT)}"
            )
    for key in ("source", "scale", "noised"):
        asked = used | ({heldout_of(recipe)} if key == "source" else set())
        if idle := sorted(set(getattr(reward, key)) - asked):
            mistakes.append(f"reward.{key}.{idle[0]}: {idle[0]} is in neither reward.name nor reward.weights")
    for name, example in SERVICES.items():
        if name in used and name not in reward.source:
            mistakes.append(f"reward.source.{name}: give the server's URL, as {example}")


def heldout_of(recipe: Recipe) -> str | None:
    """The reward that judges the recipe's results and is not optimised; None where the recipe optimises them all."""
    if recipe.model.name == "emoji":
        return "emoji-heldout"
    used = _used(recipe.reward)
    return recipe.evaluate.heldout or next((name for name in HELD_OUT if name not in used), None)


def _used(reward: RewardSettings) -> set[str]:
    return {reward.name} if reward.name else set(reward.weights or ())


def _check_reward(reward: RewardSettings, algorithm: str, settings: Any, mistakes: list[str]) -> None:
    """Whether the algorithm can use it; what would otherwise show once the reward is first asked, or never."""
    used = _used(reward)
    names, key = ", ".join(sorted(used)), "reward.name" if reward.name else "reward.weights"
    idle = algorithm == "distar" and settings.reward_scale == 0
    if used and used <= set(WITHOUT_GRADIENT) and algorithm in CLIMBERS and not idle:
        alone = ", or algorithm.reward_scale=0" if algorithm == "distar" else ""
        mistakes.append(
            f"{key}: {algorithm} needs the reward's gradient, and {names} gives none; use a differentiable "
            f"reward, algorithm.name=ddpo, flow_grpo or nft, or an oracle and palate optimize{alone}"
        )
    if reward.relative is None:
        return
    if algorithm == "srpo":
        mistakes.append("reward.relative: srpo has words of its own; set algorithm.positive and algorithm.negative")
    if reward.relative.positive == reward.relative.negative:
        mistakes.append("reward.relative: give positive, negative, or both, and not the same word twice")
    if used and used <= set(WITHOUT_WORDS):
        mistakes.append(
            f"reward.relative: {names} reads no prompt, so no word changes it; use another reward, as "
            "emoji or hpsv2, or leave reward.relative out"
        )


def _check_oracle(recipe: Recipe, mistakes: list[str]) -> None:
    oracle = recipe.optimize.oracle
    given = [key for key in ("name", "function", "command", "url") if getattr(oracle, key) is not None]
    if len(given) != 1:
        got = "none" if not given else " and ".join(f"optimize.oracle.{key}" for key in given)
        mistakes.append(f"optimize.oracle: give exactly one of its keys name, function, command, url; got {got}")
    if oracle.noise and oracle.name is None:
        mistakes.append("optimize.oracle.noise: only a built-in oracle (optimize.oracle.name) takes noise")
    if recipe.reward.name or recipe.reward.weights or recipe.reward.relative:
        mistakes.append("reward: leave it out with optimize, where the surrogate of the oracle is the reward")
    if recipe.trainer.guard.every:
        mistakes.append(
            "trainer.guard.every: set 0 with optimize, where a guard would compare each round with its own "
            "start; evaluate the result with palate evaluate"
        )
    if recipe.prompts.images is not None:
        mistakes.append("prompts.images: optimize draws its own images; give prompts.file or prompts.list")


_SECTIONS = {
    "run": RunSettings,
    "model": ModelSettings,
    "reward": RewardSettings,
    "prompts": PromptSettings,
    "trainer": TrainerSettings,
    "sample": SampleSettings,
    "evaluate": EvaluateSettings,
    "optimize": OptimizeSettings,
}


# ---------------------------------------------------------------------------------------------------- building


def build(recipe: Recipe) -> Parts:
    """Load everything the recipe names. The cheap things that can be wrong come first, the weights last."""
    import torch

    captions, images = None, []
    if recipe.prompts.images is not None:
        found = captioned_images(Path(recipe.prompts.images))
        images, captions = [path for path, _ in found], [caption for _, caption in found]
    if recipe.prompts.pairs is not None:
        pairs = [pair for pair in preference_pairs(recipe.prompts.pairs) if pair.preference != 0.5]
        if not pairs:
            raise RecipeError(f"prompts.pairs: {recipe.prompts.pairs} holds no pair with a preference")
        captions = [pair.prompt for pair in pairs]
        both = ((p.first, p.second) if p.preference > 0.5 else (p.second, p.first) for p in pairs)
        images = [image for two in both for image in two]  # the preferred one first
    check_images(images)
    prompts, preview = prompts_of(recipe, captions)
    check_start(recipe)
    with torch.random.fork_rng(devices=[]):  # first, for its missing files; the LoRA's first weights do not see it
        reward = build_reward(recipe.reward)
    model = build_model(recipe)
    load_consistency(recipe, model)
    if hasattr(model, "cache_prompts"):
        model.cache_prompts([*prompts, *preview])
    latents = encode_images(model, images) if images else None
    if recipe.prompts.pairs is not None:
        latents = latents.unflatten(0, (-1, 2))  # (N, 2, C, h, w)
    return Parts(model, build_algorithm(recipe), reward, list(prompts), preview, latents)


def panel_of(recipe: Recipe) -> EvaluationPanel:
    """Who judges the recipe's results."""
    from palate.evaluate import embedded_panel, published_panel

    name = heldout_of(recipe)
    if recipe.model.name == "emoji":
        return embedded_panel()
    if name is None:
        raise InputError(
            f"reward.weights: {', '.join(HELD_OUT)} are all optimised, so none is left to judge; leave one out"
        )
    return published_panel(name, load_reward(name, recipe.reward.source.get(name), recipe.reward.dtype))


def guard_check(recipe: Recipe) -> Check | None:
    """What the guard of a run measures; None = what `palate.train` measures of the embedded model."""
    from palate.evaluate import measure_for_guard

    if recipe.model.name == "emoji" or not recipe.trainer.guard.every:
        return None
    panel, sampler = panel_of(recipe), getattr(build_algorithm(recipe), "sampler", None)
    return lambda model, prompts, ids: measure_for_guard(
        model, prompts, ids, seed=recipe.trainer.seed, panel=panel, sampler=sampler
    )


def prompts_of(recipe: Recipe, captions: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """What is trained on, the captions of images if there are any, and what previews draw.

    evaluate.file is read too, so that a missing one does not show after the training.
    """
    if recipe.evaluate.file is not None:
        try:
            read_prompts(recipe.evaluate.file)
        except RecipeError as error:
            raise RecipeError(f"evaluate.file: {error}") from error
    prompts = captions or recipe.prompts.list or read_prompts(recipe.prompts.file)
    return list(prompts), read_prompts(recipe.prompts.preview) if recipe.prompts.preview else spread(prompts)


def build_model(recipe: Recipe) -> Model:
    """The model, with the named weights that the recipe's algorithm trains."""
    from safetensors import SafetensorError

    settings = recipe.model
    module, kind, keys = MODELS[settings.name]
    options = {key: getattr(settings, key) for key in keys if getattr(settings, key, None) is not None}
    model = getattr(importlib.import_module(module), kind).load(
        settings.folder,
        training=settings.weights,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_targets=settings.lora_targets,
        names=trained_names(recipe.algorithm_name),
        **options,
    )
    if settings.start is not None:
        if settings.weights == "lora":
            model.weights.begin(_start_folder(settings.start), rank=settings.lora_rank, alpha=settings.lora_alpha)
            return model
        try:
            model.weights.load(_start_folder(settings.start), "policy")
        except (ValueError, SafetensorError) as error:
            raise InputError(f"model.start: {error}") from error
    return model


def _start_folder(start: str) -> Path | str:
    """A folder, or the name of one in the package."""
    packaged = importlib.resources.files("palate") / "assets" / start
    return start if Path(start).is_dir() or not packaged.is_dir() else Path(str(packaged))


def check_start(recipe: Recipe) -> None:
    """model.start, and the LoRAs that the recipe names against the architecture of its folder, before weights load."""
    settings, module = recipe.model, importlib.import_module(MODELS[recipe.model.name][0])
    if settings.start is not None and settings.weights == "full":
        from palate.models.weights import adapter_file

        try:
            adapter_file(_start_folder(settings.start), settings.weights)
        except ValueError as error:
            raise RecipeError(f"model.start: {error}") from error
    if settings.start is not None and settings.weights == "lora":
        from palate.models.lora import find_file

        find_file(_start_folder(settings.start), "model.start")
    parts = getattr(module, "PARTS", None)
    consistency = getattr(recipe.algorithm, "estimator", None) == "consistency"
    if parts is None:
        return
    if consistency and settings.consistency is None:
        raise RecipeError(
            "model.consistency: name the folder of an LCM-LoRA (pytorch_lora_weights.safetensors) "
            f"for {settings.name}, or use another algorithm.estimator: tweedie, rollout-2"
        )
    started = settings.start is not None and settings.weights == "lora"
    if started or consistency:
        from palate.models.repository import open_repository

        denoiser = "unet" if "unet" in parts else "transformer"
        repository = open_repository(settings.folder, family=settings.name, parts={denoiser: parts[denoiser]})
        if started:
            repository.check_lora(
                module.FACTS, _start_folder(settings.start), key="model.start", rank=settings.lora_rank
            )
        if consistency:
            repository.check_lora(module.FACTS, settings.consistency, key="model.consistency")


def trained_names(algorithm: str) -> tuple[str, ...]:
    """The named weights that an algorithm trains."""
    module, kind, _ = ALGORITHMS[algorithm]
    return getattr(importlib.import_module(module), kind).trains


def load_consistency(recipe: Recipe, model: Model) -> None:
    """Give the model its consistency weights, if the algorithm asks for them."""
    if getattr(recipe.algorithm, "estimator", None) == "consistency":
        folder = recipe.model.consistency
        if hasattr(model, "load_consistency"):
            model.load_consistency(folder)
        else:
            model.weights.add_frozen(folder, "consistency")


def build_algorithm(recipe: Recipe) -> Algorithm:
    module, algorithm, _ = ALGORITHMS[recipe.algorithm_name]
    return getattr(importlib.import_module(module), algorithm)(recipe.algorithm)


def build_reward(settings: RewardSettings) -> Reward:
    from palate.rewards.combine import noised_relative, normalised, semantic_relative, weighted

    def part(name: str) -> Reward:
        reward = load_reward(name, settings.source.get(name), settings.dtype)
        if name in settings.noised:
            reward = noised_relative(reward, settings.noised[name])
        return normalised(reward, *settings.scale[name]) if name in settings.scale else reward

    if settings.name is not None:
        reward = part(settings.name)
    else:
        reward = weighted({name: (weight, part(name)) for name, weight in settings.weights.items()})
    if settings.relative is None:
        return reward
    return semantic_relative(reward, settings.relative.positive, settings.relative.negative, settings.relative.k)


def load_reward(name: str, source: str | None = None, dtype: str | None = None) -> Reward:
    """A reward by name; `source` and `dtype` are of published ones."""
    if name in PUBLISHED_REWARDS:
        import torch

        module, function = PUBLISHED_REWARDS[name]
        options = {} if dtype is None or name in SERVICES else {"dtype": getattr(torch, dtype)}
        return getattr(importlib.import_module(module), function)(source, **options)
    if name in SIMPLE_REWARDS:
        from palate.rewards import simple

        return getattr(simple, name)
    from palate.rewards import emoji

    return emoji.load_reward(name)
