"""`trivium usage`: sums usage records by key, model and day."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn, TextIO

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from trivium.usage_log import EVENT

REFUSED = 2
_WIDEST = 1000
PATTERN = "*.usage.jsonl*"  # also matches rotated files
_NUMBER = re.compile(r"\.usage\.jsonl\.(\d+)")  # of a rotated file
_STANDARD_INPUT = Path("-")
_IS_DAY_OR_MONTH = re.compile(r"(\d{4}-\d{2}(-\d{2})?)?")
_IS_RECORD = re.compile(rf'"event":\s*"{EVENT}"')
_NOT_TEXT = "\ufffd"  # replaces undecodable bytes, as in a file with another compression


class Format(StrEnum):
    """How the sums are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


class By(StrEnum):
    """What to sum by."""

    DAY = "day"
    KEY = "key"
    MODEL = "model"


@dataclass
class Totals:
    """Sums of records; `failed` counts requests with a status other than 200."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    device_nanoseconds: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record's usage; `requests` and `failed` are counted elsewhere."""
        for field in fields(self)[2:]:
            value = getattr(self, field.name) + (record[field.name] or 0)
            setattr(self, field.name, value)


class UsageFileError(Exception):
    """A file cannot be read, or a folder contains none."""


class _InvalidRecord(Exception):
    """A line looks like a usage record but is not one."""


def usage(
    files: Annotated[
        list[Path],
        typer.Argument(
            help=f"Files of usage records (also .gz), or folders with {PATTERN}; - is standard "
            "input."
        ),
    ],
    by: Annotated[
        str, typer.Option(help="Comma-separated columns to group by: day, key, model.")
    ] = ("day,key,model"),
    day: Annotated[str, typer.Option(help="Only this day (2026-11-30) or month (2026-11).")] = "",
    format: Annotated[Format, typer.Option(help="Output format.")] = Format.TABLE,
) -> None:
    """Sums usage records: requests, tokens and device time, exact to the nanosecond."""
    try:
        columns = [By(name) for name in by.split(",")]
    except ValueError:
        columns = []
    if not columns or len(set(columns)) < len(columns):
        _refuse(f"--by: expected any of day, key, model, separated by commas; got {by}")
    if not _is_day_or_month(day):
        _refuse(f"--day: expected a day such as 2026-11-30, or a month such as 2026-11; got {day}")
    skipped: list[str] = []
    try:
        records = (r for r in read_records(files, skipped) if r["time"].startswith(day))
        sums = sum_up(records, columns)
    except UsageFileError as error:
        _refuse(str(error))
    if skipped:
        message = f"skipped {len(skipped)} invalid lines, the first: {skipped[0]}"
        typer.echo(f"trivium usage: {message}", err=True)
    rows = [
        {
            **dict(zip(columns, group, strict=True)),
            **asdict(totals),
            "gpu_seconds": totals.device_nanoseconds / 1e9,
        }
        for group, totals in sorted(sums.items())
    ]
    if format is Format.TABLE:
        _print_table(rows, columns)
    elif format is Format.JSON:
        typer.echo(json.dumps(rows, indent=2))
    else:
        names = [*columns, *asdict(Totals()), "gpu_seconds"]
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"trivium usage: {message}", err=True)
    raise typer.Exit(REFUSED)


def _is_day_or_month(text: str) -> bool:
    if not _IS_DAY_OR_MONTH.fullmatch(text):
        return False
    try:
        date.fromisoformat(f"{text or '2026-11'}-01"[:10])
    except ValueError:
        return False
    return True


def read_records(paths: Iterable[Path], skipped: list[str]) -> Iterator[dict[str, Any]]:
    """The usage records in these files; raises UsageFileError.

    Log lines are ignored, as they may have been collected together with standard output. So is a
    last line without a newline, which is still being written. Other invalid lines, such as those
    that a full disk has cut off, are listed in `skipped` with the reason.
    """
    for file, binary in _files(paths):
        try:
            with binary, _text(file, binary) as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        record = _record(line)
                    except _InvalidRecord as fault:
                        if line.endswith("\n"):
                            skipped.append(f"{file}: line {number}: {fault}")
                    else:
                        if record is not None:
                            yield record
        except OSError as error:
            raise UsageFileError(f"{file}: {error.strerror or error}") from None
        except (EOFError, zlib.error) as error:
            raise UsageFileError(f"{file}: {error}") from None


