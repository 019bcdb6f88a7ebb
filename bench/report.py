"""Turns measured rows into tables for a terminal or a page, and JSON. Pure except for `machine`.

A number is the median over the rounds, with the minimum and maximum. Ratios are taken within a
round, between measurements made one after another, since a machine's speed drifts; then their
median is taken.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.measures import CPU, PEAK, Numbers

BEGIN, END = "<!-- begin results -->", "<!-- end results -->"
REFERENCE, OURS = "bare", "services"
SPEED = "tokens_per_second"
NOTHING = "-"
NOISE_PERCENT = 5.0  # of the machine's CPU time: above this share for others, a note is added


@dataclass(frozen=True)
class Row:
    """One contender's numbers in one round of one scenario; `faults` are errors that occurred."""

    scenario: str
    case: str
    round: int
    contender: str
    numbers: Numbers
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of one number over all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def __str__(self) -> str:
        low, middle, high = (_shown(value) for value in (self.low, self.median, self.high))
        return middle if low == high else f"{middle} ({low} to {high})"


@dataclass(frozen=True)
class Table:
    """A table of formatted cells."""

    title: str
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """For a terminal, with aligned columns."""
        lines = [self.head, *self.body]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, "", *shown])

    def markdown(self) -> str:
        """For a Markdown page."""
        lines = [self.head, ("---",) * len(self.head), *self.body]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


@dataclass(frozen=True)
class Results:
    """All rows, and each scenario's heading."""

    rows: Sequence[Row]
    titles: dict[str, str]

    def spread(self, like: Row, number: str) -> Spread | None:
        """The spread of one number of one contender in one case."""
        found = (row.numbers.get(number) for row in self._rounds(like))
        return Spread.of([value for value in found if value is not None])

    def ratio(self, over: Row, under: Row, number: str = SPEED) -> Spread | None:
        """The ratio of two contenders' numbers, by round, where both have it."""
        under_by_round = {row.round: row.numbers.get(number) for row in self._rounds(under)}
        pairs = (
            (row.numbers.get(number), under_by_round.get(row.round)) for row in self._rounds(over)
        )
        return Spread.of([upper / lower for upper, lower in pairs if upper is not None and lower])

    def ratio_to(self, row: Row, other: str) -> Spread | None:
        """The speed of `row`'s contender relative to another in the same case; None for itself."""
        return None if row.contender == other else self.ratio(row, _by(row, other))

    def kinds(self, scenario: str) -> list[Row]:
        """One row per case and contender, in order of appearance."""
        found: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            if row.scenario == scenario:
                found.setdefault((row.case, row.contender), row)
        cases = list(dict.fromkeys(case for case, _ in found))
        return sorted(found.values(), key=lambda row: cases.index(row.case))

    def _rounds(self, like: Row) -> Iterable[Row]:
        kind = (like.scenario, like.case, like.contender)
        return (row for row in self.rows if (row.scenario, row.case, row.contender) == kind)


Cell = Callable[[Results, Row], object]


def _number(name: str) -> Cell:
    return lambda results, row: results.spread(row, name)


_LOAD: dict[str, Cell] = {
    "tokens/s": _number(SPEED),
    "of bare": lambda results, row: results.ratio_to(row, REFERENCE),
    "services to it": lambda results, row: _reverse(results, row),
    "first token p50, ms": _number("ttft_p50_ms"),
    "p99": _number("ttft_p99_ms"),
    "between tokens p50, ms": _number("gap_p50_ms"),
    "p99 ": _number("gap_p99_ms"),
}
_COLUMNS: dict[str, dict[str, Cell]] = {
    "load": _LOAD,
    "sampled": _LOAD,
    "long": _LOAD,
    "ceiling": _LOAD,
    "streams": _LOAD | {"faults": _number("faults")},
    "shared": {
        "first user, ms": _number("cold_ttft_ms"),
        "later users p50, ms": _number("later_ttft_p50_ms"),
        "p99": _number("later_ttft_p99_ms"),
        "later / first": _number("later_of_cold"),
    },
    "turns": {
        "turn 1, ms": _number("turn_1_ttft_ms"),
        **{f"turn {turn}, ms": _number(f"turn_{turn}_ttft_ms") for turn in range(2, 6)},
        **{f"{turn} / cold": _number(f"turn_{turn}_of_cold") for turn in range(2, 6)},
    },
    "choices": {
        "first token n=1, ms": _number("one_ttft_ms"),
        "n=4, ms": _number("many_ttft_ms"),
        "ratio": _number("ttft_ratio"),
        "device n=1, ms": _number("one_device_ms"),
        "device n=4, ms": _number("many_device_ms"),
        "device ratio": _number("device_ratio"),
    },
    "stall": {
        **{
            f"{name} {rank}, ms": _number(f"{key}_gap_{rank}_ms")
            for name, key in (("quiet", "quiet"), ("during prefill", "busy"))
            for rank in ("p50", "p99", "max")
        },
        "long prompt TTFT, ms": _number("late_ttft_ms"),
    },
}
_WITH_PROCESSES = ("load", "sampled", "long", "streams", "ceiling")


