"""However the generator merges a stream's tokens into messages, the answer is the same.

Recorded token streams go through the public services, merged in many ways. Joined, the events must
say what they say with one token per message; so must what the facade makes of them.
"""

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rest_facade.convert.chat import ChatChunks
from rest_facade.convert.completion import CompletionChunks
from rest_facade.requests.chat import ChatCompletionRequest
from rest_facade.requests.completion import TextCompletionRequest
from rest_facade.requests.validation import parse
from tests.completion_requests import options
from tests.tokenizer_svc.conftest import Stage, running, write_model
from tests.tokenizer_svc.scripted_generator import finish, message_of, says, update
from tests.tokenizer_svc.test_completions import prompts
from tests.tokenizer_svc.test_cut_answers import MODEL_OUTPUTS
from tests.tokenizer_svc.test_tool_calls import ADD, NOW, ids
from tokenizer_svc.models import load_model
from trivium.chat.v1 import completion_pb2
from trivium.generator.v1 import generator_pb2

STOP_TOKEN = generator_pb2.FINISH_REASON_STOP_TOKEN
LENGTH = generator_pb2.FINISH_REASON_LENGTH
TOOLS = {"tools": [ADD, NOW]}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}

EXHAUSTIVE_STEPS = 9  # up to this many steps, all 2^8 ways are tried
SAMPLES = 20

Step = list[generator_pb2.SequenceUpdate]


@dataclass(frozen=True)
class Recording:
    """What a model of a family writes for each choice, how it ends, and the request's fields."""

    family: str
    texts: Sequence[str]
    reason: Any = STOP_TOKEN
    fields: dict[str, Any] = field(default_factory=dict)
    plain: bool = False  # /v1/completions instead of chat

    def steps(self, stage: Stage) -> list[Step]:
        """One entry per step of the engine; choices may end at different steps."""
        tokens = [ids(stage, text) for text in self.texts]
        steps: list[Step] = [[] for _ in range(max(map(len, tokens)) + 1)]
        for index, token_ids in enumerate(tokens):
            end = [2] if self.reason is STOP_TOKEN else []
            for place, token_id in enumerate([*token_ids, *end]):
                steps[place].append(update(index, [token_id], self._logprobs(token_id, place)))
            last = len(token_ids) - (not end)
            steps[last].append(finish(index, self.reason, len(token_ids) + len(end), 1000 + index))
        return [step for step in steps if step]

    def _logprobs(self, token_id: int, place: int) -> list[generator_pb2.TokenLogprobs]:
        if "logprobs" not in self.fields:
            return []
        top = {"top_token_ids": [token_id, 67], "top_logprobs": [-place / 8, -9.0]}
        return [generator_pb2.TokenLogprobs(logprob=-place / 8, **top)]


def recording(family: str, *texts: str, reason: Any = STOP_TOKEN, **fields: Any) -> Recording:
    return Recording(family, texts, reason, fields)


