"""`python -m rest_facade`: reads the settings, refuses unsafe ones, serves."""

from trivium.wire.stop_signals import exit_on_stop_signal

if __name__ == "__main__":
    exit_on_stop_signal()  # before the other imports, which take seconds

from rest_facade.config import FacadeSettings
from rest_facade.server import serve
from trivium.keys.settings import open_keys
from trivium.wire import tracing
from trivium.wire.garbage_collection import tune_garbage_collection
from trivium.wire.open_files import raise_open_file_limit
from trivium.wire.serving import run
from trivium.wire.settings import load_settings, refuse_unguarded
from trivium.wire.telemetry import configure_logging


def main() -> None:
    """Runs the facade; exits with status 2 if the settings cannot be used."""
    settings = load_settings(FacadeSettings)
    keys = open_keys("TRIVIUM_FACADE_API_KEYS_FILE", settings.api_keys_file)
    refuse_unguarded("TRIVIUM_FACADE_", settings.host, settings.is_guarded)
    configure_logging(settings.log_name, settings.log_level, settings.log_format)
    raise_open_file_limit()
    tune_garbage_collection()
    with tracing.export_spans("rest_facade", settings.log_name):
        run(serve(settings, keys))


if __name__ == "__main__":
    main()
