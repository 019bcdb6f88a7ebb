"""`trivium up`: the memory plan that it shows, and models that are too large for the machine."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from generator_svc.config import GeneratorSettings
from tests.cli.conftest import fake_model_folder
from tests.ports import up_ports
from trivium.cli.fit import SERVICES_BYTES, memory_plans
from trivium.cli.main import app
from trivium.cli.pipeline import Pipeline
from trivium.host_limits import memory_limit

MIB = 2**20
LENGTH = 1024


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU, and no generator settings from the shell."""
    for name in GeneratorSettings.model_fields:
        monkeypatch.delenv(f"TRIVIUM_GENERATOR_{name}".upper(), raising=False)
    monkeypatch.setenv("TRIVIUM_GENERATOR_DEVICE", "cpu")


def _model_taking(folder: Path, share: float) -> Path:
    """A model for which one sequence's KV cache takes this share of the free memory."""
    return fake_model_folder(folder, int(memory_limit().free * share / LENGTH), LENGTH)


def _refused(capfd: pytest.CaptureFixture[str], *models: Path) -> str:
    """The single line with which `trivium up` refuses these models."""
    [line] = _refusals(capfd, *models)
    return line


def _refusals(capfd: pytest.CaptureFixture[str], *models: Path) -> list[str]:
    """The lines with which `trivium up` refuses them, one per model that does not fit."""
    options = [option for model in models for option in ("--model", str(model))]
    result = CliRunner().invoke(app, ["up", "--device", "cpu", *up_ports(), *options])

    assert 2 == result.exit_code
    return (capfd.readouterr().err + result.output).splitlines()


def _mebibytes(line: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:MiB|more)", line)]


def test_a_model_that_fits_is_shown_with_its_memory(tmp_path: Path) -> None:
    """Weights, KV cache, slots and free memory, one line per model."""
    models = [fake_model_folder(tmp_path / name, 2**14, LENGTH) for name in ("one", "two")]
    first, second = memory_plans(Pipeline(models[0], "cpu", more_models=(models[1],)))

    plan = "1 MiB of weights, up to 512 MiB of KV cache for 32 sequences of 1,024 tokens; "
    assert first.startswith(f"one: {plan}")
    assert second.startswith(f"two: {plan}")
    assert all("are free (" in line for line in (first, second))


def test_a_model_that_is_too_large_is_refused_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line says what is needed, what is free and how much to add; the exit status is 2."""
    line = _refused(capfd, _model_taking(tmp_path / "huge", 10))

    numbers = re.search(r"huge needs ([\d,]+) MiB .* ([\d,]+) MiB are free: provide ([\d,]+)", line)
    assert numbers, line
    needed, free, missing = (int(number.replace(",", "")) for number in numbers.groups())
    assert abs(needed - free - missing) <= 1
    assert free < memory_limit().total / MIB < needed


def test_sequence_length_that_fits_is_suggested(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the requested sequence length does not fit, the message names one that does."""
    setting = "TRIVIUM_GENERATOR_MAX_SEQUENCE_LENGTH"
    model = _model_taking(tmp_path / "long", 2)
    monkeypatch.setenv(setting, "1024")
    line = _refused(capfd, model)
    monkeypatch.setenv(setting, "256")

    assert 256 < int(line.rpartition(f"set {setting} to ")[2].split()[0]) < 512
    assert " of 256 tokens" in memory_plans(Pipeline(model, "cpu"))[0]


def test_models_have_to_fit_together(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would fit alone; the second is refused because of what the first one takes."""
    monkeypatch.setenv("TRIVIUM_GENERATOR_MAX_SEQUENCE_LENGTH", str(LENGTH))
    models = [_model_taking(tmp_path / name, 0.7) for name in ("one", "two")]
    for model in models:
        assert 1 == len(memory_plans(Pipeline(model, "cpu")))
    capfd.readouterr()
    line = _refused(capfd, *models)

    assert "two needs" in line
    assert "for one sequence of 1,024 tokens" in line
    assert "reserved for other processes" in line


def test_missing_memory_is_summed_over_all_models(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as much more memory as the last line says, all of them can start."""
    monkeypatch.setenv("TRIVIUM_GENERATOR_MAX_SEQUENCE_LENGTH", str(LENGTH))
    models = [_model_taking(tmp_path / name, 0.7) for name in ("one", "two", "three")]
    two, three = _refusals(capfd, *models)
    needed, free = _mebibytes(three)[0], memory_limit().free / MIB
    missing = int(three.partition("provide ")[2].split()[0].replace(",", ""))

    assert "two needs" in two
    assert "three needs" in three
    assert " 0 MiB are free" in three
    assert abs(3 * needed + SERVICES_BYTES / MIB - free - missing) < free / 10


def test_more_replicas_leave_less_memory(tmp_path: Path) -> None:
    """More tokenizers and facades leave less memory for the models, and the plan says so."""
    model = fake_model_folder(tmp_path / "one", 2**14, LENGTH)
    [alone] = memory_plans(Pipeline(model, "cpu"))
    [beside] = memory_plans(Pipeline(model, "cpu", facades=2, tokenizers=3))

    assert "less 320 MiB reserved for other processes" in alone
    assert "less 680 MiB reserved for other processes" in beside
