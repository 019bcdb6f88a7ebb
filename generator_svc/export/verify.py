"""Compares an exported graph with the PyTorch checkpoint it came from.

The numbers go into the manifest, so that whoever is handed a model folder can see what the export
and its quantisation cost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from generator_svc.export.checkpoint.checkpoint import Checkpoint
from generator_svc.export.checkpoint.decoder import Decoder
from trivium.host_limits import cpu_limit

TEXT = (
    "The three roads of the old curriculum were grammar, logic and rhetoric. A student learned "
    "first how words are put together, then how thoughts follow from each other, and in the end "
    "how to speak so that others listen. Water boils at one hundred degrees at the level of the "
    "sea; on a high mountain it boils sooner, because the air above it weighs less."
)
MAX_TOKENS = 64
GREEDY_TOKENS = 16


@dataclass(frozen=True)
class Agreement:
    """Exported graph against checkpoint, over the positions of one short text.

    Perplexities are those of the text's own next tokens; `greedy_tokens_equal` counts how many of
    the first tokens that both generate after the text are the same.
    """

    positions: int
    max_logit_difference: float
    mean_kl_divergence: float
    top1_agreement: float
    perplexity: float
    perplexity_checkpoint: float
    greedy_tokens: int
    greedy_tokens_equal: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class GraphRunner:
    """Runs an exported graph on the CPU, one row at a time, with caches that grow."""

    def __init__(self, graph: Path, decoder: Decoder) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = cpu_limit().cores
        options.log_severity_level = 3
        # torch's threads run in turn with these; spinning ones would take their cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.decoder = decoder
        self.reset()

    def reset(self) -> None:
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        is_half = "float16" in kinds["past_key_values.0.key"]
        empty = np.zeros(
            (1, self.decoder.num_kv_heads, 0, self.decoder.head_size),
            np.float16 if is_half else np.float32,
        )
        self.cache = [empty] * (2 * self.decoder.num_layers)

    def push(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        """Feeds tokens after those already there; logits [vocabulary] of the last one."""
        parts = [f"{i}.{p}" for i in range(self.decoder.num_layers) for p in ("key", "value")]
        total = self.cache[0].shape[2] + len(tokens)
        feed = {f"past_key_values.{part}": v for part, v in zip(parts, self.cache, strict=True)}
        feed["input_ids"] = np.array([tokens], np.int64)
        feed["attention_mask"] = np.ones((1, total), np.int64)
        outputs = self.session.run(["logits", *(f"present.{part}" for part in parts)], feed)
        self.cache = outputs[1:]
        logits: np.ndarray[Any, Any] = outputs[0][0, -1]
        return logits


def compare(checkpoint: Checkpoint, graph: Path, tokens: list[int]) -> Agreement:
    """Runs both over `tokens` (at least two), then generates a few tokens greedily with both."""
    runner = GraphRunner(graph, checkpoint.decoder)
    exported = np.stack([runner.push([token]) for token in tokens])
    with torch.inference_mode():
        reference = checkpoint.model(torch.tensor([tokens])).logits[0].numpy()
    ours, theirs = _log_softmax(exported), _log_softmax(reference)
    following = np.array(tokens[1:])
    steps = np.arange(len(following))
    expected = _greedy_checkpoint(checkpoint, tokens)
    got = _greedy_exported(runner, tokens)
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
    )


def _greedy_exported(runner: GraphRunner, tokens: list[int]) -> list[int]:
    runner.reset()
    logits = runner.push(tokens)
    generated: list[int] = []
    while len(generated) < GREEDY_TOKENS:
        generated.append(int(logits.argmax()))
        logits = runner.push(generated[-1:])
    return generated


def _greedy_checkpoint(checkpoint: Checkpoint, tokens: list[int]) -> list[int]:
    """By hand: `generate` would apply the checkpoint's own sampling defaults and stop at EOS."""
    generated: list[int] = []
    step, cache = torch.tensor([tokens]), None
    with torch.inference_mode():
        while len(generated) < GREEDY_TOKENS:
            output = checkpoint.model(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            generated.append(int(output.logits[0, -1].argmax()))
            step = torch.tensor([generated[-1:]])
    return generated


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
