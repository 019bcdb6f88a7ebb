"""Runs an exported graph as the engine does: past and present share one buffer of slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from trivium.model_directory import ModelDirectory


class Slots:
    """A KV cache of [rows, kv heads, capacity, head size] per layer, bound as past and present."""

    def __init__(self, model: ModelDirectory, rows: int, capacity: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        self.model = model
        self.session = ort.InferenceSession(
            model.graph, options, providers=["CPUExecutionProvider"]
        )
        shape = (rows, model.num_kv_heads, capacity, model.head_size)
        self.cache = {
            (layer, part): np.full(shape, 7.0, np.float32)  # invalid positions must not be read
            for layer in range(model.num_layers)
            for part in ("key", "value")
        }

    def run(
        self, first: int, tokens: list[list[int]], lengths: list[int], width: int = 0
    ) -> np.ndarray:
        """Runs `tokens` in the rows from `first`; `lengths` include them. [rows, vocabulary].

        The mask is as wide as the longest row, or `width`.
        """
        mask = np.arange(width or max(lengths))[None, :] < np.array(lengths)[:, None]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array(tokens, np.int64))
        binding.bind_cpu_input("attention_mask", mask.astype(np.int64))
        binding.bind_output("logits")
        for (layer, part), value in self.cache.items():
            rows = ort.OrtValue.ortvalue_from_numpy(value[first : first + len(tokens)])
            names = {"key": self.model.names.past_key, "value": self.model.names.past_value}
            binding.bind_ortvalue_input(names[part] % layer, rows)
            names = {"key": self.model.names.present_key, "value": self.model.names.present_value}
            binding.bind_ortvalue_output(names[part] % layer, rows)
        self.session.run_with_iobinding(binding)
        logits = binding.get_outputs()[0].numpy()
        assert logits.shape == (len(tokens), 1, self.model.vocab_size)
        return logits[:, 0].copy()

    def prefill(self, row: int, tokens: list[int], chunk: int | None = None) -> np.ndarray:
        """Prefills a row, in chunks if requested; logits [vocabulary] of the last token."""
        size = chunk or len(tokens)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            logits = self.run(row, [part], [start + len(part)])
        return logits[0]


@pytest.fixture(scope="session")
def slots() -> Callable[..., Slots]:
    return lambda model, rows=1, capacity=256: Slots(model, rows, capacity)


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """Token ids below the tiny vocabulary, the same for the same seed."""

    def make(length: int, seed: int = 0) -> list[int]:
        generator: Any = np.random.default_rng(seed)
        return [int(token) for token in generator.integers(3, 400, length)]

    return make