def _files(paths: Iterable[Path]) -> Iterator[tuple[Path, BinaryIO]]:
    """Each file once, opened, however often it is named, and although it may be rotated meanwhile.

    Rotation renames files to higher numbers. So they are opened by number, and one that is opened
    again under its new name is known by its inode; what has left the end of the list is found by
    listing the folder again, until nothing is new.
    """
    seen: set[tuple[int, int]] = set()
    for path in paths:
        if not path.is_dir():
            if (binary := _opened(path, seen)) is not None:
                yield path, binary
        elif not any(path.glob(PATTERN)):
            raise UsageFileError(f"{path}: no {PATTERN} in this folder")
        else:
            count = -1
            while count < len(seen):
                is_first, count = count < 0, len(seen)
                for file in sorted(path.glob(PATTERN), key=_age):
                    if file.suffix == ".gz" and not is_first:
                        continue  # it may be one that was read before it was compressed
                    if (binary := _opened(file, seen, is_listed=True)) is not None:
                        yield file, binary


def _age(file: Path) -> tuple[str, int]:
    match = _NUMBER.search(file.name)
    return file.name.partition(".usage.jsonl")[0], int(match[1]) if match else 0


def _opened(file: Path, seen: set[tuple[int, int]], is_listed: bool = False) -> BinaryIO | None:
    """The file, unless it is one of those `seen`, to which it is added, or was renamed since it was
    listed. Raises UsageFileError."""
    try:
        # Standard input is not closed, since it may be named twice.
        is_input = file == _STANDARD_INPUT
        binary = open(0 if is_input else file, "rb", closefd=not is_input)  # noqa: SIM115 - the caller reads it
    except OSError as error:
        if is_listed and isinstance(error, FileNotFoundError):
            return None
        raise UsageFileError(f"{file}: {error.strerror or error}") from None
    status = os.fstat(binary.fileno())
    if (status.st_dev, status.st_ino) in seen:
        binary.close()
        return None
    seen.add((status.st_dev, status.st_ino))
    return binary


def _text(file: Path, binary: BinaryIO) -> TextIO:
    unpacked = gzip.GzipFile(fileobj=binary) if file.suffix == ".gz" else binary
    return io.TextIOWrapper(unpacked, encoding="utf-8", errors="replace")


def _record(line: str) -> dict[str, Any] | None:
    """Parses a line; None for a log line. Raises _InvalidRecord for an invalid record."""
    if not (line.startswith("{") or _IS_RECORD.search(line) or _NOT_TEXT in line):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        raise _InvalidRecord("not JSON") from None
    if not isinstance(record, dict) or record.get("event") != EVENT:
        return None
    required: dict[str, Any] = {
        "time": str,
        "request_id": str,
        "key": str,
        "model": str,
        "service": str,
    }
    required |= {"status": int, **{field.name: int | None for field in fields(Totals)[2:]}}
    for name, kind in required.items():
        if name not in record or not isinstance(record[name], kind):
            raise _InvalidRecord(f"{name} is missing or invalid")
    return record


def sum_up(records: Iterable[dict[str, Any]], by: Iterable[By]) -> dict[tuple[str, ...], Totals]:
    """Totals grouped by `by`. Each request id counts as one request.

    If both facade and generator have a record, the facade's gives the status, which is what the
    client got, and the generator's the group.
    """
    columns = list(by)
    totals: dict[tuple[str, ...], Totals] = {}
    groups: dict[str, tuple[str, ...]] = {}
    statuses: dict[str, int] = {}
    for record in records:
        group = tuple(_value(record, column) for column in columns)
        request, is_facade = record["request_id"], record["service"] == "rest_facade"
        totals.setdefault(group, Totals()).add(record)
        if not is_facade or request not in groups:
            groups[request] = group
        if is_facade or record["status"] != 200 or request not in statuses:
            statuses[request] = record["status"]
    for request, group in groups.items():
        totals[group].requests += 1
        totals[group].failed += statuses[request] != 200
    # A group may hold nothing but the facade's records of requests that count in another group.
    return {group: sums for group, sums in totals.items() if sums != Totals()}


def _value(record: dict[str, Any], column: By) -> str:
    if column is By.DAY:
        return str(record["time"])[:10]
    return str(record[column.value])


_COUNTS = [field.name for field in fields(Totals) if field.name != "device_nanoseconds"]


def _print_table(rows: list[dict[str, Any]], columns: list[By]) -> None:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column.value)
    for name in (*_COUNTS, "gpu_seconds"):
        table.add_column(name.removesuffix("_tokens"), justify="right")
    for row in rows:
        cells = [row[column] or "-" for column in columns]
        cells += [f"{row[name]:,}" for name in _COUNTS]
        table.add_row(*cells, f"{row['gpu_seconds']:,.3f}")
    # As wide as needed: truncated names and numbers would be useless.
    Console(width=_WIDEST).print(table)
