"""Decode runs with inputs at fixed addresses, as captured CUDA graphs need, on the CPU.

The CPU captures nothing, so everything is compared here but the capture itself.
"""

import logging
import time

import numpy as np
import pytest

from generator_svc.plan import Chunk, Row, StepPlan
from generator_svc.run.fixed_inputs import FixedInputs
from generator_svc.run.runner import OrtRunner
from generator_svc.sequence import SamplingParams
from tests.generator_svc.engine_harness import Harness
from tests.tiny_models import tiny_model_directory
from trivium.model_directory import load_model_directory

PROMPTS = [tuple(range(5, 30)), tuple(range(40, 49)), tuple(range(60, 93)), (3, 9)]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request):
    return load_model_directory(tiny_model_directory(request.param))


def _runner(model, cuda_graphs):
    runner = OrtRunner(model, "cpu", 4, 96, threads=1, cuda_graphs=cuda_graphs)
    runner.capture(seconds=60)
    for slot, prompt in enumerate(PROMPTS):
        runner.run(StepPlan(chunks=(Chunk(slot, 0, prompt, True),)))
    return runner


def _decoded(runner):
    """Logits of steps with one to four rows, each at its own position, one of them idle."""
    found = []
    for step, count in enumerate((1, 4, 3, 2, 4, 1, 2)):
        rows = [Row(7 + step, len(prompt) + step) for prompt in PROMPTS[:count]]
        rows[count // 2] = rows[count // 2]._replace(token_id=0, is_idle=True)
        found.append(np.array(runner.run(StepPlan(rows=tuple(rows))).rows.logits).tolist())
    return found


def test_captured_sizes_give_the_same_bits_as_eager_runs(model, monkeypatch):
    """Also for fewer rows after more, and more again; three rows have no graph and run eagerly."""
    written = []
    write = FixedInputs.write

    def note(self, rows):
        written.append(len(rows))
        return write(self, rows)

    monkeypatch.setattr(FixedInputs, "write", note)
    expected, given = (_decoded(_runner(model, graphs)) for graphs in (False, True))

    assert expected == given
    comparison, captures, steps = [1, 1, 1], [1, 2, 4], [1, 4, 2, 4, 1, 2]
    assert comparison + captures + steps == written


def test_graphs_not_captured_at_startup_are_captured_later(model):
    """The start takes no longer than allowed, and answers are the same afterwards."""
    runner = OrtRunner(model, "cpu", 4, 96, threads=1, cuda_graphs=True)
    spent = runner.capture(seconds=0)
    for slot, prompt in enumerate(PROMPTS):
        runner.run(StepPlan(chunks=(Chunk(slot, 0, prompt, True),)))

    assert spent > 0
    assert _decoded(_runner(model, cuda_graphs=False)) == _decoded(runner)


def test_engine_generates_the_same_tokens_with_captured_graphs(model):
    """Greedy and sampled, several choices, ending at different times."""
    requests = [
        {"sampling": SamplingParams(temperature=0)},
        {"sampling": SamplingParams(seed=3), "n": 2},
        {"sampling": SamplingParams(seed=5, top_k=20, repetition_penalty=1.1)},
    ]
    answers = []
    for cuda_graphs in (False, True):
        runner = _runner(model, cuda_graphs)
        sizes = runner.info.capture_sizes
        harness = Harness(slots=4, slot_length=96, runner=runner, batch_sizes=sizes)
        groups = [
            harness.submit(
                [9 + i, *range(20, 40)], 10 + 5 * i, stop_token_ids=frozenset(), **fields
            )
            for i, fields in enumerate(requests)
        ]
        harness.finish()
        answers.append([dict(harness.tokens[group]) for group in groups])

    assert answers[0] == answers[1]


def test_failed_graph_falls_back_to_an_eager_run(model, monkeypatch, caplog):
    """Only the log shows it; the time of the failed attempt is device time too."""
    expected = _decoded(_runner(model, cuda_graphs=False))
    runner = _runner(model, cuda_graphs=True)

    def fail(self, rows):
        time.sleep(0.05)
        raise MemoryError("no room for a graph")

    monkeypatch.setattr(FixedInputs, "write", fail)
    with caplog.at_level(logging.WARNING):
        first = runner.run(StepPlan(rows=(Row(7, len(PROMPTS[0])),))).rows
        given = _decoded(runner)

    assert expected == given
    assert first.nanoseconds >= 50_000_000
    assert ["CUDA graphs are disabled: no room for a graph"] == caplog.messages


def test_no_memory_for_graph_inputs_disables_graphs(model, monkeypatch, caplog):
    """The log says why steps run without graphs."""

    def fail(self, *arguments):
        raise MemoryError("no room for a mask")

    monkeypatch.setattr(FixedInputs, "__init__", fail)
    with caplog.at_level(logging.WARNING):
        given = _decoded(_runner(model, cuda_graphs=True))

    assert _decoded(_runner(model, cuda_graphs=False)) == given
    assert ["CUDA graphs are disabled: no room for a mask"] == caplog.messages


def test_captured_graphs_are_verified(model, monkeypatch, caplog):
    """It is noticed if a replay ignores the current tokens."""
    expected = _decoded(_runner(model, cuda_graphs=False))
    write = FixedInputs.write
    monkeypatch.setattr(FixedInputs, "write", lambda self, rows: write(self, (Row(0, 0),)))
    with caplog.at_level(logging.WARNING):
        runner = _runner(model, cuda_graphs=True)

    assert 1 == len(caplog.messages)
    assert expected == _decoded(runner)
