"""Constraints, tools, plain completions and tokens through all three services, on a tiny model.

The weights are random, so correct output shows that the constraint allowed nothing else.
"""

import json
import re
from typing import Any

import grpc
import httpx
import openai
import pytest
from jsonschema import Draft202012Validator

from tests.completion_requests import options
from tests.pipeline.services import Services
from trivium.chat.v1 import completion_pb2, completion_pb2_grpc

MESSAGES: list[Any] = [{"role": "user", "content": "Once upon a time in a village"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "note", "parameters": SCHEMA, "strict": True}}
OTHER = {"type": "function", "function": {"name": "rest"}}
COMBINATION = "invalid_parameter_combination"
NAMED = {"type": "function", "function": {"name": "note"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}


def ask(client: openai.OpenAI, services: Services, **fields: Any) -> Any:
    given = {"model": services.model, "messages": MESSAGES, "seed": 7, "max_tokens": 400}
    return client.chat.completions.create(**{**given, **fields})


def check(text: str) -> None:
    Draft202012Validator(SCHEMA).validate(json.loads(text))


def test_a_schema_is_enforced(client: openai.OpenAI, services: Services) -> None:
    """Every choice of a sampled answer fits the schema; a stream has the same text."""
    whole = ask(client, services, response_format=FORMAT, n=4)
    texts = {choice.index: "" for choice in whole.choices}
    for chunk in ask(client, services, response_format=FORMAT, n=4, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""

    for choice in whole.choices:
        assert "stop" == choice.finish_reason
        check(choice.message.content)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_a_truncated_call_can_be_sent_back(client: openai.OpenAI, services: Services) -> None:
    """The history may contain any answer, and arguments that are not an object."""
    text = {"type": "string", "minLength": 200}
    schema = {"type": "object", "properties": {"text": text}, "required": ["text"]}
    tool = {"type": "function", "function": {"name": "note", "parameters": schema}}
    answer = ask(client, services, tools=[tool], tool_choice=NAMED, max_tokens=64)
    [call] = answer.choices[0].message.tool_calls
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.function.arguments)
    for arguments in (call.function.arguments, "", "null", "[1]", "7", "no JSON"):
        function = {"name": "note", "arguments": arguments}
        called = {"id": call.id, "type": "function", "function": function}
        messages = [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "content": "invalid", "tool_call_id": call.id},
        ]

        assert ask(client, services, messages=messages, max_tokens=2).usage.prompt_tokens > 8


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}-[0-9]+x"}}, "[ab]{3}-[0-9]+x"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"grammar": 'start: "<" /[a-z]{1,9}/ ">"'}}, "<[a-z]{1,9}>"),
        ({"guided_regex": "yes|no"}, "yes|no"),
        ({"regex": r"\d{9}[\d]{9}"}, "[0-9]{18}"),
        ({"ebnf": 'root ::= "<" name ">"\nname ::= [a-z]{1,9}'}, "<[a-z]{1,9}>"),
        ({"guided_grammar": 'root ::= [0-9]{3} | "x"'}, "[0-9]{3}|x"),
        ({"json_schema": {"enum": [1, 2]}}, "1|2"),
    ],
)
def test_constraints_are_enforced(
    client: openai.OpenAI, services: Services, fields: dict[str, Any], pattern: str
) -> None:
    """With regular expressions, choices and grammars the whole answer matches."""
    answer = ask(client, services, extra_body=fields, n=3)

    assert all(re.fullmatch(pattern, choice.message.content) for choice in answer.choices)


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls(client: openai.OpenAI, services: Services, choice: Any) -> None:
    """A forced call names a tool and fits its schema, streaming or not."""
    fields = {"tools": [TOOL, OTHER], "tool_choice": choice, "parallel_tool_calls": False}
    whole = ask(client, services, **fields).choices[0]
    chunks = list(ask(client, services, stream=True, **fields))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    made = whole.message.tool_calls[0].function

    assert ("stop" if choice == NAMED else "tool_calls", None, 1) == (
        whole.finish_reason,
        whole.message.content,
        len(whole.message.tool_calls),
    )
    assert [whole.finish_reason] == [
        chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason
    ]
    assert made.name in (["note"] if choice == NAMED else ["note", "rest"])
    if made.name == "note":
        check(made.arguments)
    assert "".join(call.function.arguments for call in calls) == made.arguments
    assert [(made.name, "function")] == [
        (call.function.name, call.type) for call in calls if call.id
    ]


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools(client: openai.OpenAI, services: Services, mode: str) -> None:
    """Only tools that the choice lists are called, with `auto` not always; the prompt is the one
    without such a choice, so that its cached prefix is reused."""
    tools = [{"type": "function", "function": {"name": "rest"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
    # With a format, an answer that is not a call is short, and begins about as often.
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"const": "x"}}}
    fields = {"tools": [TOOL, OTHER], "response_format": schema, "n": 16, "temperature": 2}
    free = ask(client, services, **fields)
    restricted = ask(client, services, tool_choice=choice, **fields)
    chunks = list(ask(client, services, tool_choice=choice, stream=True, **fields))
    messages = [made.message for made in restricted.choices]
    called = [call.function.name for made in messages for call in made.tool_calls or ()]
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    usages = [free.usage, restricted.usage]

    assert {"note", "rest"} == {
        call.function.name for made in free.choices for call in made.message.tool_calls or ()
    }
    assert {"rest"} == set(called)
    assert called == [piece.function.name for piece in pieces if piece.id]
    assert {None} | ({'"x"'} if mode == "auto" else set()) == {made.content for made in messages}
    assert usages[0].prompt_tokens == usages[1].prompt_tokens


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_truncated_forced_call_is_never_content(
    client: openai.OpenAI, services: Services, choice: Any
) -> None:
    """At any length it has no content, and the name once that is complete, streaming or not."""
    fields = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    [complete] = ask(client, services, **fields).choices[0].message.tool_calls
    told = []
    for tokens in range(1, 60, 3):
        [answer] = ask(client, services, max_tokens=tokens, **fields).choices
        chunks = list(ask(client, services, max_tokens=tokens, stream=True, **fields))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        pieces = [piece.function for delta in deltas for piece in delta.tool_calls or ()]
        calls = [call.function for call in answer.message.tool_calls or ()]
        told.append("".join(call.arguments for call in calls))

        assert not answer.message.content
        assert "" == "".join(delta.content or "" for delta in deltas)
        assert ["note"] * len(calls) == [piece.name for piece in pieces if piece.name]
        assert told[-1] == "".join(piece.arguments or "" for piece in pieces)
        assert complete.function.arguments.startswith(told[-1])
        assert answer.finish_reason == "length" or told[-1] == complete.function.arguments
    assert "" == told[0] != told[-1]


