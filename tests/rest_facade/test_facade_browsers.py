"""Pages from other origins that call the API from a browser."""

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from rest_facade.config import FacadeSettings
from tests.rest_facade.conftest import StartFacade
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend, delta, header
from trivium.wire.errors import ServiceError

PAGE, OTHER_PAGE, STRANGER = "https://chat.example.org", "http://localhost:3000", "https://evil.org"
URL = "/v1/chat/completions"
REQUEST: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


def preflight(origin: str, **headers: str) -> dict[str, str]:
    """The headers that a browser sends before a request with a key."""
    return {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    } | headers


async def start(start_facade: StartFacade, tmp_path: Path, **settings: Any) -> httpx.AsyncClient:
    """A facade that requires the key `secret` and allows two origins."""
    keys = tmp_path / "keys"
    keys.write_text(hashlib.sha256(b"secret").hexdigest())
    origins = {"cors_origins": f"{PAGE}, {OTHER_PAGE}"}
    client: httpx.AsyncClient = await start_facade(api_keys_file=keys, **(origins | settings))
    return client


@pytest.mark.parametrize("origin", [PAGE, OTHER_PAGE])
async def test_a_preflight_needs_no_key(
    start_facade: StartFacade, tmp_path: Path, origin: str
) -> None:
    """A preflight has no key; the answer allows the request with its headers."""
    client = await start(start_facade, tmp_path)
    answer = await client.options(URL, headers=preflight(origin))

    assert 204 == answer.status_code
    assert origin == answer.headers["access-control-allow-origin"]
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
    assert "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in answer.headers


async def test_a_public_page_may_call_a_private_address(
    start_facade: StartFacade, tmp_path: Path
) -> None:
    """Browsers ask for this too before a page may call a server on a private address."""
    client = await start(start_facade, tmp_path)
    wanted = preflight(PAGE, **{"access-control-request-private-network": "true"})
    answer = await client.options(URL, headers=wanted)

    assert "true" == answer.headers["access-control-allow-private-network"]


async def test_an_unlisted_origin_is_refused(start_facade: StartFacade, tmp_path: Path) -> None:
    """A page that is not listed gets no header that would let its browser read the answer."""
    client = await start(start_facade, tmp_path)
    refused = await client.options(URL, headers=preflight(STRANGER))
    answer = await client.get("/health/live", headers={"origin": STRANGER})

    assert 400 == refused.status_code
    assert "Disallowed CORS origin." == refused.json()["error"]["message"]
    for reply in (refused, answer):
        assert "access-control-allow-origin" not in reply.headers


async def test_every_response_has_cors_headers(
    start_facade: StartFacade, backend: ScriptedBackend, tmp_path: Path
) -> None:
    """This matters most for errors: a page that cannot read them cannot explain them."""
    client = await start(start_facade, tmp_path)
    client.headers.update({"origin": PAGE, "authorization": "Bearer secret"})
    answers = [
        await client.post(URL, json=REQUEST),
        await client.post(URL, json=REQUEST | {"stream": True}),
        await client.post(URL, json=REQUEST, headers={"authorization": "Bearer wrong"}),
        await client.post(URL, json=REQUEST | {"temperature": 3}),
        await client.get("/v1/nothing"),
        await client.get(URL),
    ]
    backend.script = [ServiceError("queue_full", "Full.", retry_after=7)]
    answers += [
        await client.post(URL, json=REQUEST),
        await client.post(URL, json=REQUEST | {"stream": True}),
    ]
    backend.script = [header(), delta("He"), ServiceError("backend_unavailable", "Gone.")]
    answers += [await client.post(URL, json=REQUEST | {"stream": True})]
    await backend.die()
    answers += [await client.post(URL, json=REQUEST)]

    statuses = [200, 200, 401, 400, 404, 405, 429, 429, 200, 503]
    assert statuses == [answer.status_code for answer in answers]
    for answer in answers:
        assert PAGE == answer.headers["access-control-allow-origin"]
        exposed = answer.headers["access-control-expose-headers"]
        for name in ("x-request-id", "retry-after", "x-should-retry"):
            assert name in exposed
        assert answer.headers["x-request-id"]


async def test_an_asterisk_allows_any_origin(start_facade: StartFacade, tmp_path: Path) -> None:
    """An asterisk allows all pages."""
    client = await start(start_facade, tmp_path, cors_origins="*")
    asked = await client.options(URL, headers=preflight(STRANGER))
    answer = await client.get("/health/live", headers={"origin": STRANGER})

    assert 204 == asked.status_code
    assert ["*", "*"] == [r.headers["access-control-allow-origin"] for r in (asked, answer)]


async def test_no_origin_is_allowed_by_default(client: httpx.AsyncClient) -> None:
    """Without the setting no answer has a CORS header."""
    asked = await client.options(URL, headers=preflight(PAGE))
    answer = await client.post(URL, json=REQUEST, headers={"origin": PAGE})

    assert [405, 200] == [asked.status_code, answer.status_code]
    for reply in (asked, answer):
        assert not [name for name in reply.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origin", ["chat.example.org", PAGE + "/", PAGE + "/chat", "**"])
def test_invalid_origins_are_refused(origin: str) -> None:
    """An origin with a trailing slash would never match; it is refused at startup."""
    with pytest.raises(ValueError, match="is not an origin"):
        FacadeSettings(cors_origins=f"{OTHER_PAGE},{origin}")
