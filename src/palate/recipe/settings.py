"""The sections of a recipe as typed dataclasses, with their defaults and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import ConfigDict, Field, PlainValidator

from palate.recipe.guard import Count, GuardSettings, NonNegative, Positive
from palate.recipe.names import ModelName, RewardName, SourceName
from palate.runtime.errors import InputError

# of trainer: these may change when a run is resumed
RESUMABLE_FIELDS = (
    "steps", "checkpoint_every", "keep_checkpoints", "preview_every", "preview_prompts", "threads", "micro_batches",
    "sharding", "reduce_gradients", "tracker",
)  # fmt: skip
_STRICT = ConfigDict(extra="forbid")


def _image_size(value: Any) -> int | tuple[int, int]:
    given = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if any(type(side) is not int or side < 1 for side in given):
        raise InputError(f"expected the pixels of a side, or [height, width], got {value!r}")
    return tuple(given) if len(given) == 2 else value


PromptList = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
HeldOutName = Literal["clip-score", "pickscore", "hpsv2"]  # rewards.table.HELD_OUT_CANDIDATES
OracleName = Literal["jpeg-size", "hidden-judge", "colour-position"]  # rewards.oracles.BUILT_IN


ImageSize = Annotated[Any, PlainValidator(_image_size)]
ImageSizes = Annotated[list[ImageSize], Field(min_length=1)]


@dataclass(frozen=True)
class RunSettings:
    """Where the run is written."""

    __pydantic_config__ = _STRICT
    folder: Annotated[str, Field(min_length=1)] = "runs/unnamed"
    check_memory: bool = True  # refuse to start where `palate plan`'s sum for a step is more than the device has
    rank_timeout_seconds: Positive = 600  # of several ranks: how long one waits for another that is alive but silent


@dataclass(frozen=True)
class RelativeSettings:
    """(1 + k) R(x, "positive. prompt") - R(x, "negative. prompt") in place of R; an empty word leaves the prompt."""

    __pydantic_config__ = _STRICT
    positive: str = ""
    negative: str = ""
    k: Finite = 0.0


@dataclass(frozen=True)
class TasteSettings:
    """How the reward "taste" is made of a saved taste (docs/taste.md)."""

    __pydantic_config__ = _STRICT
    absolute: Finite | None = None  # weight of the reward that the taste stands on; 4
    confidence: NonNegative = 0.0  # posterior standard deviations below the mean; 0 = the mean
    allow_unlearnt: bool = False  # train although held-out votes are not predicted better than by chance


@dataclass(frozen=True)
class ModelSettings:
    """Keys that are None have the family's own default; a family reads those that its `load` takes (docs/models.md)."""

    __pydantic_config__ = _STRICT
    name: ModelName = "emoji"
    weights: Literal["lora", "full"] = "lora"
    lora_rank: Positive = 16
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # None = lora_rank
    lora_targets: Annotated[list[str], Field(min_length=1)] | None = None  # ends of layer names; None = the family's
    lora_init: Literal["zero", "gaussian"] = "zero"  # of the LoRA's first factor; gaussian: N(0, 1/rank^2)
    start: str | None = None  # an earlier run's adapter folder, whose policy this one begins with; or emoji-1step
    reference: Literal["base", "start"] | None = None  # what the policy is held to: base (None), or the LoRA of start
    folder: str | None = None  # a diffusers folder or hub id; None = the weights in the package (emoji)
    consistency: str | None = None  # folder of a consistency LoRA (LCM-LoRA); None = the one in the package (emoji)
    file: str | None = None  # a .safetensors file whose denoiser takes the place of the folder's
    quantize: Literal["nf4", "int8", "fp8"] | None = None  # how frozen weights are stored; None = in dtype
    attention: str | None = None  # diffusers' name of the attention kernels (native, flash, sage); None = torch's own
    compile: bool | None = None  # the denoiser's blocks, each alone; off
    offload: bool | None = None  # the denoiser's frozen blocks wait in the host's memory; off
    training_adapter: str | None = (
        None  # a frozen LoRA of a distilled model: there while training, absent when sampling
    )
    dtype: Literal["float32", "bfloat16"] | None = None  # of frozen weights and of computation; bfloat16
    device: str | None = None  # cpu, cuda, cuda:N; None = the accelerator if there is one
    gradient_checkpointing: bool | None = None  # of denoiser and VAE decoder; on
    image_size: ImageSize | None = None  # pixels of a side, or [height, width]; None = as the model was trained
    text_tokens: Positive | None = None  # of the long text encoder; None = as the model was trained
    text_cache: str | None = None  # folder of text embeddings; None = palate/text in the user's cache folder
    distilled_guidance: NonNegative | None = None  # the guidance that FLUX.1-dev (3.5) and FLUX.2-dev (4) are given
    rollout_distilled_guidance: NonNegative | None = None  # FLUX.1-dev: and in calls without gradient; None = the same


