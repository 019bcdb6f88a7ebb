"""`python -m generator_svc`: loads the model, warms it up and serves until it is stopped."""

from trivium.wire.stop_signals import exit_on_stop_signal

if __name__ == "__main__":
    exit_on_stop_signal()  # before the other imports, which take seconds

import asyncio
import os
import sys

from generator_svc.config import GeneratorSettings
from generator_svc.cuda import CudaError
from generator_svc.device import DeviceError
from generator_svc.memory_plan import MemoryPlanError
from generator_svc.server import serve
from generator_svc.startup import load_runner
from trivium.keys.settings import open_keys
from trivium.model_directory import ModelDirectoryError, load_model_directory
from trivium.wire import telemetry, tracing
from trivium.wire.garbage_collection import tune_garbage_collection
from trivium.wire.listening import refuse_taken_ports
from trivium.wire.open_files import raise_open_file_limit
from trivium.wire.settings import load_settings, refuse_to_start, refuse_unguarded

# The engine's thread needs the GIL as soon as a run ends; the default, 5 ms, can last a step.
_SWITCH_INTERVAL_SECONDS = 0.0005


def main() -> None:
    """Exits with 0 after a stop signal, 1 after an engine failure, 2 if it cannot start."""
    settings = load_settings(GeneratorSettings)
    keys = open_keys("TRIVIUM_GENERATOR_API_KEYS_FILE", settings.api_keys_file)
    refuse_unguarded("TRIVIUM_GENERATOR_", settings.host, settings.is_guarded)
    refuse_taken_ports("TRIVIUM_GENERATOR_", settings.host, settings.port, settings.metrics_port)
    telemetry.configure_logging(settings.log_name, settings.log_level, settings.log_format)
    raise_open_file_limit()
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    try:
        model = load_model_directory(settings.model_directory)
        runner = load_runner(settings, model)
        tune_garbage_collection()
        # Not uvloop: it starts child processes by fork, which is unsafe with gRPC's threads.
        with tracing.export_spans("generator_svc", settings.log_name):
            status = asyncio.run(serve(settings, model, runner, keys))
    except (ModelDirectoryError, MemoryPlanError, DeviceError, CudaError, OSError) as error:
        refuse_to_start(f"generator_svc: {error}")  # for example, a port that is in use
    if status:
        os._exit(status)  # the interpreter's own exit would wait for a device that hangs
    sys.exit(status)


if __name__ == "__main__":
    main()