def tables(results: Results) -> list[Table]:
    """A table per scenario, and for loads another with the processes' resource use."""
    found = []
    for scenario, title in results.titles.items():
        kinds = results.kinds(scenario)
        if not kinds:
            continue
        columns = _COLUMNS[scenario]
        body = tuple(
            (row.case, row.contender, *(_cell(cell(results, row)) for cell in columns.values()))
            for row in kinds
        )
        found.append(_without_empty(Table(title, ("", "", *map(str.strip, columns)), body)))
        if scenario in _WITH_PROCESSES:
            found.append(_processes(results, kinds, f"{title}: what the processes used"))
    return found


def _processes(results: Results, kinds: list[Row], title: str) -> Table:
    names = [
        (row, key.removeprefix(f"{PEAK}/"))
        for row in kinds
        for key in row.numbers
        if key.startswith(f"{PEAK}/")
    ]
    body = tuple(
        (
            row.case,
            row.contender,
            name,
            _cell(results.spread(row, f"{CPU}/{name}")),
            _cell(results.spread(row, f"{PEAK}/{name}")),
        )
        for row, name in names
    )
    head = ("", "", "process", "CPU time, us per token", "peak memory, MiB")
    return _without_empty(Table(title, head, body))


def notes(results: Results) -> list[str]:
    """What a reader of the tables needs to know: failures, deviating lengths, noise."""
    found: Counter[tuple[str, str]] = Counter()
    for row in results.rows:
        where = f"{row.contender}, {row.scenario} {row.case}".strip()
        for name, problem in (
            ("faults", f"requests failed ({'; '.join(row.faults)})"),
            ("other_prompts", "prompts had a different length by the server's count"),
            ("other_outputs", "answers had a different length than requested"),
        ):
            if row.numbers.get(name):
                found[where, problem] += round(row.numbers[name])
        if row.numbers.get("streams_outlasted") == 0:
            found[where, "times the streams ended before the long prompt was prefilled"] += 1
    return [f"{where}: {count} {problem}" for (where, problem), count in found.items()] + _noise(
        results
    )


def _noise(results: Results) -> list[str]:
    noisy = [row for row in results.rows if row.numbers.get("others_percent", 0) > NOISE_PERCENT]
    if not noisy:
        return []
    return [
        f"in {len(noisy)} of {len(results.rows)} measurements other processes took more than "
        f"{NOISE_PERCENT:g} % of the machine"
    ]


def machine() -> dict[str, object]:
    """What was measured and where: commit, date, CPU and cores."""
    cpu = Path("/proc/cpuinfo").read_text()
    model = next((line for line in cpu.splitlines() if line.startswith("model name")), ":unknown")
    changed = "" if not _git("status", "--porcelain", "--untracked-files=no") else " with changes"
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + changed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": model.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
    }


def page(results: Results, about: dict[str, object]) -> str:
    """The results section of a page."""
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    parts = [f"{facts[0].upper()}{facts[1:]}. Medians over the rounds, with lowest and highest."]
    parts += [table.markdown() for table in tables(results)]
    remarks = notes(results)
    if remarks:
        parts.append("\n".join(["Notes:", "", *(f"- {note}" for note in remarks)]))
    return "\n\n".join(parts)


def with_results(text: str, section: str) -> str:
    """The page with its results section replaced; raises ValueError if it has no markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def as_json(results: Results, about: dict[str, object]) -> dict[str, Any]:
    """All rows, and the median, minimum and maximum of each number."""
    summaries = [
        {
            "scenario": row.scenario,
            "case": row.case,
            "contender": row.contender,
            "of_bare": _plain(results.ratio_to(row, REFERENCE)),
            "services_to_it": _plain(_reverse(results, row)),
            "numbers": {name: _plain(results.spread(row, name)) for name in row.numbers},
        }
        for scenario in results.titles
        for row in results.kinds(scenario)
    ]
    return {
        "about": about,
        "notes": notes(results),
        "summary": summaries,
        "rows": [asdict(row) for row in results.rows],
    }


def _reverse(results: Results, row: Row) -> Spread | None:
    """The services' speed relative to this contender's."""
    return None if row.contender == OURS else results.ratio(_by(row, OURS), row)


def _by(row: Row, contender: str) -> Row:
    return Row(row.scenario, row.case, row.round, contender, {})


def _without_empty(table: Table) -> Table:
    """The table without empty columns."""
    kept = [
        at
        for at in range(len(table.head))
        if any(line[at] not in ("", NOTHING) for line in table.body)
    ]
    head, *body = (tuple(line[at] for at in kept) for line in (table.head, *table.body))
    return Table(table.title, head, tuple(body))


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return asdict(spread) if spread else None


def _cell(found: object) -> str:
    return NOTHING if found is None else str(found)


def _shown(value: float) -> str:
    """Formats to about three digits."""
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or ("" if arguments[0] == "status" else "unknown")
