"""`trivium up` without the services: what it refuses, how it configures them, how it ends."""

import asyncio
import errno
import importlib
import os
import signal
from pathlib import Path

import pytest
import trustme
from pydantic_settings import BaseSettings
from typer.testing import CliRunner

from rest_facade.config import FacadeSettings
from tests.certificates import Files
from tests.cli.children import Children, is_running
from tests.ports import up_ports
from trivium.cli.banner import banner
from trivium.cli.features import disabled_features, requires_api_keys
from trivium.cli.main import app
from trivium.cli.models import find_model
from trivium.cli.pipeline import Pipeline, authority
from trivium.cli.supervisor import Stage, Supervisor
from trivium.cli.up import supervise
from trivium.export_extra import PACKAGES
from trivium.generator.v1 import generator_pb2
from trivium.host_limits import CpuLimit, MemoryLimit, cpu_limit, memory_limit
from trivium.wire.listening import bind


async def nothing() -> None:
    """Does nothing once the stages are ready."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signal_drains_and_exits_with_status_0(children: Children, number: int) -> None:
    """Ctrl-C, SIGTERM and a closed terminal drain front to back, and the exit status is 0."""
    supervisor = Supervisor([children.stage("generator"), children.stage("facade")], 30)

    async def stop() -> None:
        os.kill(os.getpid(), number)

    status = await supervise(supervisor, stop, ready_seconds=60)

    assert status == 0
    assert ["facade stopped", "generator stopped"] == children.lines()[2:]
    assert not any(is_running(pid) for pid in supervisor.pids().values())


async def test_a_closed_terminal_is_ignored_under_nohup(children: Children) -> None:
    """The next signal is the first that counts: it drains, and does not kill."""
    supervisor = Supervisor([children.stage("facade")], stop_seconds=30)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async def close_terminal() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        status = await supervise(supervisor, close_terminal, ready_seconds=60)
    finally:
        signal.signal(signal.SIGHUP, before)

    assert 0 == status
    assert ["facade ready", "facade stopped"] == children.lines()


async def test_a_second_signal_does_not_wait(children: Children) -> None:
    """A second Ctrl-C kills at once what is still draining."""
    deaf = "signal.signal(signal.SIGTERM, lambda *_: note('asked')); note('deaf')"
    supervisor = Supervisor([children.stage("facade", deaf)], stop_seconds=3600)

    async def stop_twice() -> None:
        await children.until("facade deaf")
        os.kill(os.getpid(), signal.SIGINT)

    async def again() -> None:
        await children.until("facade asked")
        os.kill(os.getpid(), signal.SIGINT)

    second = asyncio.ensure_future(again())
    status = await supervise(supervisor, stop_twice, ready_seconds=60)
    await second

    assert status == 0
    assert not any(is_running(pid) for pid in supervisor.pids().values())


@pytest.mark.parametrize(("dies_with", "status"), [(0, 1), (1, 1), (2, 2)])
async def test_exit_of_one_process_stops_the_others(
    children: Children, dies_with: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a process ends, the others are stopped and the status is not 0; a 2 is passed on."""
    dying = children.stage("generator", f"sys.exit({dies_with})")
    supervisor = Supervisor([dying, children.stage("facade")], 30)

    assert status == await supervise(supervisor, nothing, ready_seconds=60)
    assert f"generator exited with status {dies_with}" in capsys.readouterr().err
    assert not any(is_running(pid) for pid in supervisor.pids().values())


