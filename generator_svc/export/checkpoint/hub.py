"""Fetches a checkpoint from the Hugging Face Hub: only the files needed, into the hub's own cache.

All features of huggingface_hub apply: HF_ENDPOINT, HF_TOKEN and the token file, HF_HUB_OFFLINE,
HF_HOME, its cache layout, and resuming partial downloads.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generator_svc.export.checkpoint.config import read_config
from generator_svc.export.checkpoint.files import CONFIG_FILE, INDEX_FILE, Kind, choose_files
from generator_svc.export.errors import ExportError
from trivium.hub_name import HubName

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoSibling

DownloadProgress = Callable[[int, int], None]
"""Called with the bytes downloaded so far and the total."""

MAX_STREAMS = 4  # files at a time; a single connection seldom saturates the network
_POLL_SECONDS = 0.25
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(name: HubName, progress: DownloadProgress) -> tuple[Kind, Path]:
    """The folder of a checkpoint, or the path of a GGUF file; fetches what is missing.

    Without a network, or in offline mode, uses what is complete in the cache. Raises ExportError if
    it fails; what was fetched stays, and the next call resumes from there.
    """
    # Xet, which huggingface_hub prefers, restarts files from the beginning after an interruption.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if constants.HF_HUB_OFFLINE:
            return _from_cache(name, "offline mode is on (HF_HUB_OFFLINE)")
        try:
            commit, files = _list_files(name)
        except _Unreachable as error:
            return _from_cache(name, str(error))
        download = _Download(name, commit, files)
        kind, wanted = choose_files(
            name.text, files, lambda: download.fetch_one(INDEX_FILE), name.gguf, ":"
        )
        if kind == "folder":  # unsupported models are refused before their weights are fetched
            read_config(name.text, download.fetch_one(CONFIG_FILE))
        download.check_room(wanted)
        download.fetch_all(wanted, progress)
        return kind, download.finish(kind, wanted)
    except ExportError:
        raise
    except (OSError, ValueError) as error:
        raise ExportError(_explanation(name, error)) from error


class _Unreachable(Exception):
    """The hub cannot be reached; the message says why."""


def _list_files(name: HubName) -> tuple[str, dict[str, RepoSibling]]:
    """The commit that the revision refers to now, and its files by name."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError
    from requests.exceptions import ConnectionError, JSONDecodeError, Timeout

    try:
        info = HfApi().model_info(
            name.repo,
            revision=name.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
    except (ConnectionError, Timeout) as error:
        raise _Unreachable(f"{constants.ENDPOINT} cannot be reached ({_root(error)})") from error
    except (JSONDecodeError, KeyError):
        raise ValueError(f"{constants.ENDPOINT} does not respond like a model hub") from None
    except HfHubHTTPError as error:
        status = _status(error)
        if status < 500:
            raise
        raise _Unreachable(f"{constants.ENDPOINT} returned status {status}") from error
    if info.sha is None:
        raise ValueError(
            f"{constants.ENDPOINT} did not return the commit of revision {name.revision}"
        )
    return info.sha, {file.rfilename: file for file in info.siblings or []}


def _from_cache(name: HubName, why: str) -> tuple[Kind, Path]:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ExportError(
            f"{name.text}: {why}, and it is not in the cache ({constants.HF_HUB_CACHE}); no "
            "local folder has that name either"
        ) from None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        kind, files = choose_files(name.text, names, lambda: folder / INDEX_FILE, name.gguf, ":")
    except ExportError as error:
        raise ExportError(f"{error} ({why}, so only the cache was searched)") from None
    return kind, folder / files[0] if kind == "gguf" else folder


class _Download:
    """The download of files of one commit into the cache."""

    def __init__(self, name: HubName, commit: str, files: dict[str, RepoSibling]) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        self._name = name
        self._commit = commit
        self._files = files
        self._cache = Path(constants.HF_HUB_CACHE)
        self._folder = self._cache / repo_folder_name(repo_id=name.repo, repo_type="model")
        self._snapshot = self._folder / "snapshots" / commit

    def fetch_one(self, file: str) -> Path:
        """Fetches a file; retries for as long as every attempt makes progress."""
        from huggingface_hub import hf_hub_download
        from requests.exceptions import ChunkedEncodingError

        path = self._snapshot / file
        if path.exists():
            return path
        while True:
            before = self._size(file)
            try:
                hf_hub_download(self._name.repo, file, revision=self._commit)
                break
            except ChunkedEncodingError:  # hf_hub_download retries other errors itself
                if self._size(file) <= before:
                    raise
        self._check(file)
        return path

    def check_room(self, files: list[str]) -> None:
        """Raises ExportError if there is not enough disk space for what is still to be fetched."""
        missing = sum((self._files[file].size or 0) - self._size(file) for file in files)
        self._cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._cache).free
        if missing > free:
            raise ExportError(
                f"{self._name.text}: {missing / 1e9:.1f} GB remain to be downloaded, but the "
                f"disk of {self._cache} has only {free / 1e9:.1f} GB free"
            )

    def fetch_all(self, files: list[str], progress: DownloadProgress) -> None:
        """Fetches several files at a time, on daemon threads, so that Ctrl-C does not wait."""
        waiting = deque(files)
        ended: queue.Queue[Exception | None] = queue.Queue()

        def work() -> None:
            while True:
                try:
                    file = waiting.popleft()
                except IndexError:
                    return
                try:
                    self.fetch_one(file)
                    ended.put(None)
                except Exception as error:
                    ended.put(error)

        for _ in range(min(MAX_STREAMS, len(files))):
            threading.Thread(target=work, daemon=True).start()
        total = sum(self._files[file].size or 0 for file in files)
        left = len(files)
        try:
            while left:
                try:
                    error = ended.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    pass
                else:
                    if error is not None:
                        raise error
                    left -= 1
                if total:  # a mirror may not say how large files are
                    progress(sum(map(self._size, files)), total)
        finally:
            waiting.clear()

    def finish(self, kind: Kind, files: list[str]) -> Path:
        """Stores the commit of the revision, so that it is found offline; returns the path."""
        if not _COMMIT.fullmatch(self._name.revision):
            ref = self._folder / "refs" / self._name.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(self._commit)
        return self._snapshot / files[0] if kind == "gguf" else self._snapshot

    def _size(self, file: str) -> int:
        """Bytes of a file in the cache, even if it is not complete yet."""
        listed = self._files[file]
        blob = listed.lfs.sha256 if listed.lfs else listed.blob_id
        for path in (self._snapshot / file, self._folder / "blobs" / f"{blob}.incomplete"):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                pass
        return 0

    def _check(self, file: str) -> None:
        """Verifies the digest: a partial file left behind by something else may hold anything.

        Raises ExportError.
        """
        lfs, path = self._files[file].lfs, self._snapshot / file
        if lfs is None:
            return
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() == lfs.sha256:
                return
        path.resolve().unlink()
        path.unlink()
        raise ExportError(
            f"{self._name.text}: the download of {file} was corrupt (its SHA-256 differs from "
            "the hub's) and was deleted; run the command again"
        )


