"""On a fake CUDA device a request gets the tokens that it gets alone on the CPU, whatever is
batched with it, reused for it, moved, padded or cancelled."""

import random
from collections import defaultdict

import pytest

from bench.random_llama import SHAPES, make_random_llama
from generator_svc.config import GeneratorSettings
from generator_svc.metering import Meter
from generator_svc.sequence import EngineRequest, SamplingParams, SequenceUpdate
from generator_svc.startup import build_engine, load_runner, warm_up
from tests.generator_svc.fake_cuda import fake_cuda_device
from trivium.model_directory import load_model_directory

SLOTS, SLOT_LENGTH = 12, 384
SAMPLINGS = (
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    {"temperature": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2, "min_p": 0.02},
)

Tokens = dict[tuple[int, int], list[int]]  # by request and choice


@pytest.fixture(scope="module", params=["fp32", "int4"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda") / "small"
    return load_model_directory(make_random_llama(folder, SHAPES["small"], request.param, "cuda"))


def requests(seed):
    """Short and long prompts, many with a common prefix, with one or several choices."""
    draw = random.Random(seed)

    def random_tokens(count):
        return tuple(draw.randrange(5, 250) for _ in range(count))

    beginnings = [(), *(random_tokens(count) for count in (10, 40, 90))]
    return [
        EngineRequest(
            draw.choice(beginnings) + random_tokens(draw.choice((1, 3, 9, 30, 60, 150))),
            draw.randrange(1, 30),
            SamplingParams(**draw.choice(SAMPLINGS), seed=draw.randrange(999)),
            n=draw.choice((1, 1, 1, 2, 4)),
            top_logprobs=draw.choice((None, None, 3)),
        )
        for _ in range(60)
    ]


def answers(model, device, wanted, at_once, cancelled=frozenset()):
    """Tokens of all requests. If `at_once` is 1, each is submitted when the one before has ended,
    else up to `at_once` before each step; those in `cancelled` are cancelled after a few steps."""
    settings = GeneratorSettings(
        model_directory=model.path,
        device=device,
        slots=SLOTS,
        max_sequence_length=SLOT_LENGTH,
        prefix_cache=device == "cuda",
        threads=1,
    )
    runner, meter = load_runner(settings, model), Meter()
    warm_up(settings, runner, meter)
    updates: list[SequenceUpdate] = []
    faults: list[BaseException] = []
    engine = build_engine(settings, runner, meter, updates.extend, faults.append)
    draw = random.Random(len(wanted))
    tokens: Tokens = defaultdict(list)
    running, unsent, steps = {}, list(enumerate(wanted)), 0
    while unsent or running:
        coming = draw.randint(1, at_once) if at_once > 1 or not running else 0
        for number, request in unsent[:coming]:
            running[engine.submit(request, number)] = steps
        del unsent[:coming]
        engine.step()
        engine.check_integrity()
        steps += 1
        for update in updates:
            assert update.error is None
            if update.token is not None:
                tokens[update.group.tag, update.sequence.index].append(update.token.token_id)
            if update.group.is_finished:
                running.pop(update.group, None)
        updates.clear()
        for group, began in list(running.items()):
            if group.tag in cancelled and steps - began > 8:
                engine.cancel(group)
                del running[group]
    assert [] == faults
    return tokens


def test_batched_tokens_equal_those_of_each_request_alone(model):
    """Cancelled requests get the beginning of those tokens."""
    wanted = requests(seed=1)
    cancelled = frozenset(range(0, len(wanted), 7))
    alone = answers(model, "cpu", wanted, at_once=1)
    with fake_cuda_device():
        together = answers(model, "cuda", wanted, 6, cancelled)

    assert sum(request.n for request in wanted) == len(alone)
    for (number, index), expected in alone.items():
        found = together.get((number, index), [])
        assert (expected[: len(found)] if number in cancelled else expected) == found
