"""Server-sent events in pieces."""

from trivium.cli.sse import SseDecoder

STREAM = (
    'data: {"a": "é"}\n\n: keep-alive\n\nevent: x\r\ndata: one\r\ndata:two\r\n\r\ndata: [DONE]\n\n'
)
EVENTS = ['{"a": "é"}', "one\ntwo", "[DONE]"]


def test_any_split_gives_the_same_events() -> None:
    """Where the network cuts the stream makes no difference."""
    raw = STREAM.encode()
    for cut in range(len(raw) + 1):
        decoder = SseDecoder()
        events = decoder.push(raw[:cut]) + decoder.push(raw[cut:]) + decoder.flush()

        assert EVENTS == events


def test_flush_gives_an_unterminated_event() -> None:
    """A stream that is cut off still shows its last line."""
    decoder = SseDecoder()

    assert [] == decoder.push(b"data: half")
    assert ["half"] == decoder.flush()