@dataclass(frozen=True)
class RewardSettings:
    """One reward by name, or a weighted sum of several. docs/rewards.md lists them."""

    __pydantic_config__ = _STRICT
    name: RewardName | None = None
    weights: dict[RewardName, Finite] | None = None
    source: dict[SourceName, Annotated[str, Field(min_length=1)]] = field(default_factory=dict)
    # ^ of published weights: a file, a folder, a hub id; of "remote": a URL
    dtype: Literal["float32", "bfloat16"] | None = None  # of published rewards; None = bfloat16 for hpsv3, else float32
    scale: dict[RewardName, tuple[Finite, Annotated[float, Field(gt=0, allow_inf_nan=False)]]] = field(
        default_factory=dict
    )
    # ^ (mean, std) on images you trust: (R - mean) / std is what is weighed
    noised: dict[RewardName, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = field(default_factory=dict)
    # ^ std of the noised image that serves as the negative of a reward that reads no prompt
    relative: RelativeSettings | None = None  # of the whole reward; not of srpo, which has words of its own
    taste: TasteSettings | None = None  # of the reward "taste"


@dataclass(frozen=True)
class PromptSettings:
    """Where prompts come from: a file (a path, or a name in the package), a list, captioned images, pairs, likes."""

    __pydantic_config__ = _STRICT
    file: str | None = None
    list: PromptList | None = None
    images: str | None = None  # a folder of captioned images: offline training on them
    pairs: str | None = None  # preference pairs for dpo: HPDv2's train.json or Pick-a-Pic's .parquet, ties left out
    likes: str | None = None  # for dpo with loss = kto: rows {"prompt", "image", "like": true or false}
    preview: str | None = None  # a file as above; None = some of the training prompts, evenly spaced
    # to train on, each a side or [height, width]: every step draws one of them; None = model.image_size
    sizes: ImageSizes | None = None


@dataclass(frozen=True)
class TrainerSettings:
    """The loop: its length, optimizer, checkpoints, previews and guard."""

    __pydantic_config__ = _STRICT
    steps: Positive = 40
    batch_size: Positive = 16
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    lrs: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None  # of single names, as assistant
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # 8bit: its moments in a byte each (bitsandbytes)
    weight_decay: NonNegative = 1e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip_norm: NonNegative = 1.0  # 0 = off
    warmup: Count = 0  # steps over which the learning rate rises to lr
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0  # 0 = off; else previews and the result use the average
    ema_every: Positive = 1  # steps between two moves of that average
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    checkpoint_every: Count = 20  # 0 = only at the end
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # beside the guard's best
    preview_every: Count = 0  # 0 = never; otherwise before, every so many steps, and after
    preview_prompts: Positive = 16
    threads: Count = 0  # 0 = torch's own choice
    # parts that a rank's share of the batch goes through in, one after the other: less memory
    micro_batches: Positive = 1
    # weights = full on several ranks: FSDP2; hybrid = inside a machine
    sharding: Literal["none", "full", "hybrid"] = "none"
    # of cut networks: over the ranks once an update, bit for bit as one rank would; or after each loss, so that no rank
    # ever holds the whole gradient
    reduce_gradients: Literal["update", "loss"] = "update"
    # where the log is sent as well: metrics, previews, the guard's verdicts
    tracker: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    guard: GuardSettings = field(default_factory=GuardSettings)


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn to be looked at: previews, samples, evaluations. None = the model's own default."""

    __pydantic_config__ = _STRICT
    steps: Positive | None = None
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    image_size: ImageSize | None = None  # and of what the guard sees; None = model.image_size


@dataclass(frozen=True)
class EvaluateSettings:
    """What `palate evaluate` draws, and the reward that judges it."""

    __pydantic_config__ = _STRICT
    file: str | None = None  # as prompts.file; None = prompts.preview, else the training prompts
    prompts: Positive = 64
    seeds: Annotated[int, Field(ge=1, le=4096)] = 4
    heldout: HeldOutName | None = None  # judges models other than emoji; None = the first that is not optimised


@dataclass(frozen=True)
class OracleSettings:
    """The black-box objective: give exactly one of name, function, command, url, checklist."""

    __pydantic_config__ = _STRICT
    name: OracleName | None = None  # built in
    function: str | None = None  # module:function, (images, prompts) -> numbers; its code runs
    command: Annotated[list[str], Field(min_length=1)] | None = None  # program and arguments, no shell
    url: Annotated[str, Field(pattern="^https?://")] | None = None
    checklist: str | None = None  # "FILE URL#MODEL": questions about each picture and the judge that answers them
    noise: NonNegative = 0.0  # standard deviation, added to a built-in oracle's answer
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0  # seconds per batch
    retries: Count = 2  # of the same images; each counts as a query
    batch: Positive = 16  # images per call


@dataclass(frozen=True)
class OptimizeSettings:
    """`palate optimize`: queries of a black-box objective, and the surrogate that is maximised in its place."""

    __pydantic_config__ = _STRICT
    oracle: OracleSettings = field(default_factory=OracleSettings)
    budget: Positive = 2000  # queries in all, failed ones included
    rounds: Positive = 4  # each with twice the queries of the one before, then makes trainer.steps updates
    surrogate: Literal["bootstrap", "ucb"] = "bootstrap"
    heads: Positive = 4  # of the bootstrap; the surrogate is the largest
    exploration: NonNegative = 1.0  # of ucb: standard deviations of its posterior
    features: Literal["emoji", "clip-score", "pickscore", "hpsv2"] = "emoji"  # whose image tower the heads stand on
    features_source: str | None = None  # of a published one, as reward.source


@runtime_checkable
class AlgorithmSettings(Protocol):
    """The settings of one algorithm, a dataclass of its own, with the name by which the recipe chose it."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class NoAlgorithm:
    """Stands where a recipe names no algorithm that is known, until every mistake is reported."""

    name: str = ""


@dataclass(frozen=True)
class Recipe:
    """One run, whole: every section with its defaults filled in."""

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    algorithm: AlgorithmSettings = field(default_factory=NoAlgorithm)  # the algorithm's own, SRPOSettings for one
    reward: RewardSettings = field(default_factory=RewardSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    optimize: OptimizeSettings | None = None  # of `palate optimize` only
