"""`trivium up` and the environment: options override variables, which override its defaults."""

import os
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import Mock

import pytest
from pydantic_settings import BaseSettings
from typer.testing import CliRunner

from generator_svc.config import GeneratorSettings
from rest_facade.config import FacadeSettings
from tests.cli.conftest import fake_model_folder
from tokenizer_svc.config import TokenizerSettings
from trivium.cli.fit import DoesNotFit
from trivium.cli.main import app
from trivium.cli.pipeline import Pipeline
from trivium.cli.stage_drain import longest_drain
from trivium.wire.settings import load_settings

SETTINGS = {
    "generator_svc": GeneratorSettings,
    "tokenizer_svc": TokenizerSettings,
    "rest_facade": FacadeSettings,
}


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from the shell."""
    for name in os.environ:
        if name.startswith("TRIVIUM_"):
            monkeypatch.delenv(name)


def read(pipeline: Pipeline) -> dict[str, BaseSettings]:
    """The settings that each service reads, by the name of its stage."""
    return {stage.name: _read(stage.name, stage.environment) for stage in pipeline.stages()}


def _read(name: str, environment: Mapping[str, str]) -> BaseSettings:
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        return SETTINGS[name.partition("-")[0]]()


def refusal(*options: str) -> str:
    """The message with which `trivium up` refuses."""
    result = CliRunner().invoke(app, ["up", *options])

    assert 2 == result.exit_code, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("setting", "value", "here"),
    [
        ("log_level", "info", "warning"),
        ("log_name", "mine", None),
        ("drain_seconds", 77.0, 30.0),
        ("drain_notice_seconds", 7.0, 0.0),
    ],
)
def test_variables_override_defaults(
    setting: str, value: object, here: object, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """Each service reads its own variable; an empty one counts as unset."""
    monkeypatch.setenv(f"TRIVIUM_TOKENIZER_{setting.upper()}", str(value))
    monkeypatch.setenv(f"TRIVIUM_GENERATOR_{setting.upper()}", "")
    services = read(Pipeline(tiny_folder))

    assert value == getattr(services["tokenizer_svc"], setting)
    for name in ("rest_facade", "generator_svc"):
        assert (name if here is None else here) == getattr(services[name], setting)


def test_options_override_variables(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    """In all services."""
    monkeypatch.setenv("TRIVIUM_FACADE_LOG_LEVEL", "debug")
    monkeypatch.setenv("TRIVIUM_GENERATOR_DRAIN_SECONDS", "77")
    services = read(Pipeline(tiny_folder, log_level="error", drain_seconds=5)).values()

    assert {("error", 5.0)} == {(each.log_level, each.drain_seconds) for each in services}  # type: ignore[attr-defined]


def test_replica_names_are_numbered(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    """So that their logs and usage records can be told apart."""
    monkeypatch.setenv("TRIVIUM_TOKENIZER_LOG_NAME", "mine")
    services = read(Pipeline(tiny_folder, tokenizers=2))

    for number in (1, 2):
        assert f"mine-{number}" == services[f"tokenizer_svc-{number}"].log_name  # type: ignore[attr-defined]


def test_drain_timeout_covers_the_longest_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """`trivium up` waits for the stage with the longest notice and drain."""
    assert 30 == longest_drain(None)
    monkeypatch.setenv("TRIVIUM_GENERATOR_DRAIN_SECONDS", "77")
    monkeypatch.setenv("TRIVIUM_TOKENIZER_DRAIN_NOTICE_SECONDS", "60")

    assert 90 == longest_drain(None)
    assert 65 == longest_drain(5)


@pytest.mark.parametrize(
    ("setting", "value", "option"),
    [
        ("TRIVIUM_TOKENIZER_MODELS", '[{"model_directory": "a"}]', "--model once per model"),
        ("TRIVIUM_TOKENIZER_MODEL_DIRECTORY", "elsewhere", "--model"),
        ("TRIVIUM_TOKENIZER_GENERATOR_TARGET", "elsewhere:50052", "--generator-port"),
        ("TRIVIUM_FACADE_TOKENIZER_TARGET", "elsewhere:50051", "--tokenizer-port"),
        ("TRIVIUM_FACADE_REUSE_PORT", "true", "--facades"),
    ],
)
def test_variable_without_effect_is_refused(
    setting: str, value: str, option: str, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """A variable that would have no effect is refused, and the option to use is named."""
    monkeypatch.setenv(setting, value)
    message = refusal("--model", str(tiny_folder), "--port=8499")

    assert f"trivium up: {setting} is {value}, " in message
    assert message.endswith(f"unset it, and use {option}")


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ("TRIVIUM_TOKENIZER_API_KEYS_FILE", "TRIVIUM_FACADE_TOKENIZER_API_KEY_FILE"),
        ("TRIVIUM_GENERATOR_API_KEYS_FILE", "TRIVIUM_TOKENIZER_GENERATOR_API_KEY_FILE"),
    ],
)
def test_a_stage_without_the_key_that_it_needs_is_refused(
    keys: str, key: str, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """Before anything is started, as it would wait forever; an empty variable names no key."""
    monkeypatch.setenv(keys, "keys.toml")
    monkeypatch.setenv(key, "")

    assert f"trivium up: {keys} requires {key}" in refusal("--model", str(tiny_folder))


def test_a_folder_may_have_spaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also a folder that a variable names."""
    missing = tmp_path / "my models" / "one"
    monkeypatch.setenv("TRIVIUM_GENERATOR_MODEL_DIRECTORY", str(missing))

    assert f"'{missing}' is neither a model folder" in refusal().replace(" │ ", "")


