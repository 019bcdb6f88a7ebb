"""`trivium up`: starts and stops the three services on this machine together."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from trivium.cli.banner import banner
from trivium.cli.features import disabled_features, requires_api_keys
from trivium.cli.fit import DoesNotFit, memory_plans
from trivium.cli.models import ExportFailed, NamedModel, NoModel, find_model
from trivium.cli.pipeline import (
    DRAIN_SECONDS,
    LOG_LEVEL,
    LOOPBACK,
    Pipeline,
    PortTaken,
    SettingConflict,
)
from trivium.cli.probe import model_info
from trivium.cli.stage_drain import longest_drain
from trivium.cli.stage_keys import check_stage_keys
from trivium.cli.stage_tls import REST_CLIENT_CA, TlsMismatch, stage_tls
from trivium.cli.supervisor import NotReady, StageDied, Supervisor
from trivium.embedded_model import EMBEDDED_MODEL
from trivium.host_limits import cpu_limit, memory_limit
from trivium.keys.own_key import OwnKey
from trivium.model_directory import load_model_directory
from trivium.wire.listening import bare_host
from trivium.wire.stop_signals import stop_signals

STOPPED, FAILED, REFUSED = 0, 1, 2
# A stage that has not ended this long after its own drain limit is hung, and gets killed.
STOP_SLACK_SECONDS = 10.0


class Device(StrEnum):
    """Where the model runs; `auto` is CUDA if it works, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class LogLevel(StrEnum):
    """The lowest severity that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _seconds(longest: int) -> Callable[[float | None], float | None]:
    """Checks an option's range; click's own check does not handle nan."""

    def checked(value: float | None) -> float | None:
        if value is not None and not 0 <= value <= longest:
            raise typer.BadParameter(f"{value:g} is not between 0 and {longest} seconds.")
        return value

    return checked


ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Model folder, or its name in ./models or the cache; or a checkpoint, which is "
        "first exported to the cache (int8, on CUDA fp16): a Hugging Face folder, a .gguf file, "
        "or owner/name on the Hugging Face Hub. Repeat for several models, each with its own "
        "generator. Default: TRIVIUM_GENERATOR_MODEL_DIRECTORY, or the embedded model.",
    ),
]
DeviceOption = Annotated[
    Device, typer.Option(envvar="TRIVIUM_GENERATOR_DEVICE", help="Device that runs the model.")
]
HostOption = Annotated[
    str,
    typer.Option(envvar="TRIVIUM_FACADE_HOST", callback=bare_host, help="Address of the REST API."),
]
PortOption = Annotated[
    int, typer.Option(min=1, max=65535, envvar="TRIVIUM_FACADE_PORT", help="Port of the REST API.")
]
FacadeMetricsPortOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=65535,
        envvar="TRIVIUM_FACADE_METRICS_PORT",
        help="Port of the facade's metrics; 0: that of the REST API, or with several facades "
        "9050, 9150 …",
    ),
]
FacadesOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of processes that serve the REST API on one port (like vLLM's "
        "--api-server-count). More help if one saturates a core and other cores are idle.",
    ),
]
TokenizersOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of tokenizers, each for all models, on ports 100 apart. More help as with "
        "--facades.",
    ),
]
GrpcHostOption = Annotated[
    str,
    typer.Option(
        envvar="TRIVIUM_TOKENIZER_HOST", callback=bare_host, help="Address of the gRPC API."
    ),
]
TokenizerPortOption = Annotated[
    int,
    typer.Option(min=1, max=65535, envvar="TRIVIUM_TOKENIZER_PORT", help="Port of the gRPC API."),
]
TokenizerMetricsPortOption = Annotated[
    int,
    typer.Option(
        min=0, max=65535, envvar="TRIVIUM_TOKENIZER_METRICS_PORT", help="Port of its metrics."
    ),
]
GeneratorHostOption = Annotated[
    str,
    typer.Option(
        envvar="TRIVIUM_GENERATOR_HOST", callback=bare_host, help="Address of the generators."
    ),
]
GeneratorPortOption = Annotated[
    int,
    typer.Option(min=1, max=65535, envvar="TRIVIUM_GENERATOR_PORT", help="Port of the generator."),
]
GeneratorMetricsPortOption = Annotated[
    int,
    typer.Option(
        min=0, max=65535, envvar="TRIVIUM_GENERATOR_METRICS_PORT", help="Port of its metrics."
    ),
]
LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option(
        show_default=f"each one's …_LOG_LEVEL, or {LOG_LEVEL}",
        help="Minimum log level of all three services.",
    ),
]
DrainOption = Annotated[
    float | None,
    typer.Option(
        callback=_seconds(3600),
        show_default=f"each one's …_DRAIN_SECONDS, or {DRAIN_SECONDS:g}",
        help="Seconds that each service gives running requests to finish when it stops.",
    ),
]
ReadyOption = Annotated[
    float,
    typer.Option(
        callback=_seconds(86_400),
        help="Seconds to wait for the services to become ready.",
    ),
]


async def supervise(
    supervisor: Supervisor, when_ready: Callable[[], Awaitable[None]], ready_seconds: float
) -> int:
    """Runs until a signal asks to stop or a process dies; returns the exit status.

    The first stop signal drains, the second kills. If a stage refused its settings (status 2), that
    status is passed on; any other death gives 1.
    """
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            supervisor.kill()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in stop_signals():
        loop.add_signal_handler(number, on_signal)

    async def serve() -> None:
        await supervisor.wait_until_ready(ready_seconds)
        await when_ready()
        await supervisor.watch()

    async with supervisor:
        serving, stop = asyncio.ensure_future(serve()), asyncio.ensure_future(stopping.wait())
        try:
            await asyncio.wait({serving, stop}, return_when="FIRST_COMPLETED")
            if not stop.done():
                await serving
            typer.echo("Draining ... (Ctrl-C again to stop immediately)", err=True)
            return STOPPED
        except StageDied as error:
            typer.echo(f"trivium up: {error}; stopping the other processes", err=True)
            return REFUSED if error.returncode == REFUSED else FAILED
        except NotReady as error:
            typer.echo(f"trivium up: {error}", err=True)
            return FAILED
        finally:
            serving.cancel()
            stop.cancel()
            await asyncio.gather(serving, stop, return_exceptions=True)


def up(
    model: ModelOption = None,
    device: DeviceOption = Device.AUTO,
    host: HostOption = LOOPBACK,
    port: PortOption = 8000,
    facades: FacadesOption = 1,
    facade_metrics_port: FacadeMetricsPortOption = 0,
    tokenizers: TokenizersOption = 1,
    grpc_host: GrpcHostOption = LOOPBACK,
    tokenizer_port: TokenizerPortOption = 50051,
    tokenizer_metrics_port: TokenizerMetricsPortOption = 9051,
    generator_host: GeneratorHostOption = LOOPBACK,
    generator_port: GeneratorPortOption = 50052,
    generator_metrics_port: GeneratorMetricsPortOption = 9052,
    log_level: LogLevelOption = None,
    drain_seconds: DrainOption = None,
    ready_seconds: ReadyOption = 300.0,
) -> None:
    """Starts the three services on this machine, and stops them together.

    If one of the processes exits, the others are stopped too.

    Every setting of the services can also be given as an environment variable, see
    docs/configuration.md. Options take precedence over variables.
    """
    try:
        check_stage_keys()
        tls = stage_tls()
    except (SettingConflict, TlsMismatch) as mismatch:
        _refuse(str(mismatch))
    models = _find_models(model, device)
    if tls.is_mutual and facades == 1 and not facade_metrics_port:
        _refuse(
            f"{REST_CLIENT_CA} requires --facade-metrics-port, where the facade can be probed "
            "for readiness"
        )
    pipeline = Pipeline(
        model=models[0].folder,
        more_models=tuple(model.folder for model in models[1:]),
        aliases=tuple(model.alias for model in models),
        device=device.value,
        host=host,
        port=port,
        facades=facades,
        facade_metrics_port=facade_metrics_port,
        tokenizers=tokenizers,
        grpc_host=grpc_host,
        tokenizer_port=tokenizer_port,
        tokenizer_metrics_port=tokenizer_metrics_port,
        generator_host=generator_host,
        generator_port=generator_port,
        generator_metrics_port=generator_metrics_port,
        log_level=None if log_level is None else log_level.value,
        drain_seconds=drain_seconds,
        tls=tls,
    )
    if facades > 1 and sys.platform != "linux":
        _refuse(
            f"--facades {facades}: only Linux balances connections across processes that share a "
            "port"
        )
    _warn_if_too_few_cores(pipeline)
    try:
        pipeline.check_environment()
        pipeline.check_ports()
        for line in memory_plans(pipeline):
            typer.echo(line, err=True)
    except (SettingConflict, PortTaken) as fault:
        _refuse(str(fault))
    except DoesNotFit as refused:
        _end(refused.status)
    stop_seconds = longest_drain(drain_seconds) + STOP_SLACK_SECONDS
    raise typer.Exit(asyncio.run(_run(pipeline, ready_seconds, stop_seconds)))


async def _run(pipeline: Pipeline, ready_seconds: float, stop_seconds: float) -> int:
    async def when_ready() -> None:
        key_file = os.environ.get("TRIVIUM_TOKENIZER_GENERATOR_API_KEY_FILE")
        key = OwnKey(Path(key_file)) if key_file else None
        infos = [
            await model_info(target, key, pipeline.tls.generator)
            for target in pipeline.generator_targets
        ]
        models = [load_model_directory(folder) for folder in pipeline.models]
        weights = [model.weight_bytes for model in models]
        limits, has_chat_template = (cpu_limit(), memory_limit()), models[0].has_chat_template
        keys, disabled = requires_api_keys(), disabled_features()
        text = banner(infos, weights, pipeline, keys, limits, disabled, has_chat_template)
        sys.stdout.write(text)
        sys.stdout.flush()

    return await supervise(Supervisor(pipeline.stages(), stop_seconds), when_ready, ready_seconds)


def _warn_if_too_few_cores(pipeline: Pipeline) -> None:
    """As with uvicorn's workers, more processes than cores are allowed, but of no use."""
    limit, count = cpu_limit(), len(pipeline.stages())
    counts = {"--facades": pipeline.facades, "--tokenizers": pipeline.tokenizers}
    options = [f"{name} {value}" for name, value in counts.items() if value > 1]
    if options and count > limit.cores:
        typer.echo(
            f"trivium up: {' and '.join(options)}: {count} processes share {limit}; more "
            "processes than cores do not help",
            err=True,
        )


def _find_models(names: list[str] | None, device: Device) -> list[NamedModel]:
    # Not by the option's envvar, which would split a path at its spaces.
    names = names or [os.environ.get("TRIVIUM_GENERATOR_MODEL_DIRECTORY") or EMBEDDED_MODEL]
    try:
        models = [find_model(name, device.value) for name in names]
    except NoModel as unknown:
        _refuse(str(unknown))
    except ExportFailed as failed:
        _end(failed.status)
    if len({model.folder.name for model in models}) < len(models):
        _refuse("two models have the same id, which is the folder's name")
    return models


def _end(status: int) -> NoReturn:
    """Ends because a child process did, with this status, and has said why."""
    raise typer.Exit(REFUSED if status == REFUSED else FAILED)


def _refuse(message: str) -> NoReturn:
    typer.echo(f"trivium up: {message}", err=True)
    raise typer.Exit(REFUSED)
