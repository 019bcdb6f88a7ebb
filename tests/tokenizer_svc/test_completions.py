"""CompletionService with a scripted generator."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.completion_requests import options
from tests.tokenizer_svc.conftest import CONTEXT_LENGTH, Stage, running, user, write_model
from tests.tokenizer_svc.sample_tokenizers import byte_fallback
from tests.tokenizer_svc.scripted_generator import (
    Script,
    Stops,
    code_of,
    finish,
    message_of,
    update,
)
from tokenizer_svc.models import load_model
from tokenizer_svc.request.types import Conversation, Message, Role
from trivium.chat.v1 import chat_pb2, completion_pb2
from trivium.generator.v1 import generator_pb2
from trivium.wire.errors import ServiceError

LENGTH = generator_pb2.FINISH_REASON_LENGTH
STOP_TOKEN = generator_pb2.FINISH_REASON_STOP_TOKEN
STOPPED = generator_pb2.FINISH_REASON_STOPPED


def prompts(*given: str | Sequence[int]) -> list[completion_pb2.Prompt]:
    return [
        completion_pb2.Prompt(text=one)
        if isinstance(one, str)
        else completion_pb2.Prompt(token_ids=completion_pb2.TokenIds(ids=one))
        for one in given
    ]


def request(*given: str | Sequence[int], **fields: Any) -> completion_pb2.CreateCompletionRequest:
    return completion_pb2.CreateCompletionRequest(model="tiny", prompts=prompts(*given), **fields)


def continues(stage: Stage, text: str = " and so on", scored: bool = False) -> Script:
    """Each choice is its number and the text, until it ends or is stopped."""

    async def script(
        start: generator_pb2.StartGeneration, stops: Stops
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        entry = [generator_pb2.TokenLogprobs(logprob=-1.0)] if scored else []
        for index in range(start.n):
            token_ids = stage.encode(f"{index}{text}")
            for token_id in token_ids:
                yield message_of(update(index, [token_id], entry))
            yield message_of(finish(index, LENGTH, len(token_ids), nanoseconds=10, cached=1))

    return script


async def events(stage: Stage, asked: Any) -> list[completion_pb2.StreamCompletionResponse]:
    return [event async for event in stage.completions.StreamCompletion(asked)]


async def test_a_prompt_is_continued(stage: Stage) -> None:
    """The stream has a header, deltas and usage; the id has the prefix of plain completions."""
    stage.generator.script = continues(stage)
    seen = await events(stage, request("Once upon"))
    header, usage = seen[0].header, seen[-1].usage
    start = stage.generator.calls[0].start

    assert (37, "cmpl-") == (len(header.id), header.id[:5])
    assert "0 and so on" == "".join(event.delta.text for event in seen)
    assert stage.encode("Once upon") == list(start.prompt_token_ids)
    assert (16, 1) == (start.max_new_tokens, start.n)
    assert len(start.prompt_token_ids) == usage.prompt_tokens == header.prompt_tokens
    assert len(stage.encode("0 and so on")) == usage.completion_tokens


async def test_prompts_and_choices(stage: Stage) -> None:
    """Choice i of prompt p is number p * n + i; usage covers all of them."""
    stage.generator.script = continues(stage)
    asked = request("one", [70, 71], "three", options=options(n=2, max_completion_tokens=9))
    answer = await stage.completions.CreateCompletion(asked)
    sent = {tuple(call.start.prompt_token_ids) for call in stage.generator.calls}

    assert list(range(6)) == [choice.index for choice in answer.choices]
    assert [f"{i % 2} and so on" for i in range(6)] == [choice.text for choice in answer.choices]
    assert {tuple(stage.encode("one")), (70, 71), tuple(stage.encode("three"))} == sent
    assert sum(map(len, sent)) == answer.usage.prompt_tokens == answer.header.prompt_tokens
    assert (60, 3) == (answer.usage.device_nanoseconds, answer.usage.cached_prompt_tokens)
    assert {9} == {call.start.max_new_tokens for call in stage.generator.calls}


async def test_prompts_may_contain_control_tokens(stage: Stage) -> None:
    """Control tokens in a prompt that the caller rendered are encoded as control tokens."""
    stage.generator.script = continues(stage)
    text = "<|im_start|>user\nHi<|im_end|>\n"
    await stage.completions.CreateCompletion(request(text, add_special_tokens=False))
    [call] = stage.generator.calls
    sent = list(call.start.prompt_token_ids)

    assert [1, *stage.encode("user\nHi"), 2, *stage.encode("\n")] == sent


async def test_an_echo_comes_first(stage: Stage) -> None:
    """Every choice begins with its prompt, whether that was text or tokens."""
    stage.generator.script = continues(stage)
    asked = request("Say: ", stage.encode("Tokens: "), echo=True, options=options(n=2))
    answer = await stage.completions.CreateCompletion(asked)
    streamed: dict[int, str] = {}
    for event in await events(stage, asked):
        if event.HasField("delta"):
            streamed[event.delta.index] = streamed.get(event.delta.index, "") + event.delta.text
    expected = [f"{prompt}{i} and so on" for prompt in ("Say: ", "Tokens: ") for i in range(2)]

    assert expected == [choice.text for choice in answer.choices]
    assert expected == [streamed[index] for index in range(4)]


async def test_an_echo_has_logprobs(stage: Stage) -> None:
    """Log-probabilities cover the prompt's tokens, of which the first has none, and then the
    answer's, each with the offset of its text."""
    text = "<|im_start|>Say 🫠: "
    token_ids = [1, *stage.encode("Say 🫠: ")]
    answers = continues(stage, "!", scored=True)

    async def script(
        start: generator_pb2.StartGeneration, stops: Stops
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        entries = [
            generator_pb2.TokenLogprobs(logprob=-place) for place in range(1, len(token_ids))
        ]
        async for message in answers(start, stops):
            message.prompt_logprobs.extend(entries)
            entries = []
            yield message

    stage.generator.script = script
    asked = request(text, token_ids, echo=True, logprobs=1, add_special_tokens=False)
    asked.options.n = 2
    answer = await stage.completions.CreateCompletion(asked)

    assert {1} == {call.start.prompt_logprobs for call in stage.generator.calls}
    for choice in answer.choices:
        first, *others = choice.logprobs
        scored = [entry.token.logprob for entry in others]
        places = [entry.text_offset for entry in choice.logprobs]
        text_bytes = b"".join(entry.token.bytes for entry in others)
        assert f"{text}{choice.index % 2}!" == choice.text
        assert (False, 0) == (first.HasField("token"), first.text_offset)
        assert [-float(place) for place in range(1, len(token_ids))] == scored[: -len("0!")]
        assert choice.text.encode() == b"<|im_start|>" + text_bytes
        assert (sorted(places), len("<|im_start|>")) == (places, places[1])
        assert [len(text), len(text) + 1] == places[-2:]


async def test_prompt_logprobs_have_the_prompts_tokens(stage: Stage) -> None:
    """With prompt_logprobs the first choice of each prompt, and a chat, has the prompt's token and
    the most likely others at each position but the first, each once, with their ranks. An echo
    beside them keeps its own number of alternatives."""

    async def script(
        start: generator_pb2.StartGeneration, stops: Stops
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        message = message_of(*(finish(index, LENGTH, 0) for index in range(start.n)))
        for token_id in start.prompt_token_ids[1:]:
            message.prompt_logprobs.add(
                logprob=-token_id, top_token_ids=[71, 3], top_logprobs=[-1.0, -2.0], rank=9
            )
        yield message

    def shown(positions: Any) -> list[list[tuple[int, float, int]]]:
        return [
            [(token.token_id, token.logprob, token.rank) for token in position.tokens]
            for position in positions
        ]

    stage.generator.script = script
    asked = request([70, 71, 72], [70], echo=True, logprobs=1)
    asked.options.CopyFrom(options(n=2, prompt_logprobs=2, max_completion_tokens=0))
    answer = await stage.completions.CreateCompletion(asked)
    first, second, third, _ = answer.choices
    chat = await stage.chat.CreateChatCompletion(stage.request(prompt_logprobs=0))
    *_, call = stage.generator.calls

    assert {2} == {each.start.prompt_logprobs for each in stage.generator.calls[:-1]}
    assert [[], [(71, -1.0, 1), (3, -2.0, 2)], [(72, -72.0, 9), (71, -1.0, 1), (3, -2.0, 2)]] == (
        shown(first.prompt_logprobs)
    )
    assert ([], [[]]) == (shown(second.prompt_logprobs), shown(third.prompt_logprobs))
    assert [1, 1] == [len(entry.token.top_logprobs) for entry in first.logprobs[1:]]
    assert stage.model.tokenizer.decode([72]) == first.prompt_logprobs[2].tokens[0].token
    assert 0 == call.start.prompt_logprobs
    assert [[], *([(token, float(-token), 9)] for token in call.start.prompt_token_ids[1:])] == (
        shown(chat.prompt_logprobs)
    )


async def test_prompt_logprobs_are_not_streamed(stage: Stage) -> None:
    """A stream has no place for them, so they are refused there."""
    stage.generator.script = continues(stage)
    for call in (
        stage.completions.StreamCompletion(request("x", options=options(prompt_logprobs=0))),
        stage.chat.StreamChatCompletion(stage.request(prompt_logprobs=0)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()

        assert ("invalid_parameter_combination", "prompt_logprobs") == code_of(refused.value)


async def test_a_completion_keeps_its_first_space(tmp_path: Path) -> None:
    """SentencePiece puts a space before every text: after a prompt, and where a chat's last message
    is continued, it separates the two."""
    folder = write_model(tmp_path / "tiny", tokenizer=byte_fallback(), eos_token="</s>")
    score = generator_pb2.TokenLogprobs(logprob=-1.0)
    async with running(load_model(folder), folder) as stage:

        async def script(
            start: generator_pb2.StartGeneration, stops: Stops
        ) -> AsyncIterator[generator_pb2.GenerateResponse]:
            token_ids = stage.encode("0 b")
            others = [score] * (len(start.prompt_token_ids) - 1)
            yield generator_pb2.GenerateResponse(
                updates=[update(0, token_ids, [score] * len(token_ids))], prompt_logprobs=others
            )
            yield message_of(finish(0, LENGTH, len(token_ids)))

        stage.generator.script = script
        ids = stage.model.tokenizer.encode("a c", add_special_tokens=True)
        asked = request("a c", ids, echo=True, logprobs=0)
        answer = await stage.completions.CreateCompletion(asked)
        last = chat_pb2.ChatMessage(
            role=chat_pb2.ROLE_ASSISTANT, content=[chat_pb2.ContentPart(text="a c")]
        )
        chats = [
            await stage.chat.CreateChatCompletion(stage.request(**more))
            for more in ({}, {"messages": [user("Hi"), last], "continue_final_message": True})
        ]

    assert ["a c 0 b", "<s> a c 0 b"] == [choice.text for choice in answer.choices]
    for choice in answer.choices:
        offsets = [entry.text_offset for entry in choice.logprobs]
        ends = [*offsets[1:], len(choice.text)]
        texts = [choice.text[start:end] for start, end in zip(offsets, ends, strict=True)]
        tokens = [entry.token.token for entry in choice.logprobs[1:]]
        assert tokens[-4:] == texts[-4:] == [" ", "0", " ", "b"]
        assert (tokens[1], texts[2]) == ("a", "a")
    assert ["0 b", " 0 b"] == [chat.choices[0].content for chat in chats]


async def test_logprobs_have_text_offsets(stage: Stage) -> None:
    """Each token has the offset at which its text begins."""
    stage.generator.script = continues(stage, " é\U0001fae0!", scored=True)
    answer = await stage.completions.CreateCompletion(request("x", logprobs=2))
    [choice] = answer.choices
    places = [entry.text_offset for entry in choice.logprobs]
    encoded = b"".join(entry.token.bytes for entry in choice.logprobs)

    assert 2 == stage.generator.calls[0].start.top_logprobs
    assert choice.text.encode() == encoded
    assert sorted(places) == places
    assert 0 == places[0]
    assert len(choice.text) - 1 == places[-1]


async def test_stop_strings_may_be_kept(stage: Stage) -> None:
    """Stop strings end a choice, and are part of its text if include_stop_str_in_output is set."""
    stage.generator.script = continues(stage)
    for keep, expected in ((False, "0 and "), (True, "0 and so")):
        asked = request("x", options=options(stop=["so"], include_stop_str_in_output=keep))
        [choice] = (await stage.completions.CreateCompletion(asked)).choices

        assert (expected, "so") == (choice.text, choice.matched_stop)


@pytest.mark.parametrize("scored", [False, True])
async def test_a_stop_token_may_be_kept(stage: Stage, scored: bool) -> None:
    """A stop token that the caller named is kept on request, with its log-probability; the model's
    own stop tokens never are."""

    async def script(
        start: generator_pb2.StartGeneration, stops: Stops
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        end = 71 if start.stop_token_ids else 2
        scores = [generator_pb2.TokenLogprobs(logprob=-1.0)] * (2 if scored else 0)
        yield message_of(update(0, [70, end], scores), finish(0, STOP_TOKEN, 2))

    stage.generator.script = script
    a, b = (stage.model.tokenizer.decode([token_id]) for token_id in (70, 71))
    for ids, keep, expected in (([71], False, a), ([71], True, a + b), ([], True, a)):
        asked = options(stop_token_ids=ids, include_stop_str_in_output=keep)
        wanted = {"logprobs": 1} if scored else {}
        answer = await stage.completions.CreateCompletion(request("x", options=asked, **wanted))
        [choice] = answer.choices

        assert (expected, 2) == (choice.text, answer.usage.completion_tokens)
        assert len(expected) * scored == len(choice.logprobs)


async def test_token_ids_may_be_returned(stage: Stage) -> None:
    """With return_token_ids callers get the tokens of each prompt, and all that count of each
    choice, however it ended; otherwise none."""

    async def script(
        start: generator_pb2.StartGeneration, stops: Stops
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        yield message_of(update(0, [*stage.encode("a"), 1]), update(1, stage.encode("bXc")))
        yield message_of(update(0, [2]), finish(0, STOP_TOKEN, 3))
        yield message_of(finish(1, STOPPED, 3))

    stage.generator.script = script
    asked = options(n=2, stop=["X"], return_token_ids=True)
    wanted = [[*stage.encode("a"), 1, 2], stage.encode("bX")]
    answer = await stage.completions.CreateCompletion(request([70, 71], "x", options=asked))
    seen = await events(stage, request([70, 71], "x", options=asked))
    streamed: dict[int, list[int]] = {}
    for event in seen[1:-1]:
        streamed.setdefault(event.delta.index, []).extend(event.delta.token_ids)
    chat = await stage.chat.CreateChatCompletion(
        stage.request(n=2, stop=["X"], return_token_ids=True)
    )
    plain = await stage.completions.CreateCompletion(request("x", options=options(n=2)))

    for header in (answer.header, seen[0].header):
        assert [[70, 71], stage.encode("x")] == [list(prompt.ids) for prompt in header.prompts]
    assert wanted * 2 == [list(choice.token_ids) for choice in answer.choices]
    assert wanted * 2 == [streamed[index] for index in range(4)]
    assert sum(map(len, wanted)) * 2 == answer.usage.completion_tokens
    assert wanted == [list(choice.token_ids) for choice in chat.choices]
    [prompt] = chat.header.prompts
    assert list(stage.generator.calls[-2].start.prompt_token_ids) == list(prompt.ids)
    assert ([], []) == (list(plain.header.prompts), list(plain.choices[0].token_ids))


async def test_prompts_may_be_truncated(stage: Stage) -> None:
    """With truncate_prompt_tokens a prompt keeps its last tokens, which are what counts and what an
    echo shows; a shorter one stays whole. -1 keeps what the context has beside the answer."""
    stage.generator.script = continues(stage)

    async def sent(*given: str | Sequence[int], **fields: Any) -> list[list[int]]:
        """The prompts that reach the generator, in their order."""
        asked = options(return_token_ids=True, **fields)
        answer = await stage.completions.CreateCompletion(request(*given, options=asked))
        prompts = [list(prompt.ids) for prompt in answer.header.prompts]
        calls = stage.generator.calls[-len(given) :]
        assert sorted(prompts) == sorted(list(call.start.prompt_token_ids) for call in calls)
        assert sum(map(len, prompts)) == answer.usage.prompt_tokens
        return prompts

    long = list(range(70, 80)) * 100
    assert [[78, 79], stage.encode("x")] == await sent(long, "x", truncate_prompt_tokens=2)
    assert [stage.encode("x y")[-2:]] == await sent("x y", truncate_prompt_tokens=2)
    for fields, rest in (({"max_completion_tokens": 56}, 56), ({}, 16), ({"min_tokens": 20}, 20)):
        text = "ab" * 5000
        [kept] = await sent(text, truncate_prompt_tokens=-1, **fields)
        assert stage.encode(text)[rest - CONTEXT_LENGTH :] == kept
    for prompt in ("Say: yes", stage.encode("Say: yes")):
        asked = request(prompt, echo=True, options=options(truncate_prompt_tokens=3))
        [choice] = (await stage.completions.CreateCompletion(asked)).choices
        expected = stage.model.tokenizer.decode(stage.encode("Say: yes")[-3:])
        assert f"{expected}0 and so on" == choice.text


async def test_conversations_may_be_truncated(stage: Stage) -> None:
    """truncate_prompt_tokens keeps the end of a conversation, with the opening of the answer."""
    stage.generator.script = continues(stage)
    long = [user("word " * 2000)]
    rendered = stage.model.prompts.build(Conversation((Message(Role.USER, ("word " * 2000,)),)))
    for kept, expected in ((7, 7), (-1, CONTEXT_LENGTH - 1), (CONTEXT_LENGTH - 1,) * 2):
        await stage.chat.CreateChatCompletion(
            stage.request(messages=long, truncate_prompt_tokens=kept)
        )
        sent = list(stage.generator.calls[-1].start.prompt_token_ids)

        assert rendered.token_ids[-expected:] == sent


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"truncate_prompt_tokens": 0}, "invalid_value", "truncate_prompt_tokens"),
        (
            {"truncate_prompt_tokens": -2},
            "integer_below_min_value",
            "truncate_prompt_tokens",
        ),
        (
            {"truncate_prompt_tokens": -1, "max_completion_tokens": CONTEXT_LENGTH},
            "invalid_value",
            "truncate_prompt_tokens",
        ),
        ({"truncate_prompt_tokens": CONTEXT_LENGTH}, "context_length_exceeded", "prompt"),
    ],
)
async def test_refused_truncation(
    stage: Stage, fields: dict[str, Any], code: str, param: str
) -> None:
    """What keeps nothing of a prompt, or more than the context, is refused."""
    asked = request([70] * 1000, options=options(**fields))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.completions.CreateCompletion(asked)

    assert (code, param) == code_of(refused.value)


async def test_control_tokens_may_be_shown(stage: Stage) -> None:
    """Control tokens are left out unless the caller asks for them; all tokens have logprobs."""

    async def script(
        start: generator_pb2.StartGeneration, stops: Stops
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        scores = [generator_pb2.TokenLogprobs(logprob=-1.0)] * 4
        yield message_of(update(0, [70, 1, 71, 1], scores), finish(0, LENGTH, 4))

    stage.generator.script = script
    a, b = (stage.model.tokenizer.decode([token_id]) for token_id in (70, 71))
    tokens = [a, "<|im_start|>", b, "<|im_start|>"]
    for skip, expected in ((True, a + b), (False, "".join(tokens))):
        asked = request("x", logprobs=1, options=options(skip_special_tokens=skip))
        [choice] = (await stage.completions.CreateCompletion(asked)).choices

        assert expected == choice.text
        assert tokens == [entry.token.token for entry in choice.logprobs]


async def test_options_reach_the_generator(stage: Stage) -> None:
    """Sampling, stop conditions and the constraint are sent with every prompt."""
    stage.generator.script = continues(stage)
    given = options(
        temperature=0.5,
        stop_token_ids=[7, 9],
        structured_outputs={"regex": "[a-z]+"},
        min_tokens=20,
    )
    await stage.completions.CreateCompletion(request("x", "y", options=given))

    for call in stage.generator.calls:
        assert 0.5 == call.start.sampling.temperature
        assert [7, 9] == list(call.start.stop_token_ids)
        assert "[a-z]+" == call.start.constraint.regex
        assert (20, 20) == (call.start.min_new_tokens, call.start.max_new_tokens)
    assert 2 == len(stage.generator.calls)


async def test_bad_words_reach_the_generator_as_tokens(stage: Stage) -> None:
    """With and without a space, each once; control tokens may be spelled out, as in a prompt."""
    stage.generator.script = continues(stage)
    given = options(bad_words=["Hello", " Hello", "<|im_start|>"])
    await stage.completions.CreateCompletion(request("x", "y", options=given))
    await stage.chat.CreateChatCompletion(stage.request(bad_words=["  Hello"]))
    encode = stage.model.tokenizer.encode
    hello = [encode("Hello"), encode(" Hello")]
    control = [encode(text, parse_special=True) for text in ("<|im_start|>", " <|im_start|>")]
    sent = [[list(word.token_ids) for word in c.start.bad_words] for c in stage.generator.calls]

    assert [[*hello, *control]] * 2 + [hello] == sent
    assert hello[0] != hello[1]
    assert [1] == control[0]


async def test_an_error_of_one_prompt_cancels_the_others(stage: Stage) -> None:
    """If one prompt fails, the others are cancelled and the caller gets the error."""
    fault = ServiceError("queue_full", "full", retry_after=3)
    began = asyncio.Event()

    async def script(
        start: generator_pb2.StartGeneration, stops: Stops
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        if list(start.prompt_token_ids) == [70]:
            yield message_of(update(0, [70]))
            began.set()
            await stops.get()
        await began.wait()
        raise fault

    stage.generator.script = script
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stage.completions.CreateCompletion(request([70], [71]))
    [other] = [c for c in stage.generator.calls if list(c.start.prompt_token_ids) == [70]]
    await other.cancelled.wait()

    assert ("queue_full", None) == code_of(refused.value)


async def test_a_disconnected_caller_cancels_all_generations(stage: Stage) -> None:
    """All of them are cancelled, whichever was being read."""

    async def script(
        start: generator_pb2.StartGeneration, stops: Stops
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        yield message_of(update(0, [70]))
        await stops.get()

    stage.generator.script = script
    call = stage.completions.StreamCompletion(request("x", "y"))
    deltas = 0
    while deltas < 2:
        deltas += (await call.read()).HasField("delta")
    call.cancel()
    for seen in stage.generator.calls:
        await seen.cancelled.wait()

    assert 2 == len(stage.generator.calls)