def test_consistent_variables_are_accepted(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """As in one env file for running the services separately or with `trivium up`."""
    monkeypatch.chdir(tiny_folder.parent)
    monkeypatch.setenv("TRIVIUM_TOKENIZER_MODEL_DIRECTORY", tiny_folder.name)
    monkeypatch.setenv("TRIVIUM_FACADE_TOKENIZER_TARGET", "127.0.0.1:50051")

    Pipeline(tiny_folder).check_environment()


def test_model_variables_do_not_change_the_models_given(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever variable is set, the tokenizer gets the models that `up` was given."""
    other = fake_model_folder(tmp_path / "other")
    monkeypatch.setenv("TRIVIUM_TOKENIZER_MODELS", '[{"model_directory": "a"}]')
    one = read(Pipeline(tiny_folder))["tokenizer_svc"]
    monkeypatch.setenv("TRIVIUM_TOKENIZER_MODEL_DIRECTORY", "a")
    several = read(Pipeline(tiny_folder, more_models=(other,)))["tokenizer_svc"]

    assert [tiny_folder] == [model.model_directory for model in one.served]  # type: ignore[attr-defined]
    assert [tiny_folder, other] == [model.model_directory for model in several.served]  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("kind", SETTINGS.values())
def test_seconds_must_be_finite_numbers(
    kind: type[BaseSettings],
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Others are refused with a fitting message, whatever the bounds of the setting."""
    prefix = kind.model_config["env_prefix"]
    floats = [name for name, field in kind.model_fields.items() if "float" in str(field.annotation)]
    for name in floats:
        monkeypatch.setenv(f"{prefix}{name.upper()}", value)
    monkeypatch.setenv(f"{prefix}MODEL_DIRECTORY", "any")
    with pytest.raises(SystemExit):
        load_settings(kind)

    expected = [f"{prefix}{name.upper()}: Input should be a finite number" for name in floats]
    assert sorted(expected) == sorted(capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("variables", [True, False])
@pytest.mark.parametrize(
    ("host", "reached_at"),
    [("::1", "[::1]"), ("[::1]", "[::1]"), ("::", "127.0.0.1"), ("[::]", "127.0.0.1")],
)
def test_ipv6(
    variables: bool,
    host: str,
    reached_at: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
) -> None:
    """With or without brackets, as an option or a variable, for every service."""
    made: list[Pipeline] = []
    monkeypatch.setattr(Pipeline, "check_ports", lambda pipeline: made.append(pipeline))
    monkeypatch.setattr("trivium.cli.up.memory_plans", Mock(side_effect=DoesNotFit(2)))
    options = []
    for option, service in (("", "FACADE"), ("grpc-", "TOKENIZER"), ("generator-", "GENERATOR")):
        if variables:
            monkeypatch.setenv(f"TRIVIUM_{service}_HOST", host)
        else:
            options.append(f"--{option}host={host}")
    refusal("--model", str(tiny_folder), *options)
    [pipeline] = made

    assert f"http://{reached_at}:8000" == pipeline.url
    assert f"{reached_at}:50051" == pipeline.chat_target
    assert f"{reached_at}:50052" == pipeline.generator_target
    assert {host.strip("[]")} == {each.host for each in read(pipeline).values()}  # type: ignore[attr-defined]


def test_tokenizers_connect_to_the_generators_host(tiny_folder: Path) -> None:
    """Tokenizers connect to the host on which the generator listens."""
    pipeline = Pipeline(tiny_folder, generator_host="127.0.0.2")

    assert "127.0.0.2:50052" == read(pipeline)["tokenizer_svc"].generator_target  # type: ignore[attr-defined]
    assert "127.0.0.2" == read(pipeline)["generator_svc"].host  # type: ignore[attr-defined]
