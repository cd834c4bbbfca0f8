"""What can be wrong with a repository, said in a sentence before any weight loads; the same for every family."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from palate.models import families
from palate.models.facts import facts_of
from palate.runtime.errors import InputError
from palate.runtime.hub import UNREACHED

# a part's weights: whole or in shards, plain or as the variant fp16
WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model)(?P<first>\.fp16)?(-\d+-of-(?P<shards>\d+))?(?P<last>\.fp16)?\.safetensors"
)
# ends of the names of tensors that come with quantised weights: ComfyUI's scaled fp8 and later forms, bitsandbytes,
# SVDQuant, GPTQ. Weights read without them would be other numbers
TEXT_PARTS = ("conditioner.embedders.", "cond_stage_model.", "text_encoders.")  # of whole checkpoints
QUANTISED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale|weight_scale_2|comfy_quant|weight\.absmax|weight\.quant_map|"
    r"weight\.quant_state\.\w+|SCB|qweight|wscales)$"
)
READERS = ("tokenizer", "processor")  # parts without weights that turn prompts into tokens
READING_ERRORS = (
    *UNREACHED,
    SafetensorError,
    SingleFileComponentError,
    RuntimeError,
    LookupError,
    AttributeError,
    TypeError,
)
OTHER_NOISE = re.compile(r"EDM|SCM|CMStochastic")  # begins the names of schedulers: Playground v2.5's, SANA-Sprint's
OTHER_TASKS = re.compile(r"Inpaint|Img2Img|Edit|Pix2Pix|ControlNet|Upscale|Fill|Layered|KleinKV")  # in pipelines' names


def family_with(network: str | None) -> str | None:
    """The families whose denoiser is of that class, for a message; None if there is none."""
    found = []
    for name in families.names() if network else ():
        try:
            facts = facts_of(name)
        except InputError:  # of an installed package that is broken
            continue
        if name != "emoji" and facts.parts.get(facts.denoiser) == network:
            found.append(name)
    return " or ".join(found) or None


def check_task(source: str, pipeline: str, family: str) -> None:
    """InputError if the folder's pipeline edits, inpaints or conditions on images instead of drawing."""
    if OTHER_TASKS.search(pipeline):
        raise InputError(
            f"model.folder {source} holds a {pipeline}, which changes given images (inpainting, editing, refining); "
            f"give a text-to-image repository of {family}"
        )


def check_quantised(source: str, part: str, config: Mapping[str, Any]) -> None:
    """InputError if a part's weights are stored quantised, so that they cannot be trained or adapted."""
    if found := config.get("quantization_config"):
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise InputError(
            f"model.folder {source}: its {part} is stored quantised ({method}), which cannot be trained through here; "
            "give the unquantised repository and set model.quantize"
        )


@cache
def _say_left_out(file: Path) -> None:
    """Once for a file, which is looked at more than once."""
    logging.getLogger("palate").warning(
        "model.file %s: its text encoders are not read; those of the base model are, and other programs that load the "
        "file draw otherwise if they were trained. Give the whole model as model.folder to train with them",
        file,
    )


def check_file(file: Path) -> None:
    """InputError unless `file` is a .safetensors file that exists."""
    if not file.is_file():
        raise InputError(f"model.file {file} does not exist; give a .safetensors file with the denoiser's weights")
    if file.suffix != ".safetensors":
        raise InputError(
            f"model.file {file}: expected a .safetensors file with the denoiser's weights; .ckpt and .gguf are not read"
        )
    check_header(file)
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    found = next((name for name in names if QUANTISED.search(name)), None)
    if any(name.startswith(TEXT_PARTS) for name in names):
        _say_left_out(file)
    if found is not None:
        raise InputError(
            f"model.file {file}: its weights are stored quantised (it holds {found}), which is not read; give the file "
            "in float32, float16, bfloat16 or plain fp8, and set model.quantize"
        )


def check_weights(source: str, files: list[str], parts: Iterable[str]) -> None:
    """InputError unless each part has its weights, as .safetensors, among `files`."""
    for part in parts:
        found = [name for name in files if name.startswith(f"{part}/")]
        every = [match for name in found if (match := WEIGHTS.fullmatch(name.rpartition("/")[2]))]
        whole = [match for match in every if not (match["first"] or match["last"])] or every  # fp16 if nothing else
        if whole:
            shards = int(whole[0]["shards"] or 1)  # of diffusion_pytorch_model-00001-of-00003.safetensors
            if len(whole) < shards and not any(match["shards"] is None for match in whole):
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
        variants = " (of variants only fp16 is read)" if any(name.endswith(".safetensors") for name in found) else ""
        raise InputError(
            f"model.folder {source}: {part} holds no .safetensors weights{variants}; complete the download"
        )


def check_header(file: Path) -> None:
    """A .safetensors file says in its first bytes how long it is; ValueError if it is cut short or something else."""
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is damaged or incomplete ({str(error)[:100]}); download it again") from error
