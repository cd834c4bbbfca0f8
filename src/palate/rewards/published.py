"""Where the weights of published rewards are, how large they are, under which licence: the facts of `palate fetch`.

Sizes are those of the files as published, in units of 1e9 bytes, rounded; licences as their authors state them.
"""

from __future__ import annotations

from typing import NamedTuple


class Download(NamedTuple):
    """A file or a set of files: `place` is a hub id, or an https address for a single file."""

    place: str
    files: tuple[str, ...]
    gigabytes: float


class PublishedReward(NamedTuple):
    """`weights` first; a pickle among them is converted to `converted`, which reward.source then names. `extra`: the
    towers and tokenizers beside it."""

    weights: Download
    licence: str
    converted: str | None = None
    extra: tuple[Download, ...] = ()
    note: str = ""

    @property
    def gigabytes(self) -> float:
        """Of everything that it needs."""
        return self.weights.gigabytes + sum(extra.gigabytes for extra in self.extra)


CLIP = "openai/clip-vit-large-patch14"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
CLIP_TOKENIZER = Download(CLIP, TOKENIZER, 0.004)
CLIP_MODEL = Download(CLIP, ("config.json", "model.safetensors", *TOKENIZER), 1.71)

PUBLISHED: dict[str, PublishedReward] = {
    "clip-score": PublishedReward(CLIP_MODEL, "MIT"),
    "pickscore": PublishedReward(
        Download("yuvalkirstain/PickScore_v1", ("config.json", "model.safetensors", *TOKENIZER), 3.94), "MIT"
    ),
    "hpsv2": PublishedReward(
        Download("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), 1.97),
        "Apache-2.0",
        "HPS_v2.1_compressed.safetensors",
        (CLIP_TOKENIZER,),
    ),
    "image-reward": PublishedReward(
        Download("zai-org/ImageReward", ("ImageReward.pt",), 1.79),
        "Apache-2.0",
        "ImageReward.safetensors",
        (Download("google-bert/bert-base-uncased", ("config.json", "vocab.txt", "tokenizer.json"), 0.001),),
    ),
    "aesthetic": PublishedReward(
        Download(
            "https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/main/"
            "sac+logos+ava1-l14-linearMSE.pth",
            ("sac+logos+ava1-l14-linearMSE.pth",),
            0.004,
        ),
        "MIT",
        "sac+logos+ava1-l14-linearMSE.safetensors",
        (CLIP_MODEL,),
    ),
    "hpsv3": PublishedReward(
        Download("MizzenAI/HPSv3", ("HPSv3.safetensors",), 16.6),
        "MIT; tower Apache-2.0",
        None,
        (Download("Qwen/Qwen2-VL-7B-Instruct", ("config.json", *TOKENIZER), 0.012),),
        "prompt.txt, the chat text of the authors' repository, goes beside it (docs/rewards.md)",
    ),
}
