"""Where usage records go."""

import json
from pathlib import Path

import pytest

from trivium.usage_log import UsageLog, UsageRecord


def record(number: int) -> UsageRecord:
    return UsageRecord("s", f"req_{number}", "", "", "m", 200, "stop", 1.0, time=number)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["request_id"] for line in path.read_text().splitlines()]


def test_a_file_that_grows_too_large_is_rotated(tmp_path: Path) -> None:
    """The folder is made; the newest records are in the file without a number, and no record is in
    two or none."""
    log = UsageLog(str(tmp_path / "new"), "name", 1000, 9)
    for number in range(10):
        log.write(record(number))
    log.close()
    files = sorted((tmp_path / "new").iterdir(), reverse=True)

    assert len(files) > 1
    assert [f"req_{number}" for number in range(10)] == [one for file in files for one in ids(file)]
    assert "name.usage.jsonl" == files[-1].name


def test_records_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """A dash is standard output, one line each, at once; the time is in UTC."""
    log = UsageLog("-", "name", 1, 1)
    log.write(record(1_700_000_000))
    [line] = capsys.readouterr().out.splitlines()
    log.close()

    assert "2023-11-14T22:13:20.000Z" == json.loads(line)["time"]


def test_without_a_target_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Records are asked for."""
    UsageLog(None, "name", 1, 1).write(record(1))

    assert ("", "") == capsys.readouterr()