MULTI_TOKEN = "a 🫠🥹 鿊 b"  # characters that take several tokens
RECORDINGS = {
    "text": recording("smollm2", f"I like {MULTI_TOKEN}."),
    "few tokens": recording("smollm2", "🫠 ok", **LOGPROBS),
    "cut character": recording("smollm2", "a🫠"[:2], reason=LENGTH, **LOGPROBS),
    "logprobs": recording("smollm2", f"{MULTI_TOKEN} and so on", reason=LENGTH, **LOGPROBS),
    "stop string": recording("smollm2", "one END two", reason=LENGTH, stop=["END", "D t"]),
    "half a stop string": recording("smollm2", "one EN", stop=["END"], **LOGPROBS),
    "stop string, shown": recording(
        "smollm2", "🥹 END two", stop=["END"], include_stop_str_in_output=True, **LOGPROBS
    ),
    "stop string, hidden": recording("smollm2", "🥹 END two", stop=["END"], **LOGPROBS),
    "stop string too early": recording(
        "smollm2", "END a END b", stop=["END"], min_tokens=4, **LOGPROBS
    ),
    "two choices": recording("smollm2", "one END two", "other END", n=2, stop=["END"], **LOGPROBS),
    "special tokens": recording("smollm2", "a<|im_start|>b", skip_special_tokens=False),
    **{
        f"calls of {name}": recording(name, said.output, **TOOLS, **LOGPROBS)
        for name, said in MODEL_OUTPUTS.items()
    },
    **{
        f"truncated calls of {name}": recording(name, said.output[:-9], reason=LENGTH, **TOOLS)
        for name, said in MODEL_OUTPUTS.items()
    },
    "two choices with calls": recording(
        "qwen3", MODEL_OUTPUTS["qwen3"].output, "No calls.", n=2, **TOOLS, **LOGPROBS
    ),
    "reasoning and a stop string": recording(
        "qwen3", "<think>\nHm END.\n</think>\n\nYes END no", stop=["END"], **LOGPROBS
    ),
    "reasoning": recording("qwen3", f"<think>\nHm {MULTI_TOKEN}.\n</think>\n\nYes, {MULTI_TOKEN}."),
    "reasoning after an answer": recording(
        "harmony",
        "<|channel|>final<|message|>A 🫠<|end|><|start|>assistant"
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes",
    ),
    "plain": Recording("smollm2", [f"{MULTI_TOKEN} END"], LENGTH, {"logprobs": 2}, plain=True),
    "plain, stopped, echoed": Recording(
        "smollm2",
        [f"{MULTI_TOKEN} END of it", "🫠"],
        LENGTH,
        {"n": 2, "stop": ["END"], "echo": True},
        plain=True,
    ),
}


def mergings(steps: Sequence[Step], seed: str) -> Iterator[list[generator_pb2.GenerateResponse]]:
    """The steps as messages: all ways if there are few, else the extremes and a random sample.

    The first way is one message per step.
    """
    joints = len(steps) - 1
    if len(steps) <= EXHAUSTIVE_STEPS:
        cuts = [[bool(way >> joint & 1) for joint in range(joints)] for way in range(2**joints)]
    else:
        draw = random.Random(seed)
        cuts = [
            [False] * joints,
            [place % 2 == 0 for place in range(joints)],
            [place == 0 for place in range(joints)],
            [place == joints - 1 for place in range(joints)],
        ]
        for sample in range(SAMPLES):
            share = (sample + 1) / (SAMPLES + 1)
            cuts.append([draw.random() < share for _ in range(joints)])
    for way in [[True] * joints, *cuts]:
        messages: list[Step] = [[]]
        for step, cut in zip(steps, [*way, False], strict=True):
            messages[-1] = messages[-1] + [_copy(one) for one in step]
            if cut:
                messages.append([])
        yield [message_of(*updates) for updates in messages]


def _copy(original: generator_pb2.SequenceUpdate) -> generator_pb2.SequenceUpdate:
    copied = generator_pb2.SequenceUpdate()
    copied.CopyFrom(original)
    return copied


async def answered(stage: Stage, recorded: Recording) -> list[Any]:
    """All events of the stream."""
    if not recorded.plain:
        return await stage.stream(**recorded.fields)
    shared = {name: recorded.fields[name] for name in ("n", "stop") if name in recorded.fields}
    own = {name: value for name, value in recorded.fields.items() if name not in shared}
    request = completion_pb2.CreateCompletionRequest(
        model="tiny", prompts=prompts("It is"), options=options(**shared), **own
    )
    return [event async for event in stage.completions.StreamCompletion(request)]


