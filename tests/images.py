"""The Dockerfile's stages, and services' settings in a given environment."""

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from generator_svc.config import GeneratorSettings
from rest_facade.config import FacadeSettings
from tokenizer_svc.config import TokenizerSettings

ROOT = Path(__file__).parents[1]
SERVICES: dict[str, type[BaseSettings]] = {
    "rest_facade": FacadeSettings,
    "tokenizer_svc": TokenizerSettings,
    "generator_svc": GeneratorSettings,
}
FINAL_ERRORS_SECONDS = 5  # for the facade to end interrupted streams after its drain


def dockerfile() -> dict[str, tuple[str, list[str]]]:
    """Stages by name: their parent and their instructions."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    stages: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        start = re.fullmatch(r"FROM (\S+) AS (\S+)", line)
        if start:
            lines: list[str] = []
            stages[start[2]] = (start[1], lines)
        elif stages and line and not line.startswith("#"):
            lines.append(line)
    return stages


def instructions(target: str) -> list[str]:
    """All instructions of a stage, including its ancestors', which come first."""
    parent, lines = dockerfile()[target]
    return [*(instructions(parent) if parent in dockerfile() else []), *lines]


def last(target: str, word: str) -> str:
    """The arguments of the last instruction of a kind."""
    return [line for line in instructions(target) if line.startswith(f"{word} ")][-1][
        len(word) + 1 :
    ]


def dockerfile_environment(target: str) -> dict[str, str]:
    """The environment of a container of this target."""
    pairs = [line[4:].split() for line in instructions(target) if line.startswith("ENV ")]
    return dict(pair.split("=", 1) for line in pairs for pair in line)


def read_settings(
    service: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> BaseSettings:
    """The service's settings in that environment; raises if a variable is invalid or unknown."""
    prefix = SERVICES[service].model_config["env_prefix"]
    ours = {name: value for name, value in environment.items() if name.startswith("TRIVIUM_")}
    known = {f"{prefix}{field}".upper() for field in SERVICES[service].model_fields}
    assert ours.keys() <= known
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    return SERVICES[service]()