async def test_stage_that_never_becomes_ready_stops_the_others(
    children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that is not ready in time is named, and everything is stopped."""
    command = children.stage("tokenizer").command
    supervisor = Supervisor([Stage("tokenizer", command, asyncio.Event().wait)], 30)  # type: ignore[arg-type]

    assert await supervise(supervisor, nothing, ready_seconds=0.1) == 1
    assert "not ready after 0.1 s: tokenizer" in capsys.readouterr().err
    assert not any(is_running(pid) for pid in supervisor.pids().values())


def test_port_in_use_is_named(tiny_folder: Path) -> None:
    """A port in use is named with its variable and its option, and the status is 2."""
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = str(listener.getsockname()[1])
        options = ("--model", str(tiny_folder), "--port", port)
        result = CliRunner().invoke(app, ["up", *options])

    assert result.exit_code == 2
    assert f"trivium up: TRIVIUM_FACADE_PORT: 127.0.0.1:{port} is in use; " in result.output
    assert "choose another port with --port" in result.output


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("--port", "--tokenizer-port", "TRIVIUM_TOKENIZER_PORT: 127.0.0.1:8498 is in use by"),
        ("--port", "--facade-metrics-port", "127.0.0.1:8498 is in use by TRIVIUM_FACADE_PORT"),
        (
            "--tokenizer-metrics-port",
            "--generator-port",
            "choose another port with --generator-port",
        ),
    ],
)
def test_two_stages_cannot_share_a_port(
    one: str, other: str, message: str, tiny_folder: Path
) -> None:
    """The setting that comes later is named, and the one that already has the port."""
    options = (*up_ports(), f"{one}=8498", f"{other}=8498")
    result = CliRunner().invoke(app, ["up", "--model", str(tiny_folder), *options])

    assert 2 == result.exit_code
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "cores", "message"),
    [
        ([], 1, ""),
        (["--facades=2", "--tokenizers=2"], 5, ""),
        (["--tokenizers=2"], 3, "--tokenizers 2: 4 processes share 3 cores (some quota)"),
        (["--facades=3", "--tokenizers=2"], 4, "--facades 3 and --tokenizers 2: 6 processes"),
    ],
)
def test_warns_of_more_processes_than_cores(
    options: list[str],
    cores: int,
    message: str,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is a warning if the requested replicas outnumber the cores."""
    monkeypatch.setattr("trivium.cli.up.cpu_limit", lambda: CpuLimit(cores, "some quota"))
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = f"--port={listener.getsockname()[1]}"
        result = CliRunner().invoke(app, ["up", "--model", str(tiny_folder), port, *options])
    *warning, refusal = result.output.splitlines()

    assert "is in use" in refusal
    assert bool(message) == bool(warning)
    assert message in " ".join(warning)


def test_several_facades_need_linux(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere one facade would get all connections, so several are refused, not just slow."""
    monkeypatch.setattr("trivium.cli.up.sys.platform", "darwin")
    result = CliRunner().invoke(app, ["up", "--model", str(tiny_folder), "--facades", "2"])

    assert 2 == result.exit_code
    assert result.output.startswith("trivium up: --facades 2: only Linux ")


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (["--tokenizers=2", "--tokenizer-port=65500"], "--tokenizer-port"),
        (["--tokenizers=2", "--tokenizer-metrics-port=65500"], "--tokenizer-metrics-port"),
        (["--facades=2", "--facade-metrics-port=65500"], "--facade-metrics-port"),
    ],
)
def test_replica_port_above_the_maximum_is_refused(
    options: list[str], option: str, tiny_folder: Path
) -> None:
    """Replicas listen 100 ports apart; one beyond the highest port is refused."""
    model = ("--model", str(tiny_folder))
    result = CliRunner().invoke(app, ["up", *model, *up_ports(), *options])

    assert 2 == result.exit_code
    assert (
        f"port 65600 is above the highest one, 65535; choose a lower port with {option}"
        in " ".join(result.output.splitlines())
    )


def test_default_ports_of_replicas_do_not_collide(tiny_folder: Path) -> None:
    """With the default ports, services and metrics of several models and replicas never collide."""
    pipeline = Pipeline(tiny_folder, more_models=(tiny_folder,) * 3, facades=4, tokenizers=4)
    stages = [dict(stage.environment) for stage in pipeline.stages()]
    ports = [
        value
        for stage in stages
        for name, value in stage.items()
        if name.endswith("_PORT") and name != "TRIVIUM_FACADE_REUSE_PORT"
    ]

    assert 4 * 3 * 2 == len(ports)
    assert 4 * 3 * 2 - 3 == len(set(ports))  # facades share one
    target = "127.0.0.1:50051,127.0.0.1:50151,127.0.0.1:50251,127.0.0.1:50351"
    assert target == stages[-1]["TRIVIUM_FACADE_TOKENIZER_TARGET"]


def test_searched_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not found is refused with the folders that were searched."""
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["up", "--model", "nobody"])

    assert result.exit_code == 2
    assert str(tmp_path / "models" / "nobody") in result.output.replace("\n", "")


def test_searched_folder_is_named_once() -> None:
    """An absolute path is the same in all of them."""
    result = CliRunner().invoke(app, ["up", "--model", "/nobody"])

    assert "searched /nobody" == result.output.strip().partition("; ")[2]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--log-level", "loud", "is not one of"),
        ("--drain-seconds", "nan", "nan is not between 0 and 3600 seconds"),
        ("--drain-seconds", "-1", "-1 is not between 0 and"),
        ("--drain-seconds", "3601", "3601 is not between 0 and"),
        ("--ready-seconds", "inf", "inf is not between 0 and"),
    ],
)
def test_invalid_option_is_named(option: str, value: str, message: str) -> None:
    """Not by the services' variables, which the user has not set."""
    result = CliRunner().invoke(app, ["up", option, value])
    output = " ".join(result.output.replace("│", " ").split())

    assert 2 == result.exit_code
    assert f"Invalid value for '{option}'" in output
    assert message in output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "TRIVIUM_TOKENIZER_TLS_CERT_FILE",
            "set both TRIVIUM_TOKENIZER_TLS_CERT_FILE and TRIVIUM_FACADE_TOKENIZER_TLS_CA_FILE",
        ),
        (
            "TRIVIUM_TOKENIZER_GENERATOR_TLS_CA_FILE",
            "set both TRIVIUM_GENERATOR_TLS_CERT_FILE and TRIVIUM_TOKENIZER_GENERATOR_TLS_CA_FILE",
        ),
        (
            "TRIVIUM_FACADE_TLS_CLIENT_CA_FILE",
            "TRIVIUM_FACADE_TLS_CLIENT_CA_FILE requires --facade-metrics-port",
        ),
        (
            "TRIVIUM_FACADE_TOKENIZER_TLS_KEY_FILE",
            "TRIVIUM_FACADE_TOKENIZER_TLS_KEY_FILE: requires TLS_CERT_FILE",
        ),
    ],
)
def test_tls_on_one_side_only_is_refused(
    setting: str, message: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is started, as such services would wait for each other forever."""
    files = Files(tmp_path / "tls").write(trustme.CA())
    monkeypatch.setenv(setting, str(files.key if "KEY" in setting else files.certificate))
    result = CliRunner().invoke(app, ["up", "--model", str(tiny_folder)])

    assert 2 == result.exit_code
    assert message in result.output


def test_an_empty_model_folder_is_refused(tmp_path: Path) -> None:
    """A folder that holds no model is refused before anything is started."""
    result = CliRunner().invoke(app, ["up", "--model", str(tmp_path)])

    assert result.exit_code == 2
    assert "empty" in result.output


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user is just a number, as in many containers: there is no home folder."""
    for name in ("TRIVIUM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)


@pytest.mark.usefixtures("no_home")
def test_a_model_folder_is_found_without_a_home_folder(tiny_folder: Path) -> None:
    """Only the cache needs one."""
    assert tiny_folder == find_model(str(tiny_folder), "cpu").folder


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("command", ["up", "doctor"])
def test_without_a_home_folder_the_cache_has_to_be_set(command: str) -> None:
    """The embedded model, which is in the cache, is refused in one line that says so."""
    result = CliRunner().invoke(app, [command])

    assert "the home folder is unknown: set TRIVIUM_CACHE" in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_model_folder_that_may_not_be_read_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, as the services do; not as JSON that is invalid."""
    for name in ("iterdir", "read_text"):
        with monkeypatch.context() as denying:
            denying.setattr(Path, name, _denied)
            result = CliRunner().invoke(app, ["up", "--model", str(tiny_folder)])
        assert 2 == result.exit_code
        assert "Permission denied" in result.output
        assert "JSON" not in result.output


def _denied(path: Path, encoding: str = "") -> str:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_packages_missing_for_the_export_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the model and what is needed to export it, the message says what to install."""
    hide = f"import sys\nsys.modules.update(dict.fromkeys({PACKAGES}))\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["up"])

    message = capfd.readouterr().err
    assert result.exit_code == 2
    assert f"smollm2-135m-instruct to {tmp_path}" in message
    assert ", ".join(PACKAGES) in message
    assert "-m pip install 'trivium[export]'" in message


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        (0, "generator_svc.config.GeneratorSettings"),
        (1, "tokenizer_svc.config.TokenizerSettings"),
        (2, "rest_facade.config.FacadeSettings"),
    ],
)
def test_every_variable_it_sets_is_a_setting(
    number: int, settings: str, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """What `up` puts into the environment of a service is what the service reads."""
    stage = Pipeline(tiny_folder, port=8123).stages()[number]
    for name, value in stage.environment.items():
        monkeypatch.setenv(name, value)
    module, _, name = settings.rpartition(".")
    cls: type[BaseSettings] = getattr(importlib.import_module(module), name)
    prefix = cls.model_config["env_prefix"]

    assert stage.name == module.partition(".")[0]
    known = {f"{prefix}{field}".upper() for field in cls.model_fields}
    assert stage.environment.keys() <= known | {"GLIBC_TUNABLES"}
    for field, value in cls().model_dump().items():
        wanted = stage.environment.get(f"{prefix}{field}".upper())
        assert not wanted or str(value) == wanted


@pytest.mark.parametrize(
    ("variable", "settings"),
    [
        ("TRIVIUM_GENERATOR_SLOTS", "generator_svc.config.GeneratorSettings"),
        ("TRIVIUM_TOKENIZER_PORT", "tokenizer_svc.config.TokenizerSettings"),
        ("TRIVIUM_FACADE_PORT", "rest_facade.config.FacadeSettings"),
    ],
)
def test_empty_variable_means_the_default(
    variable: str, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It means the default, as for `VARIABLE: ${VARIABLE:-}` in a compose file."""
    module, _, name = settings.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    monkeypatch.setenv("TRIVIUM_GENERATOR_MODEL_DIRECTORY", "models/any")
    monkeypatch.setenv("TRIVIUM_TOKENIZER_MODEL_DIRECTORY", "models/any")
    default = cls()
    monkeypatch.setenv(variable, "")

    assert default == cls()


def test_generator_uses_huge_pages(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    """Only the generator, and not if the user has set GLIBC_TUNABLES."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    given = [stage.environment.get("GLIBC_TUNABLES") for stage in Pipeline(tiny_folder).stages()]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    left = [stage.environment.get("GLIBC_TUNABLES") for stage in Pipeline(tiny_folder).stages()]

    assert ["glibc.malloc.hugetlb=1", None, None] == given
    assert [None, None, None] == left


def test_no_drain_notice_on_one_machine(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    """Ctrl-C is quick, as there is no load balancer to notify, unless the user sets a notice."""
    names = [f"TRIVIUM_{name}_DRAIN_NOTICE_SECONDS" for name in ("GENERATOR", "TOKENIZER")]
    monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv(names[1], "7")
    stages = Pipeline(tiny_folder).stages()

    assert "0.0" == stages[0].environment.get(names[0])
    assert names[1] not in stages[1].environment


def test_banner_shows_what_is_in_use() -> None:
    """The banner shows model, provider, memory, limits and addresses as the server reports them."""
    info = generator_pb2.GetModelInfoResponse(
        id="tiny",
        revision="0123abcd",
        context_length=8192,
        execution_provider="CPUExecutionProvider",
        dtype="float32",
        precision="int8",
        slots=16,
        kv_cache_bytes=512 * 2**20,
        max_n=128,
        max_queued_requests=1000,
        max_queued_tokens=100_000,
    )
    limits = CpuLimit(3, "quota of 3.5 CPUs in /a"), MemoryLimit(2**31, 2**30, "memory limit in /b")
    pipeline = Pipeline(Path("tiny"), host="0.0.0.0", port=8123)
    text = banner([info], [130 * 2**20], pipeline, keys=False, limits=limits)

    wanted = (
        "tiny",
        "0123abcd",
        "int8",
        "CPUExecutionProvider",
        "8,192",
        "16",
        "512 MiB",
        "128",
        "130 MiB",
    )
    wanted += ("3 cores (quota of 3.5 CPUs in /a)", "1.00 of 2.00 GiB", "memory limit in /b")
    assert [] == [word for word in (*wanted, "1,000", "100,000") if word not in text]
    assert "http://127.0.0.1:8123/v1/chat/completions" in text
    assert "127.0.0.1:50051" in text
    assert "Bearer" not in text
    assert "1 facade, 1 tokenizer, 1 generator; " in text
    assert "http://127.0.0.1:8123/metrics" in text
    assert "http://127.0.0.1:8123/  (in a browser)" in text


def test_banner_of_a_base_model_shows_completions() -> None:
    """Its snippets are plain completions, as chats would be refused."""
    info = generator_pb2.GetModelInfoResponse(id="base")
    limits = CpuLimit(2, ""), MemoryLimit(2**31, 2**30, "")
    text = banner([info], [0], Pipeline(Path("base")), False, limits, has_chat_template=False)

    assert "http://127.0.0.1:8000/v1/completions" in text
    assert "client.completions.create(" in text
    assert "chat.completions" not in text
    assert "chat/completions" not in text


def test_banner_shows_every_replica() -> None:
    """How many there are of each service, where their metrics are, and how to start more."""
    pipeline = Pipeline(Path("tiny"), port=8123, facades=2, tokenizers=2)
    limits = CpuLimit(8, "8 logical CPUs"), memory_limit()
    text = banner(
        [generator_pb2.GetModelInfoResponse()],
        [0],
        pipeline,
        keys=False,
        limits=limits,
    )

    assert (
        "2 facades, 2 tokenizers, 1 generator; start more with --facades and --tokenizers" in text
    )
    assert "http://127.0.0.1:9050/metrics, http://127.0.0.1:9150/metrics" in text
    assert "127.0.0.1:50051,127.0.0.1:50151 " in text


def test_banner_omits_disabled_features() -> None:
    """Disabled features have no line."""
    info, limits = generator_pb2.GetModelInfoResponse(), (cpu_limit(), memory_limit())
    pipeline = Pipeline(Path("tiny"))
    text = banner(
        [info],
        [0],
        pipeline,
        keys=False,
        limits=limits,
        disabled={"chat", "docs", "metrics", "reflection"},
    )

    assert not [
        word for word in ("in a browser", "/docs", "/metrics", "reflection") if word in text
    ]


@pytest.mark.parametrize("value", ["", "true", "1", "on", "false", "0", "off"])
def test_banner_reads_settings_as_the_facade_does(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command and the facade read these settings in the same way."""
    for name in ("CHAT_PAGE", "DOCS", "METRICS"):
        monkeypatch.setenv(f"TRIVIUM_FACADE_{name}", value)
    settings = FacadeSettings()
    offered = {"chat": settings.chat_page, "docs": settings.docs, "metrics": settings.metrics}

    assert {name for name, offers in offered.items() if not offers} == disabled_features()


@pytest.mark.parametrize("value", ["", "keys.toml"])
def test_the_banner_asks_for_keys_as_the_facade_does(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty variable names no key file."""
    monkeypatch.setenv("TRIVIUM_FACADE_API_KEYS_FILE", value)

    assert (FacadeSettings().api_keys_file is not None) == requires_api_keys()


def test_the_banner_shows_where_a_key_goes() -> None:
    """With API keys the snippets take the key from OPENAI_API_KEY, as the clients do."""
    info, limits = generator_pb2.GetModelInfoResponse(), (cpu_limit(), memory_limit())
    text = banner([info], [0], Pipeline(Path("tiny")), keys=True, limits=limits)

    assert 'Authorization: Bearer $OPENAI_API_KEY"' in text
    assert 'api_key="none"' not in text


def test_addresses() -> None:
    """A server bound to all addresses is reached over loopback; IPv6 gets brackets."""
    assert authority("0.0.0.0", 1) == "127.0.0.1:1"
    assert authority("::1", 2) == "[::1]:2"
    assert authority("10.0.0.5", 3) == "10.0.0.5:3"
