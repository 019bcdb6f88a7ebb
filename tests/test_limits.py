"""One table of ranges for what the protocol documents, callers may send and models may set.

Every entry point is tried just inside and just outside every range.
"""

import math
import re
from array import array
from pathlib import Path
from typing import Any

import pytest

from generator_svc import sequence
from generator_svc.convert import Limits, to_engine_request
from rest_facade.requests.chat import ChatCompletionRequest
from rest_facade.requests.validation import parse
from tests.completion_requests import chat_request
from tokenizer_svc.convert.request import chat_request as from_message
from tokenizer_svc.request.validate import valid_options
from trivium.generator.v1.generator_pb2 import StartGeneration
from trivium.limits import SAMPLING, Range
from trivium.sampling.v1.sampling_pb2 import SamplingParams
from trivium.wire.errors import ServiceError

PROTO = Path(__file__).parents[1] / "protos/trivium/sampling/v1/sampling.proto"
LIMITS = Limits("r", 512, 64, 8, (2,), sequence.SamplingParams())
WHOLE = ("top_k",)


def rest(name: str, value: float) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    parse(ChatCompletionRequest, {"model": "m", "messages": messages, name: value})


def public(name: str, value: float) -> None:
    valid_options(from_message(chat_request(**{name: value})).options, 512)


def internal(name: str, value: float) -> None:
    sampling = SamplingParams(**{name: value})
    to_engine_request(
        StartGeneration(revision="r", prompt_token_ids=[1], sampling=sampling), LIMITS
    )


def edges(name: str, allowed: Range) -> tuple[list[float], list[float]]:
    """Values just inside the field's range, and just outside."""
    low, high = allowed.minimum, allowed.maximum
    if name in WHOLE:  # more does not fit into int32
        return [low, high], [low - 1]
    if allowed.above_minimum:
        return [5e-324, high], [low, math.nextafter(high, math.inf)]
    return [low, high], [math.nextafter(low, -math.inf), math.nextafter(high, math.inf)]


@pytest.mark.parametrize("way", [rest, public, internal])
@pytest.mark.parametrize("name", SAMPLING)
def test_all_interfaces_have_the_same_ranges(name: str, way: Any) -> None:
    """REST, the public protocol and the generator's agree on both ends of every range."""
    within, outside = edges(name, SAMPLING[name])
    for value in within:
        way(name, value)
    for value in outside:
        with pytest.raises(ServiceError) as caught:
            way(name, value)
        assert re.fullmatch(r"(integer|decimal)_(above_max|below_min)_value", caught.value.code)
        assert name in (caught.value.param or "")


def test_every_field_reaches_the_sampler() -> None:
    """The caller's value reaches the sampler, whatever the model's default."""
    given = {name: allowed.maximum for name, allowed in SAMPLING.items()}
    sampling = SamplingParams(**given, seed=5, logit_bias={3: 1.5}, allowed_token_ids=[3, 0])
    start = StartGeneration(revision="r", prompt_token_ids=[1], sampling=sampling)
    allowed = array("q", [3, 0])

    assert (
        sequence.SamplingParams(**given, seed=5, logit_bias={3: 1.5}, allowed_token_ids=allowed)
        == to_engine_request(start, LIMITS).sampling
    )


def test_limits_match_the_protocols_comments() -> None:
    """Each number has a range, stated in its comment; the engine has a default for each field."""
    text = PROTO.read_text()
    fields = re.findall(r"((?:  //.*\n)+)  optional (?:double|int32) (\w+)", text)

    assert list(SAMPLING) == [name for _, name in fields]
    assert set(SamplingParams.DESCRIPTOR.fields_by_name) == set(vars(sequence.SamplingParams()))
    for comment, name in fields:
        allowed = SAMPLING[name]
        low, high = allowed.minimum, allowed.maximum
        span = f"{low} or more" if name in WHOLE else f"{low} to {high}"
        assert ("Above " if allowed.above_minimum else "") + span in " ".join(comment.split()), name
