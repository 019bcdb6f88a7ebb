"""Compares an exported graph with the PyTorch checkpoint it came from.

The results go into the manifest, so that whoever gets a model folder can see what the export and
its quantisation cost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from generator_svc.export.checkpoint.checkpoint import MIN_CONTEXT_LENGTH, Checkpoint
from generator_svc.export.checkpoint.decoder import Decoder
from generator_svc.export.checkpoint.reading import counted
from generator_svc.export.errors import ExportError
from generator_svc.export.graph.pieces import CutGraph, Piece
from generator_svc.export.progress import Progress, silent
from generator_svc.export.weights.matrix import Array
from trivium.host_limits import cpu_limit

Arrays = dict[str, Array]
PAST, PRESENT = "past_key_values.", "present."

TEXT = (
    "The three roads of the old curriculum were grammar, logic and rhetoric. A student learned "
    "first how words are put together, then how thoughts follow from each other, and in the end "
    "how to speak so that others listen. Water boils at one hundred degrees at the level of the "
    "sea; on a high mountain it boils sooner, because the air above it weighs less."
)
MAX_TOKENS = 64
GREEDY_TOKENS = MIN_CONTEXT_LENGTH - 2
# Maximum weights of a piece that is loaded at once, and of a graph that is not cut at all, if they
# are float32 or quantised. ONNX Runtime may hold them twice, once repacked, and widens float16.
MAX_PIECE_BYTES = 2**29
MAX_WHOLE_BYTES = 2**30


@dataclass(frozen=True)
class Agreement:
    """How well the exported graph agrees with the checkpoint, over the positions of a short text.

    Perplexities are of the text's own next tokens. `greedy_tokens_equal` is how many of the
    `greedy_tokens` that both generate after the text are equal before the first difference.
    `not_compared` describes what was left out: too large, or not computable on the CPU.
    """

    positions: int
    max_logit_difference: float
    mean_kl_divergence: float
    top1_agreement: float
    perplexity: float
    perplexity_checkpoint: float
    greedy_tokens: int
    greedy_tokens_equal: int
    not_compared: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class GraphRunner:
    """Runs an exported graph on the CPU, one row at a time, with a growing KV cache.

    A graph in one piece stays loaded; if there are several, only one is loaded at a time.
    """

    def __init__(self, graph: Path, decoder: Decoder) -> None:
        self._cut = CutGraph(graph, MAX_PIECE_BYTES)
        if self._cut.total_bytes * 4 // self._cut.cache_dtype.itemsize <= MAX_WHOLE_BYTES:
            self._cut = CutGraph(graph, MAX_WHOLE_BYTES)
        self._session: ort.InferenceSession | None = None
        self._cache: Arrays = {}
        shape = (1, decoder.num_kv_heads, 0, decoder.head_size)
        self._empty = np.zeros(shape, self._cut.cache_dtype)

    @property
    def is_half(self) -> bool:
        return bool(self._empty.dtype == np.float16)

    @property
    def is_whole(self) -> bool:
        return len(self._cut.pieces) == 1

    def run(self, tokens: list[int], progress: Progress = silent) -> Array:
        """Feeds tokens one by one, starting with an empty cache; logits [positions, vocabulary].

        Progress counts the bytes of weights that have been used.
        """
        self._cache = {}
        feeds = [self._inputs([token], position + 1) for position, token in enumerate(tokens)]
        done = 0
        for piece in self._cut.pieces:
            if self._cut.is_product(piece):
                self._multiply(piece, feeds)
            else:
                session = self._load(piece, feeds[0])
                for feed in feeds:
                    self._step(session, piece, feed)
            done += self._cut.nbytes(piece.nodes)
            progress("verifying", done, self._cut.total_bytes)
        return np.stack([feed["logits"][0, -1] for feed in feeds])

    def push(self, tokens: list[int], position: int) -> Array:
        """Feeds tokens from `position` on to a graph in one piece; logits [vocabulary] of the last.

        Position 0 clears the cache.
        """
        (piece,) = self._cut.pieces
        if position == 0:
            self._cache = {}
        feed = self._inputs(tokens, position + len(tokens))
        self._step(self._load(piece, feed), piece, feed)
        logits: Array = feed["logits"][0, -1]
        return logits

    def _multiply(self, piece: Piece, feeds: list[Arrays]) -> None:
        """Computes the product for all positions at once, rounded to the graph's data type."""
        (product,) = piece.nodes
        name = product.input[0]
        rows = np.concatenate([feed[name][0] for feed in feeds]).astype(np.float32)
        for feed, row in zip(feeds, self._cut.multiply(product, rows), strict=True):
            feed[product.output[0]] = row[None, None].astype(feed[name].dtype)

    def _inputs(self, tokens: list[int], total: int) -> Arrays:
        return {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
        }

    def _load(self, piece: Piece, feed: Arrays) -> ort.InferenceSession:
        if self._session is not None and self.is_whole:
            return self._session
        self._session = None  # frees its memory before the next one is created
        options = ort.SessionOptions()
        options.intra_op_num_threads = cpu_limit().cores
        options.log_severity_level = 3
        # PyTorch's threads alternate with these, which would take their cores by spinning.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self._cut.save(piece, feed)
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        finally:
            path.unlink()
        return self._session

    def _step(self, session: ort.InferenceSession, piece: Piece, feed: Arrays) -> None:
        """Runs the piece for one position; stores its outputs in `feed` and in the cache."""
        inputs = {
            name: self._cache.get(name, self._empty) if name.startswith(PAST) else feed[name]
            for name in piece.inputs
        }
        for name, value in zip(piece.outputs, session.run(piece.outputs, inputs), strict=True):
            if name.startswith(PRESENT):
                self._cache[PAST + name.removeprefix(PRESENT)] = value
            else:
                feed[name] = value


