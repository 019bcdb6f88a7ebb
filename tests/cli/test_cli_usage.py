"""`trivium usage`: records are summed, whichever service wrote them."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trivium.cli.main import app
from trivium.cli.usage import read_records
from trivium.usage_log import UsageLog, UsageRecord

DAY = 86_400
FRIDAY = 20_000 * DAY  # 2024-10-04


def record(request_id: str, key: str = "alice", **fields: Any) -> UsageRecord:
    """A generator's record of a request, by default a successful one."""
    values = {
        "service": "generator_svc",
        "trace_id": "",
        "model": "m",
        "status": 200,
        "finish_reason": "stop",
        "duration_seconds": 1.5,
        "time": FRIDAY,
        **fields,
    }
    return UsageRecord(request_id=request_id, key=key, **values)


def refusal(request_id: str, status: int, **fields: Any) -> UsageRecord:
    """A facade's record of a request that failed."""
    return record(request_id, service="rest_facade", status=status, **fields)


def write(folder: Path, *records: UsageRecord, name: str = "one") -> Path:
    log = UsageLog(str(folder), name, 2**20, 1)
    for one in records:
        log.write(one)
    log.close()
    return folder / f"{name}.usage.jsonl"


def summed(*arguments: object) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["usage", *map(str, arguments), "--format", "json"])
    assert 0 == result.exit_code, result.output
    assert "" == result.stderr
    rows: list[dict[str, Any]] = json.loads(result.output)
    return rows


def test_sums_by_day_key_and_model(tmp_path: Path) -> None:
    """Each combination is a row; nanoseconds are exact where a float would not be."""
    took = {"prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 3, "reasoning_tokens": 2}
    file = write(
        tmp_path,
        record("a", device_nanoseconds=2**60 + 1, **took),
        record("b", device_nanoseconds=1, **took),
        record("c", key="bob", **took),
        record("d", model="other", **took),
        record("e", time=FRIDAY + DAY, **took),
    )
    rows = summed(file)

    assert [
        ("2024-10-04", "alice", "m", 2),
        ("2024-10-04", "alice", "other", 1),
        ("2024-10-04", "bob", "m", 1),
        ("2024-10-05", "alice", "m", 1),
    ] == [(row["day"], row["key"], row["model"], row["requests"]) for row in rows]
    assert 2**60 + 2 == rows[0]["device_nanoseconds"]
    tokens = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
    assert (20, 8, 6, 4) == tuple(rows[0][name] for name in tokens)


def test_several_records_of_a_request_count_once(tmp_path: Path) -> None:
    """One per prompt, or the facade's beside the generator's: the status that the client got
    counts, and nothing is counted twice."""
    file = write(
        tmp_path,
        record("two", completion_tokens=1),
        record("two", completion_tokens=2),
        refusal("late", 504, model="alias"),
        record("late", status=499, reasoning_tokens=None, completion_tokens=4),
        refusal("full", 429),
    )
    [row] = summed(file, "--by", "key")

    assert (3, 2, 7) == (row["requests"], row["failed"], row["completion_tokens"])
    assert ["m"] == [row["model"] for row in summed(file, "--by", "model")]


def test_folders_rotated_files_and_one_day(tmp_path: Path) -> None:
    """A folder means all usage files in it; of a file being written, complete lines count."""
    write(tmp_path, record("a"))
    (tmp_path / "one.usage.jsonl").rename(tmp_path / "one.usage.jsonl.1")
    write(tmp_path, record("b"), record("late", time=FRIDAY + 31 * DAY))
    file = write(tmp_path, record("c"), name="two")
    with file.open("a") as end:
        end.write('{"event": "usage", "time": "20')

    assert [4] == [row["requests"] for row in summed(tmp_path, "--by", "model")]
    assert [3] == [r["requests"] for r in summed(tmp_path, "--by", "key", "--day", "2024-10")]


def test_other_log_lines_are_skipped(tmp_path: Path) -> None:
    """Standard output may be collected together with the logs."""
    file = write(tmp_path, record("a"))
    file.write_text('{"time": "x", "level": "info"}\nnot JSON\n' + file.read_text())

    assert [1] == [row["requests"] for row in summed(file)]


@pytest.mark.parametrize("names", [["-"], ["-", "-"]], ids=len)
def test_records_may_come_from_a_pipe(tmp_path: Path, names: list[str]) -> None:
    """As from `docker compose logs`, among the lines of the log; once, however often named."""
    lines = '{"level": "info"}\n' + write(tmp_path, record("a"), record("b")).read_text()
    command = [sys.executable, "-m", "trivium.cli", "usage", *names, "--format", "json"]
    output = subprocess.run(command, input=lines, text=True, stdout=subprocess.PIPE, check=True)

    assert [2] == [row["requests"] for row in json.loads(output.stdout)]


def test_csv_and_table(tmp_path: Path) -> None:
    """The same numbers, for a spreadsheet and for people."""
    file = write(tmp_path, record("a", device_nanoseconds=1_234_567_891, completion_tokens=5_000))
    [row] = csv.DictReader(
        CliRunner().invoke(app, ["usage", str(file), "--format", "csv"]).output.splitlines()
    )
    table = CliRunner().invoke(app, ["usage", str(file)], env={"COLUMNS": "150"}).output

    assert ("1234567891", "5000") == (row["device_nanoseconds"], row["completion_tokens"])
    assert "1.235" in table
    assert "5,000" in table


def test_no_cell_of_the_table_is_cut_off(tmp_path: Path) -> None:
    """However long names and numbers are, and wherever it is printed."""
    model = "deepseek-r1-distill-llama-8b-int4-for-everyone"
    file = write(tmp_path, record("a", model=model, prompt_tokens=10**12))
    table = CliRunner().invoke(app, ["usage", str(file)]).output

    assert {"day", "requests", "gpu_seconds", model, "1,000,000,000,000"} <= set(table.split())


def test_a_file_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    """Also through its folder or by another path."""
    file = write(tmp_path, record("a", completion_tokens=3))
    [row] = summed(tmp_path, file, tmp_path / ".." / tmp_path.name, file)

    assert 3 == row["completion_tokens"]


def test_files_that_are_rotated_while_they_are_read_count_once(tmp_path: Path) -> None:
    """Neither the one that has a new name by then, nor one whose name was not listed before."""
    file = write(tmp_path, record("old"))
    file.rename(f"{file}.1")
    write(tmp_path, record("current"))
    reading = read_records([tmp_path], [])
    found = [next(reading)["request_id"]]
    Path(f"{file}.1").rename(f"{file}.2")
    file.rename(f"{file}.1")
    write(tmp_path, record("new"))
    found += [one["request_id"] for one in reading]

    assert ["current", "new", "old"] == sorted(found)


def test_a_file_that_is_compressed_after_it_was_read_counts_once(tmp_path: Path) -> None:
    """As when logrotate runs meanwhile."""
    file = write(tmp_path, record("a"))
    reading = read_records([tmp_path], [])
    found = [next(reading)["request_id"]]
    (tmp_path / "one.usage.jsonl.1.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    found += [one["request_id"] for one in reading]

    assert ["a"] == found


def test_rotated_files_may_be_compressed(tmp_path: Path) -> None:
    """As logrotate leaves them, given by name or in a folder."""
    file = write(tmp_path, record("a"))
    packed = tmp_path / "one.usage.jsonl.1.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    write(tmp_path, record("b"))

    assert [1] == [row["requests"] for row in summed(packed, "--by", "key")]
    assert [2] == [row["requests"] for row in summed(tmp_path, "--by", "key")]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"ev', "not JSON"),
        (b'{"event": "usage", "time": "20', "not JSON"),
        (b'rest_facade-1 | {"event": "usage"}', "not JSON"),
        (
            b'{"event": "usage", "time": "2024-10-04T00:00:00.000Z"}',
            "request_id is missing or invalid",
        ),
        (b"\x28\xb5\x2f\xfd zstd", "not JSON"),
    ],
)
def test_invalid_records_are_reported_and_skipped(tmp_path: Path, line: bytes, fault: str) -> None:
    """The message says how many lines were skipped, and where the first one is."""
    file = write(tmp_path, record("a"))
    with file.open("ab") as end:
        end.write(line + b"\n" + line + b"\n")
    write(tmp_path, record("b"))
    result = CliRunner().invoke(app, ["usage", str(file), "--format", "json", "--by", "key"])

    assert 0 == result.exit_code
    assert [2] == [row["requests"] for row in json.loads(result.stdout)]
    message = f"skipped 2 invalid lines, the first: {file}: line 2: {fault}"
    assert message in result.stderr
    assert 1 == len(result.stderr.splitlines())


