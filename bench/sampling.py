"""What drawing tokens costs the host: `python -m bench.sampling`.

CPU milliseconds of a step of 32 rows in the sampler alone, without a model. Logits are either like
a model's, a few likely tokens above a bell curve, or flat, with thousands of equally likely tokens.
The former are also measured as the top 256 that a CUDA device returns, computed on the CPU.
Minimum and median over rounds in which all cases take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from generator_svc.admission import Admission
from generator_svc.device import Device
from generator_svc.run.logits_buffers import DeviceLogits, DeviceRows
from generator_svc.sampling.device_sampler import sample_all
from generator_svc.sequence import EngineRequest, SamplingParams, Sequence, SequenceGroup

VOCABULARIES = (49_152, 151_936)
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0),
    "OpenAI's defaults": SamplingParams(),
    "Qwen's": SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
    "DeepSeek's": SamplingParams(temperature=0.6, top_p=0.95),
}
PROMPT, OUTPUT = 128, 64  # tokens, for the repetition penalty

Rows = npt.NDArray[np.float32]  # logits [rows, vocabulary]


def model_like(rows: int, vocabulary: int) -> Rows:
    """A bell curve, and about 40 tokens raised above it by up to 20."""
    random = np.random.default_rng(vocabulary)
    logits = 2.5 * random.standard_normal((rows, vocabulary))
    likely = random.random(logits.shape) < 40 / vocabulary
    logits[likely] += 20 * random.random(np.count_nonzero(likely))
    return logits.astype(np.float32)


def flat(rows: int, vocabulary: int) -> Rows:
    """Logits like those of random weights."""
    random = np.random.default_rng(vocabulary)
    return (0.02 * random.standard_normal((rows, vocabulary))).astype(np.float32)


KINDS = {"like a model's": model_like, "flat": flat}


def sequences(rows: int, vocabulary: int, sampling: SamplingParams) -> Iterator[Sequence]:
    """Sequences in the middle of decoding."""
    random = np.random.default_rng(rows)
    for tokens in random.integers(vocabulary, size=(rows, PROMPT + OUTPUT)).tolist():
        request = EngineRequest(tuple(tokens[:PROMPT]), 2 * OUTPUT, sampling)
        [sequence] = SequenceGroup(request, Admission(1, 1).enter(1)).sequences
        for token_id in tokens[PROMPT:]:
            sequence.append(token_id)
        yield sequence


def as_on_cuda(batch: list[Sequence], logits: Rows) -> DeviceRows:
    """What a CUDA device would return for the rows."""
    rows, vocabulary = logits.shape
    device_logits = DeviceLogits(Device("cpu"), vocabulary)
    buffer = device_logits.allocate(rows)
    buffer.update_inplace(logits.reshape(rows, 1, vocabulary))
    return device_logits.read(buffer, [sequence.row_temperature for sequence in batch])


def step_milliseconds(batch: list[Sequence], logits: Rows | DeviceRows) -> float:
    """CPU time of one step."""
    began = time.process_time_ns()
    tokens, failures = sample_all(zip(batch, logits, strict=True))
    spent = time.process_time_ns() - began
    assert len(tokens) == len(batch), failures
    return spent / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for vocabulary in VOCABULARIES:
        for kind, make in KINDS.items():
            logits = make(options.rows, vocabulary)
            steps: dict[str, tuple[list[Sequence], Rows | DeviceRows]] = {}
            for name, sampling in SAMPLINGS.items():
                batch = list(sequences(options.rows, vocabulary, sampling))
                steps[name] = batch, logits
                if make is not flat:  # flat logits need the whole rows
                    steps[f"{name}, CUDA"] = batch, as_on_cuda(batch, logits)
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(options.rounds):
                for name, step in steps.items():
                    times[name].append(step_milliseconds(*step))
            print(f"{options.rows} rows of {vocabulary:,} logits, {kind}")
            for name, spent in times.items():
                print(f"  {name:24} {min(spent):8.2f} ms, median {statistics.median(spent):8.2f}")


if __name__ == "__main__":
    main()
