"""When clients disconnect, processes die or queues fill, nothing is lost and errors are clear."""

import concurrent.futures
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.pipeline.services import Services
from tests.tiny_models import tiny_model_directory

ENDLESS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Once upon a time"}],
    "ignore_eos": True,
    "seed": 1,
}


def body(services: Services, **fields: Any) -> dict[str, Any]:
    return {"model": services.model, **ENDLESS, **fields}


def events(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


@pytest.fixture
def own_services(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., Services]]:
    """Starts services that the test may break."""
    started: list[Services] = []

    def start(**settings: Any) -> Services:
        started.append(Services(tiny_model, tmp_path, **settings).__enter__())
        return started[-1]

    yield start
    for services in started:
        services.__exit__()


def test_cancelled_streams_do_not_affect_the_others(services: Services) -> None:
    """The other streams complete; then nothing runs, and every nanosecond is accounted for."""

    def stream(number: int) -> str:
        fields = {"stream": True, "max_tokens": 60, "seed": number}
        with httpx.stream(
            "POST",
            f"{services.url}/v1/chat/completions",
            json=body(services, **fields),
            timeout=60,
        ) as response:
            last = ""
            for count, event in enumerate(events(response)):
                last = event
                if number % 2 and count == 5:
                    return "cut"
            return last

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        ends = list(pool.map(stream, range(20)))

    assert ["[DONE]", "cut"] * 10 == ends
    services.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_its_slots(services: Services, stream: bool) -> None:
    """Streaming or not, a disconnected client's sequences end."""
    with httpx.Client() as client:
        request = client.build_request(
            "POST",
            f"{services.url}/v1/chat/completions",
            json=body(services, stream=stream, n=3),
        )
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pending = pool.submit(client.send, request, stream=True)
            services.until(lambda: services.is_running(3), "the request does not run")
            if stream:
                pending.result().close()
            client.close()
            if not stream:
                with pytest.raises(httpx.TransportError):
                    pending.result()
    services.wait_until_idle()


def test_overload_is_refused_at_once(own_services: Callable[..., Services]) -> None:
    """One request runs, one waits, and a third gets 429 with Retry-After; the others complete."""
    services = own_services(TRIVIUM_GENERATOR_SLOTS=1, TRIVIUM_GENERATOR_MAX_QUEUED_REQUESTS=1)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = []
        for count in (0, 1):
            fields = body(services, max_tokens=1900)
            url = f"{services.url}/v1/chat/completions"
            waiting.append(pool.submit(httpx.post, url, json=fields, timeout=60))
            services.until(lambda: services.is_running(1), "nothing runs")
            services.until(
                lambda wanted=count: (
                    services.generator_metrics()["vllm:num_requests_waiting"] == wanted
                ),
                "nothing waits",
            )
        refused = httpx.post(url, json=body(services))
        answers = [reply.result() for reply in waiting]

    assert (429, "queue_full") == (refused.status_code, refused.json()["error"]["code"])
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert [1900, 1900] == [a.json()["usage"]["completion_tokens"] for a in answers]


@pytest.mark.parametrize("victim", ["generator_svc", "tokenizer_svc"])
def test_a_stage_killed_mid_stream(own_services: Callable[..., Services], victim: str) -> None:
    """The stream ends with an error event, requests get 503, and succeed once the stage is back."""
    services = own_services()
    url = f"{services.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body(services, stream=True), timeout=60) as response:
        assert 200 == response.status_code
        stream = events(response)
        for _ in range(3):
            next(stream)
        services.kill(victim)
        rest = list(stream)
    refused = httpx.post(url, json=body(services))
    services.until(lambda: services.health() == 503, "/health is not 503")
    live = httpx.get(f"{services.url}/health/live").status_code
    services.start(victim)
    services.wait_until_ready()
    answer = httpx.post(url, json=body(services, max_tokens=3), timeout=60)

    assert "[DONE]" not in rest
    assert {"message", "type", "param", "code"} == set(json.loads(rest[-1])["error"])
    assert (503, "backend_unavailable") == (refused.status_code, refused.json()["error"]["code"])
    assert int(refused.headers["retry-after"]) >= 1
    assert 200 == live
    assert 200 == answer.status_code


@pytest.mark.parametrize("stage", ["generator_svc", "tokenizer_svc", "rest_facade"])
def test_sigterm_lets_running_streams_finish(
    own_services: Callable[..., Services], stage: str
) -> None:
    """The stream completes, new requests are refused, and the process exits with 0."""
    services = own_services()
    url = f"{services.url}/v1/chat/completions"
    fields = body(services, stream=True, max_tokens=1500)
    with httpx.stream("POST", url, json=fields, timeout=60) as response:
        stream = events(response)
        next(stream)
        services.terminate(stage)
        services.until(lambda: services.health() != 200, "/health is still 200")
        rest = list(stream)

    assert "[DONE]" == rest[-1]
    assert 0 == services.processes[stage].wait(30)


def test_stages_of_different_revisions_refuse_each_other(
    own_services: Callable[..., Services], tmp_path: Path
) -> None:
    """Another model with the same name is refused; it never answers with garbage."""
    services = own_services()
    twin = tmp_path / "other" / services.model
    twin.parent.mkdir()
    twin.symlink_to(tiny_model_directory("qwen2"))
    services.kill("generator_svc")
    services.start("generator_svc", TRIVIUM_GENERATOR_MODEL_DIRECTORY=twin)
    url = f"{services.url}/v1/chat/completions"
    deadline = time.monotonic() + 60
    while True:
        refused = httpx.post(url, json=body(services))
        if refused.json()["error"]["code"] != "backend_unavailable":
            break
        assert time.monotonic() < deadline

    assert (503, "revision_mismatch") == (refused.status_code, refused.json()["error"]["code"])
    # The facade stays ready for a moment, to allow for a replacement.
    services.until(lambda: services.health() == 503, "/health is still 200")
