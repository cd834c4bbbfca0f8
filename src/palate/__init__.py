"""Palate aligns text-to-image diffusion and flow models with a preference.

`palate.train(...)` trains, `palate.load(run).sample(prompts)` draws, `palate.evaluate(run)` measures and
`palate.report(run)` writes the page; models, algorithms and rewards are listed in `palate.__all__`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from palate import evaluate as evaluate
    from palate import report as report
    from palate import train as train
    from palate.algorithms.ddpo import DDPO, DDPOSettings
    from palate.algorithms.dgpo import DGPO, DGPOSettings
    from palate.algorithms.direct import Direct, DirectSettings
    from palate.algorithms.distar import Distar, DistarSettings
    from palate.algorithms.dpo import DPO, DPOSettings
    from palate.algorithms.draft import DRaFT, DRaFTSettings
    from palate.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
    from palate.algorithms.leap_align import LeapAlign, LeapAlignSettings
    from palate.algorithms.nft import NFT, NFTSettings
    from palate.algorithms.opd import OPD, OPDSettings
    from palate.algorithms.refl import ReFL, ReFLSettings
    from palate.algorithms.sqdf import SQDF, SQDFSettings
    from palate.algorithms.srpo import SRPO, SRPOSettings
    from palate.api import Images, LoadedRun, load
    from palate.core import Algorithm, Batch, Loss, Model, Random, Reward
    from palate.evaluate import generate
    from palate.models.aura_flow import AuraFlow
    from palate.models.chroma import Chroma
    from palate.models.emoji import EmojiModel
    from palate.models.flux import Flux
    from palate.models.flux2 import Flux2
    from palate.models.gaussian import GaussianModel
    from palate.models.krea2 import Krea2
    from palate.models.pixart import PixArt
    from palate.models.qwen_image import QwenImage
    from palate.models.qwen_image_21 import QwenImage21
    from palate.models.sana import Sana
    from palate.models.sd3 import StableDiffusion3
    from palate.models.sdxl import StableDiffusionXL
    from palate.models.stable_diffusion import StableDiffusion
    from palate.models.z_image import ZImage
    from palate.path import Prediction
    from palate.recipe import GuardSettings, SampleSettings, TrainerSettings
    from palate.rewards.combine import semantic_relative, weighted
    from palate.rewards.load import load_reward
    from palate.sampling import sample
    from palate.taste.taste import Taste, fit_taste
    from palate.train import Outcome, steer

# Looked up on first use, because `import palate` and `palate --help` must not wait for torch.
_NAMES = {
    "palate.algorithms.ddpo": ("DDPO", "DDPOSettings"),
    "palate.algorithms.dgpo": ("DGPO", "DGPOSettings"),
    "palate.algorithms.direct": ("Direct", "DirectSettings"),
    "palate.algorithms.distar": ("Distar", "DistarSettings"),
    "palate.algorithms.dpo": ("DPO", "DPOSettings"),
    "palate.algorithms.draft": ("DRaFT", "DRaFTSettings"),
    "palate.algorithms.flow_grpo": ("FlowGRPO", "FlowGRPOSettings"),
    "palate.algorithms.leap_align": ("LeapAlign", "LeapAlignSettings"),
    "palate.algorithms.nft": ("NFT", "NFTSettings"),
    "palate.algorithms.opd": ("OPD", "OPDSettings"),
    "palate.algorithms.refl": ("ReFL", "ReFLSettings"),
    "palate.algorithms.sqdf": ("SQDF", "SQDFSettings"),
    "palate.algorithms.srpo": ("SRPO", "SRPOSettings"),
    "palate.api": ("Images", "LoadedRun", "load"),
    "palate.core": ("Algorithm", "Batch", "Loss", "Model", "Random", "Reward"),
    "palate.evaluate": ("generate",),
    "palate.models.aura_flow": ("AuraFlow",),
    "palate.models.chroma": ("Chroma",),
    "palate.models.emoji": ("EmojiModel",),
    "palate.models.flux": ("Flux",),
    "palate.models.flux2": ("Flux2",),
    "palate.models.gaussian": ("GaussianModel",),
    "palate.models.krea2": ("Krea2",),
    "palate.models.pixart": ("PixArt",),
    "palate.models.qwen_image": ("QwenImage",),
    "palate.models.qwen_image_21": ("QwenImage21",),
    "palate.models.sana": ("Sana",),
    "palate.models.sd3": ("StableDiffusion3",),
    "palate.models.sdxl": ("StableDiffusionXL",),
    "palate.models.stable_diffusion": ("StableDiffusion",),
    "palate.models.z_image": ("ZImage",),
    "palate.path": ("Prediction",),
    "palate.recipe": ("GuardSettings", "SampleSettings", "TrainerSettings"),
    "palate.rewards.combine": ("semantic_relative", "weighted"),
    "palate.rewards.load": ("load_reward",),
    "palate.sampling": ("sample",),
    "palate.taste.taste": ("Taste", "fit_taste"),
    "palate.train": ("Outcome", "steer"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_CALLABLE = ("evaluate", "report", "train")  # packages that are also functions: palate.train(...), palate.report(run)
__all__ = [*_HOME, *_CALLABLE, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f"palate.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'palate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
