"""A small tokenizer of real text, and models that write at random with it."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

EXTRA_IDS = 5  # the graph knows some ids more than the tokenizer, as graphs do
CORPUS = (
    '{"name": "value", "items": [1, 2, 3], "nothing": null, "yes": true, "no": false}\n'
    '{\n  "a": -1.5e10,\n  "b": [[], {}, ""],\n  "c": {"d": "2024-01-31T12:00:00Z"}\n}\n'
    "The quick brown fox jumps over the lazy dog, aaaa bbbb abab 12 345 6789.\n"
)


@dataclass(frozen=True)
class TextTokens:
    """A byte-level tokenizer: its file, its size and its control tokens."""

    tokenizer: Any
    file: Path
    eos: int = 2

    @property
    def size(self) -> int:
        """Tokens of the graph."""
        return self.known + EXTRA_IDS

    @property
    def known(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def decode(self, token_ids: list[int]) -> str:
        """The text without control tokens; bytes that are no character make U+FFFD."""
        return str(self.tokenizer.decode(token_ids))

    def random_logits(self, context: list[int], scale: float = 3.0) -> Any:
        """Noise that depends on the whole context, float32 [size]; ends are a bit more likely."""
        draw = np.random.default_rng([len(context), *context])
        logits = (draw.normal(size=self.size) * scale).astype(np.float32)
        logits[self.eos] += 4 * scale
        return logits


@functools.cache
def text_tokens() -> TextTokens:
    """All 256 bytes and about 150 merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|pad|>", "<|tool|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    folder = tempfile.mkdtemp(prefix="trivium-tokens-")
    file = Path(folder) / "tokenizer.json"
    tokenizer.save(str(file))
    return TextTokens(tokenizer, file)
