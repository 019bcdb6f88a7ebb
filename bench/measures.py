"""Computes numbers from what was played, each named with its unit. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from bench.play import Answer, Play, Request, Script

Numbers = dict[str, float]

CPU, PEAK = "cpu_us_per_token", "peak_mib"  # each followed by / and the name of a process


def whole(answers: Iterable[Answer]) -> list[Answer]:
    """The answers without a fault."""
    return [answer for answer in answers if not answer.fault]


def percentiles(name: str, seconds: Sequence[float], with_max: bool = False) -> Numbers:
    """p50 and p99 in milliseconds, linearly interpolated, and optionally the maximum; empty without
    values."""
    if not seconds:
        return {}
    found = {f"{name}_p{rank}_ms": float(np.percentile(seconds, rank)) * 1e3 for rank in (50, 99)}
    return {**found, f"{name}_max_ms": max(seconds) * 1e3} if with_max else found


def median_ms(name: str, seconds: Sequence[float]) -> Numbers:
    """The median in milliseconds; empty without values."""
    return {f"{name}_ms": statistics.median(seconds) * 1e3} if seconds else {}


def ratio(name: str, numbers: Numbers, over: str, under: str) -> Numbers:
    """One number divided by another; empty unless both are there."""
    if over not in numbers or not numbers.get(under):
        return {}
    return {name: numbers[over] / numbers[under]}


def streaming(answers: Sequence[Answer]) -> Numbers:
    """Output tokens/s from the first request to the end of the last answer, and latencies."""
    good = whole(answers)
    if not good:
        return {}
    seconds = max(a.ended for a in answers) - min(a.sent_at for a in answers)
    return {
        "tokens_per_second": sum(a.completion_tokens for a in good) / seconds,
        **percentiles("ttft", [a.first for a in good]),
        **percentiles("gap", [gap for a in good for gap in a.gaps]),
    }


def stalls(answers: Sequence[Answer], late: Answer) -> Numbers:
    """Gaps of running streams before a late request was sent, and from then to its first token.

    The first kind (quiet) counts only once all streams have begun.
    """
    running = whole(answers)
    if late.fault or not running:
        return {}
    quiet, busy = [], []
    begun = max(answer.choices[0][0] for answer in running)
    for answer in running:
        for before, after in zip(answer.choices[0], answer.choices[0][1:], strict=False):
            if begun <= before and after <= late.sent_at:
                quiet.append(after - before)
            elif after > late.sent_at and before < late.sent_at + late.first:
                busy.append(after - before)
    outlasted = all(answer.ended > late.sent_at + late.first for answer in running)
    return {
        **percentiles("quiet_gap", quiet, with_max=True),
        **percentiles("busy_gap", busy, with_max=True),
        **median_ms("late_ttft", [late.first]),
        "streams_outlasted": float(outlasted),
    }


def costs(plays: Sequence[Play]) -> Numbers:
    """CPU time per output token and peak memory by process, and other processes' CPU share."""
    tokens = sum(a.completion_tokens for play in plays for a in whole(play.answers))
    numbers: Numbers = {"others_percent": 100 * statistics.fmean(play.others for play in plays)}
    for name in plays[0].cpu_seconds:
        spent = sum(play.cpu_seconds[name] for play in plays)
        if tokens:
            numbers[f"{CPU}/{name}"] = spent / tokens * 1e6
    for name in plays[0].peak_bytes:
        numbers[f"{PEAK}/{name}"] = max(play.peak_bytes[name] for play in plays) / 2**20
    return numbers


def checks(script: Script, play: Play) -> Numbers:
    """How many requests failed, and how many have other prompt or output lengths than requested."""
    pairs = [
        (request, a)
        for request, a in zip(script.requests, play.answers, strict=True)
        if not a.fault
    ]
    return {
        "requests": float(len(play.answers)),
        "faults": float(len(play.answers) - len(pairs)),
        "other_prompts": float(
            sum(a.prompt_tokens != len(request.token_ids) for request, a in pairs)
        ),
        "other_outputs": float(sum(not _is_whole(request, a) for request, a in pairs)),
    }


def _is_whole(request: Request, answer: Answer) -> bool:
    """Whether all choices have all of their tokens."""
    is_complete = answer.completion_tokens == request.output * request.n
    return is_complete and len(answer.choices) == request.n