# pydantic's schema of a set, zod's of a record, an OpenAPI document's of a choice, and worse.
LOOSE = {
    "type": "object",
    "properties": {
        "tags": {
            "type": "array",
            "items": {"enum": ["a", "b"]},
            "uniqueItems": True,
            "maxItems": 2,
        },
        "sizes": {
            "type": "object",
            "propertyNames": {"enum": ["s", "m"]},
            "additionalProperties": {"type": "boolean"},
            "maxProperties": 2,
        },
        "file": {"type": "string", "format": "binary", "maxLength": 4},
        "price": {"type": "string", "pattern": "^(?!^[-+.]*$)[+-]?0*\\d{1,3}$", "maxLength": 9},
        "either": {"oneOf": [{"type": "integer", "maximum": 99, "minimum": 0}, {"const": 7}]},
        "other": {"$ref": "#/components/schemas/Other", "type": "boolean"},
    },
    "additionalProperties": False,
    "required": ["tags", "file", "price", "either"],
    "not": {"required": ["secret"]},
    "if": {"required": ["sizes"]},
    "then": {"required": ["other"]},
    "dependentRequired": {"sizes": ["tags"]},
}


def keeps(arguments: dict[str, Any]) -> bool:
    """Whether arguments fit the part of LOOSE that can be enforced."""
    return (
        ["tags", "file", "price", "either"]
        == [name for name in arguments if name not in ("sizes", "other")]
        and {"a", "b"} >= set(arguments["tags"])
        and len(arguments["file"]) <= 4
        and re.fullmatch("[+-]?0*[0-9]{1,3}", arguments["price"]) is not None
        and arguments["either"] in range(100)
        and all(isinstance(size, bool) for size in arguments.get("sizes", {}).values())
    )


