"""How the benchmark reports its measurements; speed itself is never tested."""

import pytest

from bench.measures import percentiles, ratio, stalls, streaming
from bench.play import Answer, Request, Script, Trace
from bench.report import BEGIN, END, Results, Row, Spread, Table, as_json, notes, page, with_results


def _answer(*times: float, sent_at: float = 0.0) -> Answer:
    return Answer(sent_at, times[-1], (times,), 5, len(times))


def _rows(name: str, speeds: list[float]) -> list[Row]:
    return [
        Row("load", "8 clients", number, name, {"tokens_per_second": speed})
        for number, speed in enumerate(speeds)
    ]


def _results(*rows: Row) -> Results:
    return Results(rows, {"load": "A load"})


def test_percentiles_are_interpolated_and_in_milliseconds() -> None:
    """The p50 of an even number of values lies between the two in the middle."""
    found = percentiles("gap", [0.001, 0.002, 0.003, 0.004], with_max=True)

    assert {"gap_p50_ms": 2.5, "gap_p99_ms": 3.97, "gap_max_ms": 4.0} == pytest.approx(found)
    assert {} == percentiles("gap", [])


def test_ratio_needs_both_numbers() -> None:
    """There is no ratio to a number that was not measured or is zero."""
    assert {"half": 0.5} == ratio("half", {"a": 1.0, "b": 2.0}, "a", "b")
    assert {} == ratio("half", {"a": 1.0}, "a", "b")
    assert {} == ratio("half", {"a": 1.0, "b": 0.0}, "a", "b")


def test_failed_requests_lower_the_throughput() -> None:
    """A failed request adds its time and no tokens."""
    failed = Answer(0.0, 4.0, (), fault="gone")
    found = streaming([_answer(1.0, 1.5, 2.0), failed])

    assert 3 / 4 == found["tokens_per_second"]
    assert 1000 == found["ttft_p50_ms"]
    assert 500 == found["gap_p99_ms"]


def test_quiet_gaps_exclude_the_late_request() -> None:
    """A gap in which the late request arrived, or another stream began, is not a quiet one."""
    stream, other = _answer(0.1, 1.0, 1.1, 1.2, 2.2, 2.4, 2.5, 2.6), _answer(1.0, 3.0)
    found = stalls([stream, other], _answer(2.3, sent_at=1.3))

    assert 100 == pytest.approx(found["quiet_gap_max_ms"])
    assert 2000 == pytest.approx(found["busy_gap_max_ms"])
    assert 1000 == pytest.approx(found["busy_gap_p50_ms"])
    assert 1000 == pytest.approx(found["late_ttft_ms"])
    assert 1 == found["streams_outlasted"]


def test_a_replay_moves_tokens_to_its_own_steps() -> None:
    """A request is sent when the step before its first one ends; device time is not copied."""
    trace = Trace(Request((), (1, 2), 2), 7.0, 1, [[(8.0, 1, 11), (9.0, 3, 12)]], 0, 5)
    answer = trace.replayed([0.5, 1.5, 2.0, 4.0])

    assert (0.5, 4.0, ((1.5, 4.0),)) == (answer.sent_at, answer.ended, answer.choices)
    assert (1.0, (11, 12), None) == (answer.first, answer.token_ids, answer.device_seconds)


def test_answers_come_in_the_order_of_the_script() -> None:
    """Client by client, the late request last."""
    first, second, late = (Request((), (number,), 1) for number in range(3))
    clients, last = Script(((first, first), (second,)), late).numbered()

    assert [[(0, first), (1, first)], [(2, second)]] == clients
    assert (3, late) == last
    assert [first, first, second, late] == Script(((first, first), (second,)), late).requests


def test_ratios_are_computed_per_round() -> None:
    """A machine that is half as fast in one round changes no ratio."""
    results = _results(*_rows("bare", [100, 50, 80]), *_rows("services", [90, 45, 80]))
    services, bare = results.kinds("load")[::-1]

    assert Spread(0.9, 0.9, 1.0) == results.ratio_to(services, "bare")
    assert Spread(80, 45, 90) == results.spread(services, "tokens_per_second")
    assert results.ratio_to(bare, "bare") is None


def test_unpaired_round_gives_no_ratio() -> None:
    """Rounds are paired by number, not by position."""
    results = _results(*_rows("bare", [100])[:1], *_rows("services", [50, 70]))

    assert Spread(0.5, 0.5, 0.5) == results.ratio_to(results.kinds("load")[1], "bare")


def test_spread_shows_the_range_if_values_differ() -> None:
    """Each number has about three digits."""
    assert "1.50" == str(Spread(1.5, 1.5, 1.5))
    assert "12.3 (9.87 to 123)" == str(Spread(12.34, 9.87, 123.4))


def test_tables_are_markdown() -> None:
    """A heading, the header row, the separator and the rows."""
    table = Table("Speed", ("who", "tokens/s"), (("bare", "10"),))

    assert "### Speed\n\n| who | tokens/s |\n| --- | --- |\n| bare | 10 |" == table.markdown()
    assert "Speed\n\nwho   tokens/s\nbare  10" == table.text()


def test_page_names_commit_and_machine() -> None:
    """Commit and machine come first; columns without a number are left out."""
    results = _results(*_rows("bare", [100]), *_rows("services", [90]))
    shown = page(results, {"commit": "abc", "cores": 2})

    assert shown.startswith("Commit abc, cores 2.")
    assert "|  |  | tokens/s | of bare | services to it |" in shown
    assert "| 8 clients | services | 90.0 | 0.90 | - |" in shown
    assert "| 8 clients | bare | 100 | - | 0.90 |" in shown


def test_failures_and_noise_are_reported() -> None:
    """Failures are summed over the rounds; load from other processes is noted."""
    numbers = {"faults": 2.0, "others_percent": 30.0}
    row = Row("load", "8 clients", 0, "services", numbers, ("HTTP 503",))
    said = notes(_results(row, row))

    assert "services, load 8 clients: 4 requests failed (HTTP 503)" in said
    assert any("in 2 of 2 measurements other processes" in note for note in said)


def test_results_go_between_the_markers() -> None:
    """The rest of the page stays; a page without markers is refused."""
    assert f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n" == with_results(f"a\n{BEGIN}\nold\n{END}\nb\n", "new")
    with pytest.raises(ValueError, match="begin results"):
        with_results("a page", "new")


def test_the_json_has_rows_and_their_summary() -> None:
    """Each round's numbers, and their median, lowest and highest."""
    results = _results(*_rows("bare", [100, 50]), *_rows("services", [80, 45]))
    found = as_json(results, {"cores": 2})

    assert 4 == len(found["rows"])
    assert {"median": 0.85, "low": 0.8, "high": 0.9} == pytest.approx(
        found["summary"][1]["of_bare"]
    )
