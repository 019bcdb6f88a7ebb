"""Small tokenizers of the kinds that real models have, built on the fly."""

import functools
import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CORPUS = [
    "The capital of France is Paris. What is the capital of France? You are a helpful assistant.",
    "Once upon a time there was a small house near the river, and an old man lived in the house.",
    "system user assistant tool developer 1 2 3 4 5 6 7 8 9 10 <think> </think>",
    "Grüße aus Köln, naïve café, 日本語の文章, 한국어, 🙂👍🏽",
]


@functools.cache
def byte_level(special: tuple[str, ...] = CHATML, plain: tuple[str, ...] = ()) -> str:
    """tokenizer.json of a byte-level BPE, as in GPT-2, Llama 3 and Qwen.

    `special` are control tokens; `plain` are added tokens that are not.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return str(tokenizer.to_str())


@functools.cache
def byte_fallback(special: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> str:
    """tokenizer.json of a SentencePiece BPE with byte tokens, as in Llama 2 and Mistral.

    Its post-processor adds BOS; decoding drops the first space.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁Hello", "▁world", "Hello", "world", "▁▁", *"abcdefghijklmnopqrstuvwxyz", "é"]
    vocabulary = {token: index for index, token in enumerate((*special, *byte_tokens, *words))}
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
    )
    return str(tokenizer.to_str())


@functools.cache
def unigram() -> str:
    """tokenizer.json of a Unigram model, in which plain text can reach control tokens."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = ["▁", "<", ">", "/", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [(piece, 0.0) for piece in special] + [(piece, -5.0) for piece in pieces]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(special)
    return str(tokenizer.to_str())


def definition(tokenizer_json: str) -> dict[str, Any]:
    """tokenizer.json, parsed."""
    parsed: dict[str, Any] = json.loads(tokenizer_json)
    return parsed
