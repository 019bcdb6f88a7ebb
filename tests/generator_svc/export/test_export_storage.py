"""An export that cannot be written: one line that says why, a status, and nothing half-made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import tiny_checkpoint

ROOT = Path(__file__).parents[3]
# Limits the size of files in the export's process: the kernel refuses larger writes.
WITH_FILE_LIMIT = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("generator_svc.export", run_name="__main__", alter_sys=True)
"""
# A file system of this size, visible to its process only.
ON_SMALL_DISK = """
import os, subprocess, sys
size, folder, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
status = subprocess.run(command).returncode
print(sorted(os.listdir(folder)))
sys.exit(status)
"""


# Reports free space that does not exist, as when another process fills the disk meanwhile.
WITH_FALSE_PROMISE = """
import collections, runpy, shutil
usage = collections.namedtuple("usage", "total used free")
shutil.disk_usage = lambda folder: usage(2**40, 0, 2**40)
runpy.run_module("generator_svc.export", run_name="__main__", alter_sys=True)
"""
EXPORT = ("-m", "generator_svc.export")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def source() -> str:
    return str(tiny_checkpoint())


def ended(*command: str, **environment: str) -> tuple[int, str, list[str]]:
    """Status, standard output and lines of standard error."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize(
    "limit",
    [pytest.param(1000, marks=SLOW), pytest.param(100_000, marks=SLOW), 500_000],
)
def test_write_error_is_reported(source: str, tmp_path: Path, limit: int) -> None:
    """At any step: the tokenizer, the trace or the weights."""
    out = tmp_path / "models" / "m"
    options = (source, "--out", str(out), "--precision", "fp32")
    status, _, lines = ended("-c", WITH_FILE_LIMIT, str(limit), *options)

    assert 1 == status
    assert lines[-1].startswith(f"trivium export: {out} cannot be created: File too large")
    assert "Traceback" not in "\n".join(lines)
    assert [] == leftovers(out.parent)


@pytest.mark.parametrize(
    ("size", "script"),
    [
        pytest.param("16k", EXPORT, marks=SLOW),
        pytest.param("200k", EXPORT, marks=SLOW),
        ("700k", EXPORT),
        ("700k", ("-c", WITH_FALSE_PROMISE)),
    ],
)
def test_full_disk_is_reported(
    source: str, tmp_path: Path, size: str, script: tuple[str, str]
) -> None:
    """The same on a real file system without space, where mounting is allowed.

    In the last case the disk is full in the middle of the weights.
    """
    isolated = ("unshare", "--map-root-user", "--mount")
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    out = tmp_path / "m"
    command = (sys.executable, *script, source, "--precision", "fp32")
    disk = (sys.executable, "-c", ON_SMALL_DISK, size, str(tmp_path))
    done = subprocess.run(
        [*isolated, *disk, *command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )

    assert 1 == done.returncode
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"trivium export: {out} cannot be created: No space left on device")
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "['.m.lock']"


@pytest.mark.parametrize("command", [("generator_svc.export",), ("trivium.cli", "export")])
def test_unwritable_folder_is_reported(source: str, command: tuple[str, ...]) -> None:
    """Not even by root, like a volume that is mounted read-only."""
    options = (source, "--out", "/sys/trivium/m", "--precision", "fp32")
    status, _, lines = ended("-m", *command, *options)

    assert 1 == status
    assert lines[-1].startswith("trivium export: /sys/trivium/m cannot be created: ")
    assert "Traceback" not in "\n".join(lines)


def test_unwritable_cache_is_reported() -> None:
    """`trivium up` cannot export the embedded model into it."""
    status, _, lines = ended("-m", "trivium.cli", "up", TRIVIUM_CACHE="/sys/trivium")

    assert 1 == status
    assert lines[-1].startswith("trivium export: /sys/trivium/models/smollm2-135m-instruct cannot")
    assert "Traceback" not in "\n".join(lines)