def loose(name: str, **more: Any) -> dict[str, Any]:
    """A tool whose schema cannot be enforced exactly."""
    return {"type": "function", "function": {"name": name, "parameters": LOOSE} | more}


def test_a_tool_schema_that_cannot_be_enforced_fails_no_request(
    client: openai.OpenAI, services: Services
) -> None:
    """The request works, and a call fits what can be enforced; a strict tool is refused."""
    tools = [TOOL, loose("one"), loose("two", strict=False)]
    ask(client, services, tools=tools, tool_choice="auto", max_tokens=8)
    named = {"type": "function", "function": {"name": "two"}}
    answer = ask(client, services, tools=tools, tool_choice=named, n=8, max_tokens=1500)
    # Names of sizes may have any length, and random weights may never end them.
    whole = [choice for choice in answer.choices if choice.finish_reason != "length"]
    made = [choice.message.tool_calls[0].function.arguments for choice in whole]

    assert len(made) > 1
    assert all(keeps(json.loads(arguments)) for arguments in made), made
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, services, tools=[TOOL, loose("one", strict=True)], tool_choice="auto")
    assert "tools[1].function.parameters" == refused.value.param
    assert "invalid_json_schema" == refused.value.code


def test_a_response_format_that_cannot_be_enforced(
    client: openai.OpenAI, services: Services
) -> None:
    """It is enforced as far as possible if it need not be exact, and else refused."""
    response_format = {"type": "json_schema", "json_schema": {"name": "s", "schema": LOOSE}}
    answer = ask(client, services, response_format=response_format, n=8, max_tokens=1500)
    whole = [choice for choice in answer.choices if choice.finish_reason != "length"]
    strict = {"name": "s", "schema": LOOSE, "strict": True}

    assert len(whole) > 1
    assert all(keeps(json.loads(choice.message.content)) for choice in whole)
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": strict}},
        {"extra_body": {"structured_outputs": {"json": LOOSE}}},
        {"extra_body": {"guided_json": LOOSE}},
    ):
        with pytest.raises(openai.BadRequestError, match="cannot be used"):
            ask(client, services, **fields)


def test_a_tool_without_parameters_gets_empty_arguments(
    client: openai.OpenAI, services: Services
) -> None:
    """However its parameters express that there are none, the arguments are empty."""
    for parameters in (
        {},
        {"parameters": None},
        {"parameters": {}},
        {"parameters": {"type": "object"}},
    ):
        tool = {"type": "function", "function": {"name": "rest", **parameters}}
        answer = ask(client, services, tools=[tool], tool_choice="required", n=3)
        for choice in answer.choices:
            assert {} == json.loads(choice.message.tool_calls[0].function.arguments)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": {"type": "nonsense"}},
                }
            },
            "invalid_json_schema",
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "s",
                        "schema": {"$ref": "https://example.com/schema"},
                        "strict": True,
                    },
                }
            },
            "invalid_json_schema",
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_object", "value": {"type": 5}}},
            "invalid_json_schema",
            "response_format.value",
        ),
        ({"guided_json": '{"type": 5}'}, "invalid_json_schema", "guided_json"),
        ({"guided_grammar": "start: ("}, "invalid_value", "guided_grammar"),
        ({"guided_grammar": "root ::= x"}, "invalid_value", "guided_grammar"),
        ({"ebnf": 'root ::= (= "a")'}, "invalid_value", "ebnf"),
        ({"regex": "("}, "invalid_value", "regex"),
        ({"regex": "a", "tools": [OTHER], "tool_choice": "required"}, COMBINATION, "regex"),
        ({"json_schema": '{"not": {}}'}, "invalid_json_schema", "json_schema"),
        ({"structured_outputs": {"regex": "("}}, "invalid_value", "structured_outputs.regex"),
        ({"stop_token_ids": [99999]}, "invalid_value", "stop_token_ids[0]"),
        ({"bad_words": ["a", " "]}, "invalid_value", "bad_words[1]"),
        ({"allowed_token_ids": [5, 99999]}, "invalid_value", "allowed_token_ids[1]"),
        (
            {"allowed_token_ids": [5], "structured_outputs": {"regex": "[0-9]+"}},
            COMBINATION,
            "allowed_token_ids",
        ),
        ({"chat_template_kwargs": {"x": 1}}, "unsupported_parameter", "chat_template_kwargs.x"),
    ],
)
def test_unsupported_constraints_are_refused(
    services: Services, fields: dict[str, Any], code: str, param: str
) -> None:
    """They are a 400 that names the field, never an answer without the constraint."""
    body = {"model": services.model, "messages": MESSAGES, **fields}
    reply = httpx.post(f"{services.url}/v1/chat/completions", json=body, timeout=60)
    error = reply.json()["error"]

    assert (400, code) == (reply.status_code, error["code"])
    assert error["param"].startswith(param)


