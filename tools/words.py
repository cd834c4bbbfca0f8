"""The tokenizer of everything that reads captions here: one token per known word."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from palate.models.vocabulary import known_words, vocabulary

LENGTH = vocabulary().max_words + 2  # with a start and an end token
SPECIAL = ["<pad>", "<start>", "<unk>", "<end>"]  # id 2 as end means another thing to CLIP


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Ids in the order of the vocabulary's words, after the special ones."""
    words = [*SPECIAL, *vocabulary().words]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> Tensor:
    """(B, LENGTH) ids of prompts in any known words."""
    lines = [" ".join(known_words(prompt)) for prompt in prompts]
    return tokenizer(lines, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
