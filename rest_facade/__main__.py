"""`python -m rest_facade`: reads the settings, refuses what would be unsafe, serves."""

from rest_facade.auth import KeyFile, KeyFileError
from rest_facade.config import FacadeSettings
from rest_facade.server import serve
from trivium.wire import tracing
from trivium.wire.open_files import prepare_open_files
from trivium.wire.serving import end_at_stop_signal, run
from trivium.wire.settings import load_settings, refuse_to_start
from trivium.wire.telemetry import configure_logging


def main() -> None:
    """Runs the facade; ends with status 2 when it was told something it cannot do."""
    end_at_stop_signal()
    settings = load_settings(FacadeSettings)
    keys = None
    if settings.api_keys_file is not None:
        try:
            keys = KeyFile(settings.api_keys_file)
        except KeyFileError as error:
            refuse_to_start(f"TRIVIUM_FACADE_API_KEYS_FILE: {error}")
    if settings.exposes_without_keys():
        refuse_to_start(
            f"TRIVIUM_FACADE_HOST: {settings.host} can be reached from outside and no API keys "
            "are set. Set TRIVIUM_FACADE_API_KEYS_FILE, or "
            "TRIVIUM_FACADE_ALLOW_UNAUTHENTICATED_REMOTE=true to serve everyone."
        )
    configure_logging(settings.log_name, settings.log_level, settings.log_format)
    prepare_open_files()
    with tracing.exported("rest_facade", settings.log_name):
        run(serve(settings, keys))


if __name__ == "__main__":
    main()
