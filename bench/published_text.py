"""The text side of a published checkpoint: a tokenizer of the real kind and size, the template.

The real vocabularies stay out of this repository, and so do the chat templates. The tokenizer has
the real added tokens, ids, split and normalizer, and in the place of the learnt BPE one of letters:
every byte, a letter behind a space or another, and two of these together. Any text comes back,
English takes some four letters a token, and what a random model says can be read.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from bench.published import Published
from tests.templates.download import FOLDER
from tests.tokenizer_svc import sample_templates

SPACE = "Ġ"  # as byte-level BPEs write it
# Where `make templates` has not fetched the real ones.
SHORTENED = {
    "Qwen-Qwen2.5-7B-Instruct": sample_templates.QWEN25,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": sample_templates.DEEPSEEK_R1,
    "openai-gpt-oss-120b": sample_templates.HARMONY,
}


def write_text_side(folder: Path, published: Published) -> None:
    """Configurations, tokenizer and chat template."""
    published_tokenizer(published).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(chat_template(published), encoding="utf-8")
    files = {
        "config.json": published.config,
        "generation_config.json": published.generation_config,
        "tokenizer_config.json": published.tokenizer_config,
    }
    for name, value in files.items():
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (folder / name).write_text(f"{text}\n", encoding="utf-8")


def chat_template(published: Published) -> str:
    """The real one where `make templates` has fetched it, else one shortened to its form."""
    file = FOLDER / f"{published.chat_template}.jinja"
    return file.read_text(encoding="utf-8") if file.exists() else SHORTENED[published.chat_template]


def published_tokenizer(
    published: Published, bpe: tokenizers.models.BPE | None = None
) -> tokenizers.Tokenizer:
    """Ordinary tokens below `ordinary_tokens`, then the added ones at their ids.

    `bpe` is the real one of these ordinary tokens, for those who have it.
    """
    tokenizer = tokenizers.Tokenizer(bpe or _letters(published.ordinary_tokens))
    if published.normalizer is not None:
        tokenizer.normalizer = getattr(normalizers, published.normalizer)()
    split = pre_tokenizers.Split(tokenizers.Regex(published.split), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token.content, special=token.special, normalized=False)
            for token in published.added_tokens
        ]
    )
    if published.adds_bos:
        bos = published.tokenizer_config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B:1",
            special_tokens=[(bos, published.ordinary_tokens)],
        )
    return tokenizer


def _letters(size: int) -> tokenizers.models.BPE:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert size >= len(letters), f"{size} tokens are too few: each byte needs one"
    merges = list(_merges(size - len(letters)))
    tokens = (*letters, *map("".join, merges))
    return tokenizers.models.BPE({token: index for index, token in enumerate(tokens)}, merges)


def _merges(count: int) -> Iterator[tuple[str, str]]:
    """Two letters, the first of which may be a space; then four, spread over the alphabet."""
    pairs = list(itertools.product(SPACE + string.ascii_lowercase, string.ascii_lowercase))
    yield from pairs[:count]
    left = max(count - len(pairs), 0)
    seconds = pairs[len(string.ascii_lowercase) :]
    total = len(pairs) * len(seconds)
    assert left <= total, f"there are only {total + len(pairs)} merges, {count} were asked for"
    for index in range(left):
        first, second = divmod(index * total // left, len(seconds))
        yield "".join(pairs[first]), "".join(seconds[second])