def ids_of(services: Services, text: str) -> list[int]:
    """Token ids of a text."""
    body = {"model": services.model, "prompt": text, "add_special_tokens": False}
    reply = httpx.post(f"{services.url}/tokenize", json=body, timeout=60)
    return [*reply.json()["tokens"]]


def test_only_allowed_tokens_are_generated(client: openai.OpenAI, services: Services) -> None:
    """In chats and plain completions, streamed or not, whatever is more likely or has a bias."""
    allowed = {"extra_body": {"allowed_token_ids": ids_of(services, "xyz")}, "max_tokens": 12}
    [k] = ids_of(services, "k")
    chat = ask(client, services, **allowed, n=2, logprobs=True, top_logprobs=3)
    stream = ask(client, services, **allowed, stream=True)
    biased = ask(client, services, **allowed, logit_bias={str(k): 100}, temperature=0)
    plain = client.completions.create(model=services.model, prompt=["Once", "In"], **allowed)

    texts = [choice.message.content for choice in (*chat.choices, *biased.choices)]
    for text in (*texts, *(choice.text for choice in plain.choices)):
        assert re.fullmatch("[xyz]{12}", text)
    assert texts[0] == "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    places = chat.choices[0].logprobs.content
    assert {entry.token for place in places for entry in place.top_logprobs} - {*"xyz"}