def joined(events: Sequence[Any]) -> dict[Any, Any]:
    """All that a stream says, by choice, however it was split; without the random call ids."""
    whole: dict[Any, Any] = {}
    for event in events:
        if event.HasField("usage"):
            whole["usage"] = str(event.usage)
        if not event.HasField("delta"):
            continue
        delta = event.delta
        choice = whole.setdefault(
            delta.index, {"content": "", "reasoning": "", "calls": [], "logprobs": [], "ends": []}
        )
        choice["completion_tokens"] = delta.completion_tokens
        choice["logprobs"] += map(str, delta.logprobs)
        if delta.finish_reason:
            choice["ends"].append((delta.finish_reason, delta.matched_stop))
        if isinstance(delta, completion_pb2.CompletionDelta):
            choice["content"] += delta.text
            continue
        choice["content"] += delta.content
        choice["reasoning"] += delta.reasoning_content
        for piece in delta.tool_calls:
            if piece.HasField("id"):
                choice["calls"].append([piece.index, piece.name, ""])
            assert choice["calls"][-1][0] == piece.index
            choice["calls"][-1][2] += piece.arguments
    return whole


def shown(events: Sequence[Any], plain: bool) -> dict[Any, Any]:
    """All that the facade makes of it, by choice."""
    body: dict[str, Any] = {"model": "tiny", "stream": True, "logprobs": 2 if plain else True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    chunks: Any
    if plain:
        chunks = CompletionChunks(parse(TextCompletionRequest, {**body, "prompt": "It is"}))
    else:
        said = [{"role": "user", "content": "Hello"}]
        chunks = ChatChunks(parse(ChatCompletionRequest, {**body, "messages": said}))
    whole: dict[Any, Any] = {}
    for chunk in (chunk for event in events for chunk in chunks.push(event)):
        whole["usage"] = chunk["usage"]
        for part in chunk["choices"]:
            choice = whole.setdefault(part["index"], {"logprobs": [], "ends": [], "roles": []})
            delta = {"content": part["text"]} if plain else part["delta"]
            _add(choice, delta)
            choice["ends"] += [part["finish_reason"]] if part["finish_reason"] else []
            if part["logprobs"]:
                lists = part["logprobs"]
                names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                columns = [lists[name] for name in names] if plain else [lists["content"]]
                choice["logprobs"] += zip(*columns, strict=True)
    assert chunks.complete
    return whole


def _add(choice: dict[str, Any], delta: dict[str, Any]) -> None:
    """Appends the pieces of a delta to those before."""
    choice["roles"] += [delta["role"]] if "role" in delta else []
    for name in ("content", "reasoning_content"):
        choice[name] = choice.get(name, "") + (delta.get(name) or "")
    for piece in delta.get("tool_calls", ()):
        function = piece["function"]
        if "id" in piece:
            choice.setdefault("calls", []).append([piece["index"], function["name"], ""])
        assert choice["calls"][-1][0] == piece["index"]
        choice["calls"][-1][2] += function["arguments"]


@pytest.fixture
async def recorded(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[Stage, Recording]]:
    """A stage with the recording's model."""
    one = RECORDINGS[request.param]
    said = MODEL_OUTPUTS[one.family]
    folder = write_model(tmp_path / "tiny", said.template, said.tokenizer, context_length=4096)
    model = load_model(folder)
    async with running(model, folder) as stage:
        yield stage, one


@pytest.mark.parametrize("recorded", RECORDINGS, indirect=True)
async def test_merging_tokens_changes_no_answer(recorded: tuple[Stage, Recording]) -> None:
    """Text, reasoning, calls, log-probabilities, usage and finish reasons are the same; each update
    is at most one event, however many tokens it has."""
    stage, one = recorded
    expected = None
    steps = one.steps(stage)
    for messages in mergings(steps, "".join(one.texts)):
        stage.generator.script = says(messages)
        events = await answered(stage, one)
        found = joined(events), shown(events, one.plain)
        expected = expected or found

        assert expected == found
        # In addition there are the header and the usage, and each choice's echo and end.
        updates = sum(len(message.updates) for message in messages)
        assert len(events) <= updates + 2 + 2 * len(one.texts)
    assert expected is not None
    for choice in (expected[0][index] for index in range(len(one.texts))):
        assert 1 == len(choice["ends"])
        assert choice["completion_tokens"] > 0
        assert bool(choice["logprobs"]) == ("logprobs" in one.fields and bool(choice["content"]))
