"""API keys, as seen by clients and operators."""

import errno
import hashlib
import os
from pathlib import Path

import httpx
import pytest

from tests.rest_facade.conftest import StartFacade
from trivium.keys import watched_file
from trivium.keys.key_file import KeyFile, KeyFileError
from trivium.wire.errors import ServiceError


def digest(key: str) -> str:
    """The digest of `key`, as in the file."""
    return hashlib.sha256(key.encode()).hexdigest()


def accepts(keys: KeyFile, key: str) -> bool:
    """Whether `key` is accepted."""
    try:
        keys.check(f"Bearer {key}")
    except ServiceError:
        return False
    return True


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the keys `one`, labelled, and `two`."""
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n{digest('one')} alice\n{digest('two').upper()} # bob\n")
    return path


async def test_the_api_requires_a_key(start_facade: StartFacade, file: Path) -> None:
    """With a key file, requests need one of its keys, and each of them works."""
    client: httpx.AsyncClient = await start_facade(api_keys_file=file)

    for key in ("one", "two"):
        answer = await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200
    for header in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic b25l"}):
        answer = await client.get("/v1/models", headers=header)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_endpoints_that_need_no_key(start_facade: StartFacade, file: Path) -> None:
    """Health, metrics and documentation need no key."""
    client: httpx.AsyncClient = await start_facade(api_keys_file=file)
    paths = ("/health", "/health/live", "/metrics", "/docs", "/openapi.json")

    assert [200] * 5 == [(await client.get(path)).status_code for path in paths]


def test_the_key_file_is_reloaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed file takes effect without a restart, and a broken one changes nothing."""
    monkeypatch.setattr(watched_file, "CHECK_SECONDS", 0)
    keys = KeyFile(file)
    file.write_text(digest("three"))

    assert not accepts(keys, "one")
    assert accepts(keys, "three")
    file.write_text("not a digest")
    assert accepts(keys, "three")
    file.unlink()
    assert accepts(keys, "three")
    file.write_text("# nobody any more")
    assert not accepts(keys, "three")


def test_a_key_file_that_could_not_be_read_is_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes effect once it can be read, for example when its permissions are right, although it
    has not been modified since. Meanwhile one line of the log says why it does not."""
    monkeypatch.setattr(watched_file, "CHECK_SECONDS", 0)
    keys = KeyFile(file)
    file.write_text(digest("three"))

    with monkeypatch.context() as unreadable:
        unreadable.setattr(Path, "read_text", _denied)
        assert accepts(keys, "one")
        assert accepts(keys, "two")
    assert ["Permission denied" in record.message for record in caplog.records] == [True]
    assert not accepts(keys, "one")
    assert accepts(keys, "three")


def _denied(path: Path, encoding: str) -> str:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_invalid_key_files_are_refused(tmp_path: Path) -> None:
    """A missing file and a line that is not a digest are refused; the error names the line."""
    path = tmp_path / "keys"
    with pytest.raises(KeyFileError, match="No such file"):
        KeyFile(path)
    path.write_text(f"{digest('one')}\nsk-plain-text-key\n")
    with pytest.raises(KeyFileError, match="line 2") as caught:
        KeyFile(path)

    assert "sk-plain" not in str(caught.value)


def test_key_names_come_from_the_file(file: Path) -> None:
    """By the word after the digest, or by the digest; of a key that is there twice, the first line
    counts."""
    file.write_text(f"{file.read_text()}{digest('one')} carol\n")
    keys = KeyFile(file)

    assert ["alice", digest("two")[:12]] == [keys.check(f"Bearer {k}").name for k in ("one", "two")]


def test_non_ascii_keys_are_refused(file: Path) -> None:
    """Non-ASCII keys are refused like any wrong key."""
    keys = KeyFile(file)

    assert not accepts(keys, "ÿ\u20ac")
    assert not accepts(keys, "")
