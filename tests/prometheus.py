"""Prometheus' programs, which come in Debian's package `prometheus` and in none of PyPI's."""

import shutil
import subprocess
from pathlib import Path

import pytest


def promtool(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs it with `text` as its standard input; skips the test where it is not installed."""
    command = [_installed("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def lint(text: str) -> set[tuple[str, str]]:
    """What `promtool check metrics` finds fault with in a scrape: metrics and what is wrong."""
    result = promtool("check", "metrics", text=text)
    lines = (result.stdout + result.stderr).splitlines()
    assert not any(line.startswith("error") for line in lines), lines
    return {(name, fault) for name, _, fault in (line.partition(" ") for line in lines)}


def _installed(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"not installed: {program}; it is in Debian's package prometheus")
    return path
