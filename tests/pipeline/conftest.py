"""The three real services on a tiny model, shared by tests that leave them intact."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.openai_shapes import watched
from tests.pipeline.services import Services
from tests.tiny_models import tiny_model_directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.pipeline)


@pytest.fixture(autouse=True)
def openai_shapes() -> Iterator[None]:
    """Everything a test receives has OpenAI's shapes, or the test fails."""
    with watched():
        yield


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return tiny_model_directory()


@pytest.fixture(scope="session")
def shared_services(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Services]:
    with Services(tiny_model, tmp_path_factory.mktemp("services")) as services:
        yield services


@pytest.fixture
def services(shared_services: Services) -> Iterator[Services]:
    """Running services; after each test they become idle, with all device time accounted for."""
    yield shared_services
    metrics = shared_services.wait_until_idle()
    requests = metrics.get("trivium_device_request_nanoseconds_total", 0)
    overhead = metrics["trivium_device_overhead_nanoseconds_total"]
    assert metrics["trivium_device_busy_nanoseconds_total"] == requests + overhead


@pytest.fixture
def client(services: Services) -> Iterator[openai.OpenAI]:
    """The official client, which here rejects responses that do not fit its models."""
    with openai.OpenAI(
        base_url=f"{services.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client
