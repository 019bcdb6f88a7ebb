"""Tracing that is off, or cannot be turned on."""

import os
import subprocess
import sys

import pytest

STAGES = ("rest_facade", "tokenizer_svc", "generator_svc")
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in its own process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("environment", [{}, ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}])
def test_without_an_endpoint_nothing_is_imported(stage: str, environment: dict[str, str]) -> None:
    """Neither the SDK nor an exporter is imported, even if installed, or if traces are off."""
    done = run(
        f"import sys, {stage}.__main__\n"
        "from trivium.wire import tracing\n"
        "with tracing.export_spans('s', 's'), tracing.call('c', {}, True) as span:\n"
        "    assert not span.is_recording\n"
        "print([name for name in sys.modules\n"
        "       if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])",
        **environment,
    )

    assert ("[]\n", "") == (done.stdout, done.stderr)


def test_an_endpoint_without_opentelemetry_is_refused() -> None:
    """One line says what to install."""
    done = run(
        "import sys\nsys.modules['opentelemetry.sdk'] = None\n"
        "from trivium.wire import tracing\nwith tracing.export_spans('s', 's'): pass",
        **ENDPOINT,
    )

    assert 2 == done.returncode
    assert done.stderr.startswith(
        "OTEL_EXPORTER_OTLP_ENDPOINT is set, which requires 'trivium[otel]'"
    )
    assert 1 == len(done.stderr.splitlines())


def test_an_unknown_protocol_is_refused() -> None:
    """One line names the variable."""
    done = run(
        "from trivium.wire import tracing\nwith tracing.export_spans('s', 's'): pass",
        **ENDPOINT,
        OTEL_EXPORTER_OTLP_PROTOCOL="http/json",
    )

    assert 2 == done.returncode
    assert (
        "OTEL_EXPORTER_OTLP_PROTOCOL: expected grpc or http/protobuf, not 'http/json'\n"
        == done.stderr
    )
