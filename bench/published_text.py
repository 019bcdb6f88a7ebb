"""The text side of a published checkpoint: a tokenizer of the same kind and size, and the template.

The real vocabularies and chat templates are not in this repository. The tokenizer has the real
added tokens, ids, split pattern and normalizer, but a synthetic BPE instead of the trained one:
every byte, pairs of a letter after a space or another letter, and two such pairs joined. Any text
round-trips, English takes about four letters per token, and a random model's output is legible.
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

SPACE = "Ġ"  # as in byte-level BPEs
# Used unless `make templates` has fetched the real ones.
SHORTENED = {
    "Qwen-Qwen2.5-7B-Instruct": sample_templates.QWEN25,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": sample_templates.DEEPSEEK_R1,
    "openai-gpt-oss-120b": sample_templates.HARMONY,
}


def write_text_side(folder: Path, published: Published) -> None:
    """Writes the configurations, tokenizer and chat template."""
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
    """The real one if `make templates` has fetched it, else a shortened version."""
    file = FOLDER / f"{published.chat_template}.jinja"
    return file.read_text(encoding="utf-8") if file.exists() else SHORTENED[published.chat_template]


def published_tokenizer(
    published: Published, bpe: tokenizers.models.BPE | None = None
) -> tokenizers.Tokenizer:
    """A tokenizer with ids below `ordinary_tokens` for the BPE, then the added tokens at their ids.

    `bpe` is the real BPE, if available.
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
    """Merges to two letters, the first of which may be a space; then to four, spread over the
    alphabet."""
    pairs = list(itertools.product(SPACE + string.ascii_lowercase, string.ascii_lowercase))
    yield from pairs[:count]
    left = max(count - len(pairs), 0)
    seconds = pairs[len(string.ascii_lowercase) :]
    total = len(pairs) * len(seconds)
    assert left <= total, f"there are only {total + len(pairs)} merges, but {count} were requested"
    for index in range(left):
        first, second = divmod(index * total // left, len(seconds))
        yield "".join(pairs[first]), "".join(seconds[second])
