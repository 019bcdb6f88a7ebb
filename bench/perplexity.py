"""`python -m bench.perplexity REFERENCE MODEL …`: what a precision costs in quality.

Exports of one checkpoint are run over the same English text, token by token as in decoding, and
compared with the first, which is usually in fp32. The text is Python's own language reference,
which ships with every Python and is in no model's calibration data.
"""

import argparse
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from generator_svc.plan import Row, StepPlan
from generator_svc.run.runner import OrtRunner
from trivium.model_directory import ModelDirectory, load_model_directory

ROWS = 32
Logs = npt.NDArray[np.float32]  # log-probabilities [rows, tokens, vocabulary]


@dataclass(frozen=True)
class Agreement:
    """Perplexity of the text, KL divergence from the reference in nats, and top-1 agreement."""

    perplexity: float
    divergence: float
    top1: float


def windows(model: ModelDirectory, length: int) -> npt.NDArray[np.int64]:
    """Token ids [ROWS, length], each row from a different topic."""
    tokenizer = Tokenizer.from_file(str(model.tokenizer))
    topics = pydoc_data.topics.topics
    found = (tokenizer.encode(topics[name]).ids[10:] for name in sorted(topics))
    rows = [ids[:length] for ids in found if len(ids) >= length][:ROWS]
    assert len(rows) == ROWS, "the text is too short for windows of this length"
    return np.array(rows)


def log_probabilities(model: ModelDirectory, tokens: npt.NDArray[np.int64]) -> Logs:
    """Log-probabilities of the token after each position, given those up to it."""
    runner = OrtRunner(model, "cpu", ROWS, 2 * tokens.shape[1])
    steps = []
    for position, column in enumerate(tokens.T):
        plan = StepPlan(rows=tuple(Row(int(token), position) for token in column))
        result = runner.run(plan).rows
        assert result is not None
        assert isinstance(result.logits, np.ndarray), result.error
        logits = result.logits - result.logits.max(-1, keepdims=True)
        steps.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return np.stack(steps, axis=1)


def agreement(found: Logs, reference: Logs, tokens: npt.NDArray[np.int64]) -> Agreement:
    """Compares `found` with `reference`, both over `tokens`."""
    following = np.take_along_axis(found[:, :-1], tokens[:, 1:, None], -1)
    divergence = np.mean([(np.exp(r) * (r - f)).sum(-1).mean() for f, r in zip(found, reference)])  # noqa: B905 - arrays of one shape
    same = found.argmax(-1) == reference.argmax(-1)
    return Agreement(float(np.exp(-following.mean())), float(divergence), float(same.mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in each of 32 windows")
    options = parser.parse_args()
    models = [load_model_directory(folder) for folder in options.models]
    tokens = windows(models[0], options.tokens)
    reference = log_probabilities(models[0], tokens)
    base = agreement(reference, reference, tokens)
    for model in models:
        found = agreement(log_probabilities(model, tokens), reference, tokens)
        print(
            f"{model.precision or model.id:10} perplexity {found.perplexity:7.3f} "
            f"({found.perplexity / base.perplexity - 1:+.2%}), KL divergence "
            f"{found.divergence:.4f}, same top-1 token {found.top1:.1%}"
        )


if __name__ == "__main__":
    main()