def test_bad_words_are_not_generated(client: openai.OpenAI, services: Services) -> None:
    """In chats and plain completions, streamed or not; a word of several tokens as a whole only."""
    fields: dict[str, Any] = {
        "extra_body": {
            "allowed_token_ids": ids_of(services, "xyz"),
            "bad_words": ["x", "zyy", "yzy"],
        },
        "max_tokens": 100,
    }
    assert ids_of(services, "zyy") == [i for letter in "zyy" for i in ids_of(services, letter)]
    chat = ask(client, services, **fields, n=2)
    stream = ask(client, services, **fields, stream=True)
    plain = client.completions.create(model=services.model, prompt="Once", seed=3, **fields)

    texts = [choice.message.content for choice in chat.choices]
    for text in (*texts, plain.choices[0].text):
        assert 100 == len(text)
        assert {*"yz"} == {*text}
        assert "zyy" not in text
        assert "yzy" not in text
    assert texts[0] == "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_plain_completions(client: openai.OpenAI, services: Services) -> None:
    """Each prompt has n choices, in order; an echo begins with it; a stream has the same text."""
    fields: dict[str, Any] = {
        "model": services.model,
        "prompt": ["Once upon", "In a village"],
        "max_tokens": 12,
        "seed": 3,
        "n": 2,
    }
    whole = client.completions.create(**fields)
    echoed = client.completions.create(**fields, echo=True)
    texts = dict.fromkeys(range(4), "")
    body = {**fields, "stream": True}
    streamed = httpx.post(f"{services.url}/v1/completions", json=body, timeout=60)
    for line in streamed.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["text"]

    assert [0, 1, 2, 3] == [choice.index for choice in whole.choices]
    assert texts == {choice.index: choice.text for choice in whole.choices}
    for plain, echo in zip(whole.choices, echoed.choices, strict=True):
        assert fields["prompt"][plain.index // 2] + plain.text == echo.text


def test_echo_with_logprobs_scores_the_prompt(services: Services) -> None:
    """With echo and logprobs, each prompt token has the log-probability that it would have as the
    next token after those before it, which evaluation harnesses use to compare answers."""

    def post(path: str, **fields: Any) -> Any:
        body = {"model": services.model, **fields}
        return httpx.post(f"{services.url}{path}", json=body, timeout=60).json()

    text = "Once upon a time, \U0001fae0"
    token_ids = post("/tokenize", prompt=text)["tokens"]
    answer = post(
        "/v1/completions",
        prompt=[token_ids, token_ids],
        logprobs=2,
        echo=True,
        seed=1,
        max_tokens=1,
    )
    plain = post("/v1/completions", prompt=text, logprobs=2, seed=1, max_tokens=1)["choices"][0]
    expected = []
    for place, token_id in enumerate(token_ids[1:], start=1):
        forced = {"logit_bias": {str(token_id): 100}, "max_tokens": 1, "logprobs": 0}
        made = post("/v1/completions", prompt=token_ids[:place], **forced)["choices"][0]
        expected += made["logprobs"]["token_logprobs"]
    expected += plain["logprobs"]["token_logprobs"]

    for choice in answer["choices"]:
        found = choice["logprobs"]
        assert [None, pytest.approx(expected)] == [
            found["token_logprobs"][0],
            found["token_logprobs"][1:],
        ]
        assert text + plain["text"] == choice["text"]
        assert [0, len(text)] == [found["text_offset"][0], found["text_offset"][-1]]
        assert plain["logprobs"]["tokens"] == found["tokens"][-1:]

    fields = {"prompt": text, "logprobs": 2, "echo": True, "max_tokens": 0}
    scored = post("/v1/completions", **fields)
    body = {"model": services.model, "stream": True, **fields}
    lines = httpx.post(f"{services.url}/v1/completions", json=body, timeout=60).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]

    assert [text, "length"] == [scored["choices"][0][key] for key in ("text", "finish_reason")]
    assert 0 == scored["usage"]["completion_tokens"] < scored["usage"]["gpu_seconds"]
    assert scored["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected[:-1])
    assert text == "".join(chunk["text"] for chunk in chunks)
    assert [None, "length"] == [chunk["finish_reason"] for chunk in chunks]


def test_prompt_logprobs_have_ranks(services: Services) -> None:
    """At each position the prompt's token has its log-probability, as an echo shows it, and its
    rank: the most likely tokens have the first ones, and others come after them."""

    def post(path: str, **fields: Any) -> Any:
        body = {"model": services.model, "max_tokens": 1, **fields}
        return httpx.post(f"{services.url}{path}", json=body, timeout=60).json()

    chat = post("/v1/chat/completions", messages=MESSAGES, prompt_logprobs=20, n=2)
    token_ids = post("/tokenize", messages=MESSAGES)["tokens"]
    plain = post(
        "/v1/completions", prompt=token_ids, prompt_logprobs=20, n=2, echo=True, logprobs=1
    )["choices"]
    echoed = plain[0]["logprobs"]["token_logprobs"]
    found = chat["prompt_logprobs"]

    assert [found] * 2 == [choice["prompt_logprobs"] for choice in plain]
    assert [None, *map(str, token_ids[1:])] == [one and next(iter(one)) for one in found]
    assert echoed[:-1] == [one and next(iter(one.values()))["logprob"] for one in found]
    for position in found[1:]:
        ranked = sorted(position.values(), key=lambda token: token["rank"])
        logprobs = [token["logprob"] for token in ranked]
        assert sorted(logprobs, reverse=True) == logprobs
        assert list(range(1, 21)) == [token["rank"] for token in ranked][:20]
        assert len(ranked) <= 21
    assert any(len(position) == 21 for position in found[1:])


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 3, "max_tokens": 40},
        {"seed": 3, "max_tokens": 40, "stop": ["e", "a"]},
        {"max_tokens": 400, "tools": [TOOL, OTHER], "tool_choice": "required"},
        {"max_tokens": 400, "response_format": FORMAT},
    ],
)
def test_token_ids_are_returned(services: Services, fields: dict[str, Any]) -> None:
    """With return_token_ids answers have the prompt's tokens and all that were generated, whatever
    became of their text; those of a stream's chunks, joined, are the same."""

    def post(path: str, **fields: Any) -> httpx.Response:
        body = {"model": services.model, **fields}
        return httpx.post(f"{services.url}{path}", json=body, timeout=60)

    asked = {"messages": MESSAGES, "seed": 7, "return_token_ids": True, "n": 2, **fields}
    whole = post("/v1/chat/completions", **asked).json()
    prompt = post(
        "/tokenize", messages=MESSAGES, **({"tools": fields["tools"]} if "tools" in fields else {})
    ).json()["tokens"]
    lines = post("/v1/chat/completions", stream=True, **asked).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    streamed: list[list[int]] = [[], []]
    for chunk in chunks:
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice.get("token_ids", [])

    assert prompt == whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    found = [choice["token_ids"] for choice in whole["choices"]]
    assert found == streamed
    assert whole["usage"]["completion_tokens"] == sum(map(len, found))
    for choice in whole["choices"]:
        text = post("/detokenize", tokens=choice["token_ids"]).json()["prompt"]
        assert text.startswith(choice["message"]["content"] or "")


