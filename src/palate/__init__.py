"""Palate aligns text-to-image diffusion and flow models with a preference.

`palate.train(...)` trains, `palate.load(run).sample(prompts)` draws, `palate.evaluate(run)` measures and
`palate.report(run)` writes the page; models, algorithms and rewards are listed in `palate.__all__`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from palate.algorithms.ddpo import DDPO as DDPO
    from palate.algorithms.ddpo import DDPOSettings as DDPOSettings
    from palate.algorithms.dgpo import DGPO as DGPO
    from palate.algorithms.dgpo import DGPOSettings as DGPOSettings
    from palate.algorithms.direct import Direct as Direct
    from palate.algorithms.direct import DirectSettings as DirectSettings
    from palate.algorithms.distar import Distar as Distar
    from palate.algorithms.distar import DistarSettings as DistarSettings
    from palate.algorithms.dpo import DPO as DPO
    from palate.algorithms.dpo import DPOSettings as DPOSettings
    from palate.algorithms.draft import DRaFT as DRaFT
    from palate.algorithms.draft import DRaFTSettings as DRaFTSettings
    from palate.algorithms.flow_grpo import FlowGRPO as FlowGRPO
    from palate.algorithms.flow_grpo import FlowGRPOSettings as FlowGRPOSettings
    from palate.algorithms.leap_align import LeapAlign as LeapAlign
    from palate.algorithms.leap_align import LeapAlignSettings as LeapAlignSettings
    from palate.algorithms.nft import NFT as NFT
    from palate.algorithms.nft import NFTSettings as NFTSettings
    from palate.algorithms.opd import OPD as OPD
    from palate.algorithms.opd import OPDSettings as OPDSettings
    from palate.algorithms.refl import ReFL as ReFL
    from palate.algorithms.refl import ReFLSettings as ReFLSettings
    from palate.algorithms.sqdf import SQDF as SQDF
    from palate.algorithms.sqdf import SQDFSettings as SQDFSettings
    from palate.algorithms.srpo import SRPO as SRPO
    from palate.algorithms.srpo import SRPOSettings as SRPOSettings
    from palate.api import Images as Images
    from palate.api import LoadedRun as LoadedRun
    from palate.api import evaluate as evaluate
    from palate.api import load as load
    from palate.api import report as report
    from palate.core import Algorithm as Algorithm
    from palate.core import Batch as Batch
    from palate.core import Loss as Loss
    from palate.core import Model as Model
    from palate.core import Random as Random
    from palate.core import Reward as Reward
    from palate.evaluate import generate as generate
    from palate.models.aura_flow import AuraFlow as AuraFlow
    from palate.models.chroma import Chroma as Chroma
    from palate.models.emoji import EmojiModel as EmojiModel
    from palate.models.flux import Flux as Flux
    from palate.models.flux2 import Flux2 as Flux2
    from palate.models.gaussian import GaussianModel as GaussianModel
    from palate.models.krea2 import Krea2 as Krea2
    from palate.models.pixart import PixArt as PixArt
    from palate.models.qwen_image import QwenImage as QwenImage
    from palate.models.qwen_image_21 import QwenImage21 as QwenImage21
    from palate.models.sana import Sana as Sana
    from palate.models.sd3 import StableDiffusion3 as StableDiffusion3
    from palate.models.sdxl import StableDiffusionXL as StableDiffusionXL
    from palate.models.stable_diffusion import StableDiffusion as StableDiffusion
    from palate.models.z_image import ZImage as ZImage
    from palate.path import Prediction as Prediction
    from palate.recipe import GuardSettings as GuardSettings
    from palate.recipe import SampleSettings as SampleSettings
    from palate.recipe import TrainerSettings as TrainerSettings
    from palate.rewards.combine import semantic_relative as semantic_relative
    from palate.rewards.combine import weighted as weighted
    from palate.rewards.load import load_reward as load_reward
    from palate.sampling import sample as sample
    from palate.taste.taste import Taste as Taste
    from palate.taste.taste import fit_taste as fit_taste
    from palate.train import Outcome as Outcome
    from palate.train import steer as steer
    from palate.train.start import train as train

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
