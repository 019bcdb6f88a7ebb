"""A process that runs out of file descriptors logs it, and recovers once some are free."""

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.pipeline.services import STAGES, Services

NONE_LEFT, FREE_AGAIN = "file descriptors are in use", "file descriptors are available again"


@pytest.fixture(scope="module")
def services(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Services started with a soft limit below the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        services = Services(tiny_model, tmp_path_factory.mktemp("services")).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    yield services
    services.__exit__()


def port_of(services: Services, stage: str) -> int:
    pipeline = services.pipeline
    ports = {
        "rest_facade": pipeline.port,
        "tokenizer_svc": pipeline.tokenizer_port,
        "generator_svc": pipeline.generator_port,
    }
    return ports[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_the_open_file_limit_is_raised_to_the_hard_limit(services: Services, stage: str) -> None:
    """Serving thousands of clients does not need `ulimit -n`."""
    soft, hard = resource.prlimit(services.processes[stage].pid, resource.RLIMIT_NOFILE)

    assert min(hard, 2**20) == soft


@pytest.mark.parametrize("stage", STAGES)
def test_running_out_of_file_descriptors_is_logged_and_recovers(
    services: Services, stage: str
) -> None:
    """The log reports connections that cannot be accepted; later ones are served again."""
    pid = services.processes[stage].pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    said = services.log(stage).count(NONE_LEFT)
    resource.prlimit(
        pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())) + 5, before[1])
    )
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            address = ("127.0.0.1", port_of(services, stage))
            stack.enter_context(socket.create_connection(address, timeout=10))
        services.until(lambda: services.log(stage).count(NONE_LEFT) > said, "nothing was logged")
    services.until(lambda: FREE_AGAIN in services.log(stage), "no descriptor became free")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    services.wait_until_ready()
    body = {
        "model": services.model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 3,
    }
    reply = httpx.post(f"{services.url}/v1/chat/completions", json=body, timeout=60)

    assert 200 == reply.status_code