def _explanation(name: HubName, error: Exception) -> str:
    """One line that says what is wrong and what to do about it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from requests.exceptions import RequestException

    hub, has_token = constants.ENDPOINT, get_token() is not None
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    match error:
        case GatedRepoError() if has_token:
            message = f"is gated, and your token has no access: request access at {hub}/{name.repo}"
        case GatedRepoError():
            message = (
                f"is gated: request access at {hub}/{name.repo}, then set HF_TOKEN to your token "
                "(or log in with `hf auth login`)"
            )
        case RepositoryNotFoundError():
            message = f"no such folder, and {hub} has no such model; "
            message += "a private one needs " + ("another token" if has_token else "HF_TOKEN")
        case RevisionNotFoundError():
            message = f"{hub}/{name.repo} has no revision {name.revision!r}"
        case EntryNotFoundError():
            message = f"{hub} lists a file that is missing: {_first_line(error)}"
        case HFValidationError():
            message = f"is neither a folder nor a hub id: {_first_line(error)}"
        case HfHubHTTPError() if _status(error) == 401:
            message = f"{hub} does not accept your token (HF_TOKEN, or the file of `hf auth login`)"
        case HfHubHTTPError() if _status(error) == 403:
            message = f"{hub} denied access; your token may lack permission to read this model"
        case HfHubHTTPError():
            message = f"{hub} returned status {_status(error)}"
        case RequestException():
            message = (
                f"the download was interrupted ({_root(error)}); run the command again to resume it"
            )
        case OSError(strerror=str(reason)):
            message = f"cannot be downloaded to {constants.HF_HUB_CACHE}: {reason}"
        case _:
            message = _first_line(error)
    return f"{name.text}: {message}"


def _status(error: HfHubHTTPError) -> int:
    assert error.response is not None
    return error.response.status_code


def _root(error: BaseException) -> str:
    """The operating system's error message, beneath the layers of HTTP libraries."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    reason: Any = getattr(error, "strerror", None)
    return reason or _first_line(error)


def _first_line(error: BaseException) -> str:
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
