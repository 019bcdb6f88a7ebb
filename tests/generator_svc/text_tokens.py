"""A small tokenizer of real text, and a random model that uses it."""

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from generator_svc.constraint.llguidance import CompiledConstraint, TokenTable, grammar_of

EXTRA_IDS = 5  # graphs often have a few more ids than the tokenizer
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
        """Vocabulary size of the graph."""
        return self.known + EXTRA_IDS

    @property
    def known(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def decode(self, token_ids: list[int]) -> str:
        """The text without control tokens; bytes that form no character become U+FFFD."""
        return str(self.tokenizer.decode(token_ids))

    @functools.cached_property
    def closers(self) -> list[int]:
        """Tokens that close strings, objects and arrays in JSON."""
        return [self.tokenizer.token_to_id(text) for text in '"}]']

    def random_logits(self, context: list[int]) -> Any:
        """Noise that depends on the whole context, float32 [size]; endings are more likely."""
        draw = np.random.default_rng([len(context), *context])
        logits = (draw.normal(size=self.size) * 3).astype(np.float32)
        logits[self.closers] += 6
        logits[self.eos] += 12
        return logits


@functools.cache
def token_table() -> TokenTable:
    """The same tokens in llguidance's form."""
    tokens = text_tokens()
    return TokenTable(tokens.file, tokens.size, [tokens.eos])


def compiled(kind: str, text: str) -> CompiledConstraint:
    """A request's constraint on these tokens."""
    return CompiledConstraint(token_table(), kind, grammar_of(kind, text))


def accepts(kind: str, text: str, answer: str) -> bool:
    """Whether an answer can be generated token by token and may end after that."""
    tokens = text_tokens()
    state = compiled(kind, text).new_state()
    for token_id in tokens.encode(answer):
        if not state.allowed()[token_id]:
            return False
        state.accept(token_id)
    return bool(state.allowed()[tokens.eos])


@functools.cache
def text_tokens() -> TextTokens:
    """The tokenizer: all 256 bytes and about 150 merges."""
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
    atexit.register(shutil.rmtree, folder)
    file = Path(folder) / "tokenizer.json"
    tokenizer.save(str(file))
    return TextTokens(tokenizer, file)
