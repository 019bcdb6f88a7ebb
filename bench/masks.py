"""The cost of a constraint per token: `python -m bench.masks MODEL_FOLDER`.

Runs the sampler alone, without a model: an answer is forced token by token, with and without its
schema.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from generator_svc.admission import Admission
from generator_svc.constraint.llguidance import CompiledConstraint, TokenTable, grammar_of
from generator_svc.sampling.sampler import sample_all
from generator_svc.sequence import EngineRequest, SamplingParams, SequenceGroup
from trivium.model_directory import load_model_directory

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}},
            "required": ["city", "zip"],
        },
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
}
ANSWER = {
    "name": "Ada Lovelace",
    "age": 36,
    "tags": ["mathematics", "poetry and engines", "letters"],
    "home": {"city": "London", "zip": "12345"},
}
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(),
    "top_p 0.9": SamplingParams(top_p=0.9),
}


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """The time in microseconds, and the result."""
    started = time.perf_counter()
    result = action()
    return (time.perf_counter() - started) * 1e6, result


def show(name: str, times: list[float]) -> None:
    ordered = sorted(times)
    late = ordered[int(len(ordered) * 0.9)]
    print(f"{name:28} median {statistics.median(times):6.0f} us, 90 % within {late:6.0f} us")


def forced(table: TokenTable, sampling: SamplingParams, compiled: Any) -> list[float]:
    """Microseconds for sampling each token of ANSWER."""
    ids = table.tokenizer.tokenize_str(json.dumps(ANSWER))
    noise = np.random.default_rng(0).normal(size=table.vocabulary_size).astype(np.float32)
    request = EngineRequest((5,), 10_000, sampling, constraint=compiled)
    [sequence] = SequenceGroup(request, Admission(1, 1).enter(1)).sequences
    times = []
    for token_id in ids:
        logits = noise.copy()
        logits[token_id] = 40
        spent, (tokens, _) = timed(partial(sample_all, [(sequence, logits)]))
        assert [token_id] == [token.token_id for _, token in tokens]
        sequence.append(token_id)
        times.append(spent)
    return times


def main() -> None:
    model = load_model_directory(Path(sys.argv[1]))
    loading = lambda: TokenTable(model.tokenizer, model.vocab_size, model.eos_token_ids)  # noqa: E731 - timed
    spent, table = timed(loading)
    show("load the tokens", [spent])
    grammar = grammar_of("json_schema", json.dumps(SCHEMA))
    compiling = [
        timed(lambda: CompiledConstraint(table, "json_schema", grammar)) for _ in range(20)
    ]
    show("compiling", [spent for spent, _ in compiling])
    for name, sampling in SAMPLINGS.items():
        free, masked = [], []
        for _, compiled in compiling:
            free += forced(table, sampling, None)
            masked += forced(table, sampling, compiled)
        show(f"{name}, free", free)
        show(f"{name}, constrained", masked)


if __name__ == "__main__":
    main()