def test_plain_completions_over_grpc(client: openai.OpenAI, services: Services) -> None:
    """A gRPC caller gets the same text and counts as a REST caller."""
    answer = client.completions.create(model=services.model, prompt="Once", seed=3, max_tokens=9)
    request = completion_pb2.CreateCompletionRequest(
        model=services.model,
        prompts=[completion_pb2.Prompt(text="Once")],
        options=options(seed=3, max_completion_tokens=9),
    )
    with grpc.insecure_channel(services.chat_target) as channel:
        reply = completion_pb2_grpc.CompletionServiceStub(channel).CreateCompletion(request)

    assert answer.choices[0].text == reply.choices[0].text
    assert answer.usage.completion_tokens == reply.usage.completion_tokens
    assert answer.usage.prompt_tokens == reply.usage.prompt_tokens


@pytest.mark.parametrize("seed", range(6))
def test_logprobs_of_plain_completions(
    client: openai.OpenAI, services: Services, seed: int
) -> None:
    """Tokens are at their offsets, and the sampled token is among the top_logprobs."""
    answer = client.completions.create(
        model=services.model,
        prompt="Once",
        logprobs=2,
        seed=seed,
        max_tokens=40,
        extra_body={"ignore_eos": True},
    )
    choice = answer.choices[0]
    shown = choice.logprobs

    assert 40 == len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs)
    for token, value, top in zip(
        shown.tokens, shown.token_logprobs, shown.top_logprobs, strict=True
    ):
        assert top[token] == value
    for token, offset in zip(shown.tokens, shown.text_offset, strict=True):
        # Partial characters and control tokens have no text of their own.
        is_text = not token.startswith(("bytes:", "<|"))
        assert not is_text or choice.text[offset:].startswith(token)
    assert shown.text_offset == sorted(shown.text_offset)


def test_detokenize_inverts_tokenize(services: Services) -> None:
    """/detokenize inverts /tokenize, and a completion accepts the token ids."""
    text = "Once upon a time 🫠"

    def post(path: str, **body: Any) -> Any:
        return httpx.post(f"{services.url}{path}", json=body).raise_for_status().json()

    found = post("/tokenize", prompt=text, add_special_tokens=False)
    back = post("/detokenize", tokens=found["tokens"])
    fields = {"model": services.model, "seed": 1, "max_tokens": 5}
    chat = post("/tokenize", messages=MESSAGES)
    answer = post("/v1/chat/completions", messages=MESSAGES, **fields)
    completed = post("/v1/completions", prompt=chat["tokens"], **fields)

    assert (len(found["tokens"]), 2048) == (found["count"], found["max_model_len"])
    assert {"prompt": text} == back
    assert chat["count"] == answer["usage"]["prompt_tokens"]
    assert answer["choices"][0]["message"]["content"] == completed["choices"][0]["text"]
