"""Streams are parsed after they have ended, from their bytes and arrival times."""

import pytest

from bench.load_client import LoadClient, to_answer
from bench.play import Request, Script
from tests.cli.openai_script import ScriptedServer
from trivium.cli.answer import AnswerFailed
from trivium.cli.http_stream import Unchunker, read_answer
from trivium.cli.load import Target

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKENS = ('{"choices":[{"index":0,"delta":{"content":"a"}}]}',) * 2


def _chunked(*events: str) -> bytes:
    data = [f"data: {event}\n\n".encode() for event in events]
    return b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in data) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_event_times_do_not_depend_on_how_a_stream_is_split(size: int) -> None:
    """For pieces of any size, an event's time is the arrival of its last byte."""
    events = (*TOKENS, '{"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}')
    usage = '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"gpu_seconds":0.5}}'
    whole = HEAD + _chunked(*events, usage, "[DONE]")
    pieces = [(float(at + 1), whole[at : at + size]) for at in range(0, len(whole), size)]
    answer = read_answer(0.0, pieces)

    assert ("aa", 2, "length") == (answer.text, answer.completion_tokens, answer.finish_reason)
    assert (3, 0.5) == (answer.usage["prompt_tokens"], answer.usage["gpu_seconds"])
    assert 2 == len(answer.parts[0])
    assert answer.ended == pieces[-1][0]


def test_chunks_may_be_split_anywhere() -> None:
    """Chunk sizes, line ends and data may each be split in two."""
    body = b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n"

    for at in range(len(body)):
        unchunker = Unchunker()
        assert b"hello world" == unchunker.push(body[:at]) + unchunker.push(body[at:])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'HTTP/1.1 503 No\r\nContent-Length: 30\r\n\r\n{"error": {"message": "full"}}', "full"),
        (b"", "closed the connection"),
        (HEAD + _chunked(*TOKENS), "without \\[DONE\\]"),
        (HEAD + _chunked("no JSON"), "JSONDecodeError"),
        (HEAD + _chunked('{"error": {"message": "too late"}}'), "too late"),
    ],
)
def test_stream_errors_are_reported(data: bytes, why: str) -> None:
    """A refusal, a closed connection, a broken stream; the benchmark records it as a fault."""
    with pytest.raises(AnswerFailed, match=why) as caught:
        read_answer(0.0, [(1.0, data)])

    assert str(caught.value) == to_answer(0.0, [(1.0, data)]).fault


def test_choices_are_kept_separate() -> None:
    """Some servers send usage per choice. A choice without text arrives when it ends."""
    ends = [
        f'{{"choices":[{{"index":{n},"delta":{{}},"finish_reason":"length"}}]}}' for n in (0, 1)
    ]
    usages = ['{"choices":[],"usage":{"completion_tokens":1}}'] * 2
    pieces = [(1.0, HEAD + _chunked(TOKENS[0], *ends, *usages, "[DONE]"))]
    answer = to_answer(0.0, pieces)

    assert 2 == answer.completion_tokens
    assert ((1.0,), (1.0,)) == answer.choices
    assert "a" == answer.text


def test_a_script_is_played_to_a_server(scripted: ScriptedServer) -> None:
    """Each client sends one request after another, the late one while the others stream."""
    first, second, late = (
        Request(({"role": "user", "content": name},), (), 5) for name in ("first", "second", "late")
    )
    script = Script(((first, first), (second,)), late, late_after=1)
    answers, _ = LoadClient().play(Target(f"{scripted.url}/v1", "scripted"), script)

    names = [body["messages"][0]["content"] for body in scripted.bodies]
    assert ["first", "first", "late", "second"] == sorted(names)
    assert [""] * 4 == [answer.fault for answer in answers]
    assert {(5, 5)} == {(len(each.choices[0]), each.completion_tokens) for each in answers}
    assert answers[0].ended <= answers[1].sent_at


def test_unreachable_server_is_a_failure(unused_tcp_port: int) -> None:
    """Each request to it fails, and the reason is recorded."""
    request = Request(({"role": "user", "content": "hello"},), (), 5)
    target = Target(f"http://127.0.0.1:{unused_tcp_port}/v1", "none")
    answers, _ = LoadClient().play(target, Script(((request, request),)))

    assert ["the server closed the connection without a response"] * 2 == [
        answer.fault for answer in answers
    ]
