"""`python -m tokenizer_svc`: loads tokenizers and templates, serves until a stop signal."""

from trivium.wire.stop_signals import StopSignals, exit_on_stop_signal

if __name__ == "__main__":
    exit_on_stop_signal()  # before the other imports, which take seconds

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from tokenizer_svc.config import TokenizerSettings
from tokenizer_svc.metrics import Metrics
from tokenizer_svc.models import Model
from tokenizer_svc.server import TokenizerServer, load_models
from trivium.host_limits import cpu_limit
from trivium.keys.key_file import KeyFile
from trivium.keys.settings import open_keys
from trivium.model_directory import ModelDirectoryError
from trivium.wire import telemetry, tracing
from trivium.wire.garbage_collection import tune_garbage_collection
from trivium.wire.listening import refuse_taken_ports
from trivium.wire.metrics_server import serve_metrics
from trivium.wire.open_files import raise_open_file_limit
from trivium.wire.serving import run
from trivium.wire.settings import load_settings, refuse_to_start, refuse_unguarded

log = logging.getLogger("tokenizer_svc")


async def serve(settings: TokenizerSettings, models: list[Model], keys: KeyFile | None) -> None:
    """Serves until a stop signal, then drains."""
    # Long texts are encoded in threads; more threads than cores would not make it faster.
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(cpu_limit().cores, "encode"))
    signals = StopSignals()
    metrics = Metrics()
    server = TokenizerServer(settings, models, metrics, keys)
    await server.start()
    serve_metrics(settings.metrics_port, settings.host, metrics.registry, server.check_ready)
    ids = ", ".join(model.id for model in models)
    log.info("serving %s on port %d", ids, server.port)
    await signals.first.wait()
    log.info("draining")
    await server.drain(signals.second)


def main() -> None:
    settings = load_settings(TokenizerSettings)
    keys = open_keys("TRIVIUM_TOKENIZER_API_KEYS_FILE", settings.api_keys_file)
    refuse_unguarded("TRIVIUM_TOKENIZER_", settings.host, settings.is_guarded)
    refuse_taken_ports("TRIVIUM_TOKENIZER_", settings.host, settings.port, settings.metrics_port)
    telemetry.configure_logging(settings.log_name, settings.log_level, settings.log_format)
    raise_open_file_limit()
    try:
        models = load_models(settings)
        tune_garbage_collection()
        with tracing.export_spans("tokenizer_svc", settings.log_name):
            run(serve(settings, models, keys))
    except (ModelDirectoryError, OSError) as error:  # such as a port already in use
        refuse_to_start(f"tokenizer_svc: {error}")


if __name__ == "__main__":
    main()
