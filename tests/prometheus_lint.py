"""What `promtool check metrics` reports: the rules of Prometheus' promlint, in Python.

Metrics are thus checked even without Prometheus; if it is installed, the two are compared.
"""

import re
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

_BASE_UNITS = {
    "amperes": (), "bytes": ("bits",), "celsius": ("fahrenheit", "rankine", "kelvins"),
    "grams": ("pounds", "ounces"), "joules": ("calories",), "kelvin": (),
    "meters": ("inches", "feet", "yards", "miles"), "moles": (),
    "seconds": ("minutes", "hours", "days", "weeks"), "volts": (),
}  # fmt: skip
_PREFIXES = (
    *("pico", "nano", "micro", "milli", "centi", "deci", "deca", "hecto", "kilo", "kibi"),
    *("mega", "mebi", "mibi", "giga", "gibi", "tera", "tebi", "peta", "pebi"),
)
_ABBREVIATIONS = ("s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d")
_TYPES = ("counter", "gauge", "histogram", "summary", "untyped")
_OF_HISTOGRAMS = ("_bucket", "_count", "_sum")
_CAMEL_CASE = re.compile(r"[a-z][A-Z]")


def faults(family: Metric) -> Iterator[str]:
    """All faults of a metric, in promtool's wording."""
    # prometheus_client removes `_total` from a counter's name, and adds it again in its output.
    name = f"{family.name}_total" if family.type == "counter" else family.name
    if not family.documentation:
        yield "no help text"
    if family.type != "counter" and name.endswith("_total"):
        yield 'non-counter metrics should not have "_total" suffix'
    if ":" in name:
        yield "metric names should not contain ':'"
    if _CAMEL_CASE.search(name):
        yield "metric names should be written in 'snake_case' not 'camelCase'"
    parts = name.lower().split("_")
    for part in parts:
        if (base := _base_unit(part)) not in (None, part):
            yield f'use base unit "{base}" instead of "{part}"'
        if part in _TYPES and family.type == part:
            yield f"metric name should not include type '{part}'"
        if part in _ABBREVIATIONS:
            yield "metric names should not contain abbreviated units"
    if family.type not in ("histogram", "summary"):
        for suffix in _OF_HISTOGRAMS:
            if name.endswith(suffix):
                yield f'non-histogram and non-summary metrics should not have "{suffix}" suffix'
        if any("le" in sample.labels for sample in family.samples):
            yield 'non-histogram metrics should not have "le" label'
    if family.type != "summary" and any("quantile" in sample.labels for sample in family.samples):
        yield 'non-summary metrics should not have "quantile" label'


def is_accepted(name: str, fault: str) -> bool:
    """vLLM's names are given, and device time is in whole nanoseconds so that it adds up."""
    return name.startswith("vllm:") or (
        "_device_" in name and fault.startswith('use base unit "seconds"')
    )


def _base_unit(part: str) -> str | None:
    """The base unit for a part of a name; None if it is not a unit."""
    for base, others in _BASE_UNITS.items():
        if part in (base, *others, *(prefix + base for prefix in _PREFIXES)):
            return base
    return None
