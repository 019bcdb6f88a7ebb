"""The log has a line per call, with all that is known about it."""

import json
import logging

import pytest

from trivium.wire import telemetry

TRACE = "a" * 32


@pytest.fixture
def restored():
    """Restores the tests' own logging afterwards."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def logged(capsys, format, **headers):
    """The log line of a call with these headers."""
    telemetry.configure_logging("stage", "info", format)
    telemetry.adopt(headers.items())
    text = "GET /x 200\nin 1 s"
    logging.getLogger("any").info(text, extra={"fields": {"status": 200}})
    return capsys.readouterr().err


def test_lines_are_json_with_request_and_trace(restored, capsys):
    """Every line has both ids, and the fields for queries."""
    headers = {"x-request-id": "req-7", "traceparent": f"00-{TRACE}-{'b' * 16}-01"}
    line = json.loads(logged(capsys, "json", **headers))

    assert line.pop("time").endswith("Z")
    assert {
        "level": "info",
        "service": "stage",
        "request_id": "req-7",
        "trace_id": TRACE,
        "message": "GET /x 200\nin 1 s",
        "status": 200,
    } == line


def test_without_a_trace_the_id_is_a_dash(restored, capsys):
    """The key is present all the same."""
    assert "-" == json.loads(logged(capsys, "json"))["trace_id"]


def test_text_is_one_line(restored, capsys):
    """The line is escaped; unknown ids are left out."""
    line = logged(capsys, "text", **{"x-request-id": "req-7"})

    assert line.endswith("INFO    stage: GET /x 200\\nin 1 s request_id=req-7\n")


def test_text_cannot_be_forged(restored, capsys):
    """Nothing that a caller sends, such as a path, ends or overwrites a line."""
    telemetry.configure_logging("stage", "info", "text")
    for character, escaped in (("\r", "\\r"), ("\x1b", "\\x1b"), ("\x85", "\\x85"), ("é", "é")):
        logging.getLogger("any").info("GET /%s[2K 200", character)
        assert f"stage: GET /{escaped}[2K 200" in capsys.readouterr().err