def compare(
    checkpoint: Checkpoint, graph: Path, tokens: list[int], progress: Progress = silent
) -> Agreement:
    """Runs both over `tokens` (at least two), then generates a few tokens greedily with both.

    A model that has to be run in pieces does not generate: each token would read all its weights.
    Raises ExportError if logits are not finite.
    """
    runner = GraphRunner(graph, checkpoint.decoder)
    running = counted(checkpoint.model, 1, progress, "running the checkpoint")
    with torch.inference_mode(), running:
        reference = checkpoint.model(torch.tensor([tokens])).logits[0].numpy()
    label = checkpoint.source.label
    if not np.isfinite(reference).all():
        raise ExportError(
            f"{label}: the checkpoint itself computes NaN or infinity: its weights are corrupt"
        )
    progress("verifying")
    exported = runner.run(tokens, progress)
    if not np.isfinite(exported).all():
        half = ": its activations exceed float16; use --precision fp32, or export for the CPU"
        raise ExportError(
            f"{label}: the exported graph computes NaN or infinity where the checkpoint does not"
            f"{half if runner.is_half else ''}"
        )
    ours, theirs = _log_softmax(exported), _log_softmax(reference)
    following = np.array(tokens[1:])
    steps = np.arange(len(following))
    expected, got = [], []
    if runner.is_whole:
        expected, got = _greedy_checkpoint(checkpoint, tokens), _greedy_exported(runner, tokens)
    equal = next(
        (i for i, pair in enumerate(zip(got, expected, strict=True)) if len(set(pair)) > 1),
        len(expected),
    )
    return Agreement(
        positions=len(tokens),
        max_logit_difference=float(np.abs(exported - reference).max()),
        mean_kl_divergence=float((np.exp(theirs) * (theirs - ours)).sum(-1).mean()),
        top1_agreement=float((exported.argmax(-1) == reference.argmax(-1)).mean()),
        perplexity=float(np.exp(-ours[steps, following].mean())),
        perplexity_checkpoint=float(np.exp(-theirs[steps, following].mean())),
        greedy_tokens=len(expected),
        greedy_tokens_equal=equal,
        not_compared=() if runner.is_whole else ("greedily generated tokens",),
    )


def _greedy_exported(runner: GraphRunner, tokens: list[int]) -> list[int]:
    logits = runner.push(tokens, 0)
    generated: list[int] = []
    while len(generated) < GREEDY_TOKENS:
        generated.append(int(logits.argmax()))
        logits = runner.push(generated[-1:], len(tokens) + len(generated) - 1)
    return generated


def _greedy_checkpoint(checkpoint: Checkpoint, tokens: list[int]) -> list[int]:
    """Not by `generate`, which would apply the checkpoint's sampling defaults and stop at EOS."""
    generated: list[int] = []
    step, cache = torch.tensor([tokens]), None
    with torch.inference_mode():
        while len(generated) < GREEDY_TOKENS:
            output = checkpoint.model(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            generated.append(int(output.logits[0, -1].argmax()))
            step = torch.tensor([generated[-1:]])
    return generated


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
