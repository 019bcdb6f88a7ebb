"""Where usage records are written."""

import contextlib
import errno
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from trivium.usage_log import UsageLog, UsageRecord


def record(number: int) -> UsageRecord:
    return UsageRecord("s", f"req_{number}", "", "", "m", 200, "stop", 1.0, time=number)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["request_id"] for line in path.read_text().splitlines()]


@contextlib.contextmanager
def room_for(file_bytes: int) -> Iterator[None]:
    """As on a full disk, files cannot exceed this size; a line that would is cut off."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def whole_ids(path: Path) -> list[str]:
    """The request ids of complete lines."""
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line)["request_id"])
    return found


def test_a_file_that_grows_too_large_is_rotated(tmp_path: Path) -> None:
    """The newest records are in the unnumbered file, each record is in one, the folder is made."""
    log = UsageLog(str(tmp_path / "new"), "name", 1000, 9)
    for number in range(10):
        log.write(record(number))
    log.close()
    files = sorted((tmp_path / "new").glob("name.*"), reverse=True)

    assert len(files) > 1
    assert [f"req_{number}" for number in range(10)] == [one for file in files for one in ids(file)]
    assert "name.usage.jsonl" == files[-1].name


def test_records_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    """A dash means standard output, one line per record, unbuffered, with times in UTC."""
    log = UsageLog("-", "name", 1, 1)
    log.write(record(1_700_000_000))
    [line] = capfd.readouterr().out.splitlines()
    log.close()

    assert "2023-11-14T22:13:20.000Z" == json.loads(line)["time"]


def test_without_a_target_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Records are off by default."""
    UsageLog(None, "name", 1, 1).write(record(1))

    assert ("", "") == capsys.readouterr()


def test_a_full_disk_loses_only_the_records_written_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost records are counted, one log line reports them, and once there is room, writing
    continues on a new line; and so it does the next time."""
    registry, path = CollectorRegistry(), tmp_path / "name.usage.jsonl"
    log = UsageLog(str(tmp_path), "name", 10_000, 9, registry)
    log.write(record(0))
    for first in (1, 4):
        with room_for(path.stat().st_size + 100):
            log.write(record(first))
            log.write(record(first + 1))
        log.write(record(first + 2))
    log.close()

    assert ["req_0", "req_3", "req_6"] == whole_ids(path)
    assert 4 == registry.get_sample_value("trivium_usage_records_lost_total")
    told = f"usage records are being lost, cannot write to {path}: {os.strerror(errno.EFBIG)}"
    assert [("ERROR", told)] * 2 == [(line.levelname, line.message) for line in caplog.records]


@pytest.mark.parametrize("max_bytes", [10_000, 1])
def test_a_truncated_line_is_not_continued(tmp_path: Path, max_bytes: int) -> None:
    """A restarted process ends the cut line first, even if it then rotates the file."""
    (tmp_path / "name.usage.jsonl").write_text('{"event": "usage", "time": "20')
    log = UsageLog(str(tmp_path), "name", max_bytes, 9)
    for number in range(2):
        log.write(record(number))
    log.close()
    files = sorted(tmp_path.glob("name.*"), reverse=True)

    assert ["req_0", "req_1"] == [one for file in files for one in whole_ids(file)]
    assert [] == [file for file in files if not file.read_text().endswith("\n")]


def test_a_closed_standard_output_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the reader has gone, one log line says so, and the process continues."""
    reader, writer = os.pipe()
    os.close(reader)
    registry = CollectorRegistry()
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        log = UsageLog("-", "name", 1, 1, registry)
        log.write(record(1))
        log.write(record(2))
        log.close()

    assert [
        "usage records are being lost, cannot write to standard output: Broken pipe"
    ] == caplog.messages
    assert 2 == registry.get_sample_value("trivium_usage_records_lost_total")


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    """Another process is refused in the meantime; other names in the folder are independent."""
    log = UsageLog(str(tmp_path), "name", 1000, 9)
    UsageLog(str(tmp_path), "other", 1000, 9).close()
    with pytest.raises(OSError, match=r"/name\.usage\.jsonl is in use by another process"):
        UsageLog(str(tmp_path), "name", 1000, 9)
    log.close()
    UsageLog(str(tmp_path), "name", 1000, 9).close()