@pytest.mark.parametrize(
    "content", [b"plain text\n", gzip.compress(b"records")[:-9]], ids=["text", "cut off"]
)
def test_broken_gzip_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """It is not gzip at all, or its end is missing."""
    file = tmp_path / "one.usage.jsonl.2.gz"
    file.write_bytes(content)
    result = CliRunner().invoke(app, ["usage", str(tmp_path)])

    assert 2 == result.exit_code
    assert result.stderr.startswith(f"trivium usage: {file}: ")


def test_missing_file_or_empty_folder_is_refused(tmp_path: Path) -> None:
    """A file that does not exist, and a folder without usage files."""
    absent = CliRunner().invoke(app, ["usage", str(tmp_path / "absent")])
    empty = CliRunner().invoke(app, ["usage", str(tmp_path)])

    assert (2, 2) == (absent.exit_code, empty.exit_code)
    assert "absent: No such file" in absent.stderr
    assert f"trivium usage: {tmp_path}: no *.usage.jsonl* in this folder" in empty.stderr


@pytest.mark.parametrize("columns", ["colour", "key,key", "", "key,"])
def test_invalid_columns_are_refused(tmp_path: Path, columns: str) -> None:
    """Unknown, empty and repeated ones."""
    result = CliRunner().invoke(app, ["usage", str(write(tmp_path)), "--by", columns])

    assert 2 == result.exit_code
    assert "--by: expected any of day, key, model" in result.stderr


@pytest.mark.parametrize("day", ["2026-1", "2026-13", "2026-13-99", "2026-02-29", "today"])
def test_invalid_days_are_refused(tmp_path: Path, day: str) -> None:
    """They do not exist, or could mean several months."""
    result = CliRunner().invoke(app, ["usage", str(write(tmp_path)), "--day", day])

    assert 2 == result.exit_code
    assert "--day: expected a day such as 2026-11-30, or a month" in result.stderr
