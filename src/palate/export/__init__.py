"""What was trained, in the forms that other programs load: a LoRA, a merged network, a one-step pipeline."""

from __future__ import annotations

from palate.export.card import model_card
from palate.export.lora import export_lora, export_merged, lora_file, read_adapter
from palate.export.names import FORMATS, to_comfyui, to_diffusers, to_kohya
from palate.export.one_step import export_one_step, load_one_step, one_step_folder
from palate.models.lora import FILE
from palate.models.original import Lora

WEIGHTS = FILE

__all__ = [
    "FORMATS",
    "WEIGHTS",
    "Lora",
    "export_lora",
    "export_merged",
    "export_one_step",
    "load_one_step",
    "lora_file",
    "model_card",
    "one_step_folder",
    "read_adapter",
    "to_comfyui",
    "to_diffusers",
    "to_kohya",
]
