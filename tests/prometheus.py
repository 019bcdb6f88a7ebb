"""Prometheus' programs, which are in Debian's package `prometheus` but not on PyPI."""

import math
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from tests.ports import free_port


def promtool(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs promtool with `text` as its standard input."""
    command = [installed("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def lint(text: str) -> set[tuple[str, str]]:
    """What `promtool check metrics` reports for a scrape: metrics and their faults."""
    result = promtool("check", "metrics", text=text)
    lines = (result.stdout + result.stderr).splitlines()
    assert not any(line.startswith("error") for line in lines), lines
    return {(name, fault) for name, _, fault in (line.partition(" ") for line in lines)}


def installed(program: str) -> str:
    """The program's path; skips the test if it is not installed."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"not installed: {program}; it is in Debian's package prometheus")
    return path


class Prometheus:
    """A real Prometheus that scrapes `targets` (addresses by job) every second and evaluates
    `rules`. A context manager."""

    def __init__(self, folder: Path, targets: dict[str, list[str]], rules: Path) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._folder = folder
        jobs = [
            {"job_name": job, "static_configs": [{"targets": addresses}]}
            for job, addresses in targets.items()
        ]
        every_second = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config = {"global": every_second, "rule_files": [str(rules)], "scrape_configs": jobs}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Self:
        command = [installed("prometheus"), f"--config.file={self._folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={self._folder}/data", "--log.level=warn"]
        command += [f"--web.listen-address={self._url.removeprefix('http://')}"]
        self._log = self._folder / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._client = httpx.Client(base_url=self._url, trust_env=False, timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait()

    def until_it_scrapes(self, count: int) -> None:
        """Returns once it has scraped `count` targets."""
        deadline = time.monotonic() + 60
        while self._is_up() < count:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self.ask("targets")
            time.sleep(0.1)

    def _is_up(self) -> int:
        try:
            found = self.ask("query", query="count(up == 1)")["result"]
        except (httpx.TransportError, AssertionError):  # it is starting
            return 0
        return int(found[0]["value"][1]) if found else 0

    def ask(self, what: str, **parameters: str | float) -> Any:
        """The data that its HTTP API returns for `what`."""
        answer = self._client.get(f"/api/v1/{what}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, query: str, since: float) -> list[float]:
        """All values in a graph of `query`, second by second from `since` to now."""
        data = self.ask("query_range", query=query, start=since, end=time.time(), step=1)
        numbers = [float(value) for series in data["result"] for _, value in series["values"]]
        return [number for number in numbers if math.isfinite(number)]
