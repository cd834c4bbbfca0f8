"""What a recipe reads from disk: prompts, captioned images, preference pairs. Local files only.

Prompts come from .txt (one per line), .jsonl, .json, .csv, .tsv or .parquet. The public sets are read as published:

    HPDv2 benchmark   anime.json, photo.json, ...        a list of prompts
    HPDv2 pairs       train.json, pictures in train/     prompt, file_path [a, b], human_preference [1, 0]
    PartiPrompts      PartiPrompts.tsv                   Prompt, Category, Challenge
    DrawBench         .csv or .parquet                   Prompts, Category
    GenEval           evaluation_metadata.jsonl          prompt, tag, include, exclude
    Pick-a-Pic        .parquet                           caption, jpg_0, jpg_1, label_0, label_1, has_label

Single likes, which nobody publishes alike, are rows of prompt, image, like (true or false).
"""

from __future__ import annotations

from palate.data.pairs import Like, Pair, preference_pairs, single_likes
from palate.data.pictures import (
    IMAGE_ENDINGS,
    captioned_images,
    check_images,
    encode_images,
    load_images,
)
from palate.data.prompts import evenly_spaced, geneval, listed, prompt_rows, prompts_at, read_prompts
from palate.data.tables import RecipeError, read_rows, read_text
from palate.runtime.deprecated import old_names

__all__ = [
    "IMAGE_ENDINGS", "Like", "Pair", "RecipeError", "captioned_images", "check_images", "encode_images",
    "evenly_spaced", "geneval", "listed", "load_images", "preference_pairs", "prompt_rows", "prompts_at",
    "read_prompts", "read_rows", "read_text", "single_likes",
]  # fmt: skip

__getattr__ = old_names(__name__, {"spread": evenly_spaced})
