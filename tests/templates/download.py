"""Fetches chat templates of some seventy models: `python tests/templates/download.py`.

They are others' work and stay out of this repository. llama.cpp collects them, and the source
distribution of its Python bindings carries them; they end up in a folder of the environment.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(sys.prefix) / "chat-templates"
PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"


def download(folder: Path) -> Path:
    """The source distribution, in this folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", PACKAGE, "--dest", str(folder)]
    subprocess.run([*command, f"{PACKAGE}=={VERSION}"], check=True)
    [found] = folder.glob("*.tar.gz")
    return found


def main() -> None:
    """Does nothing when they are there."""
    if FOLDER.exists():
        return
    with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
        unpacked = Path(scratch) / FOLDER.name
        unpacked.mkdir()
        with tarfile.open(download(Path(scratch))) as archive:
            for member in archive:
                path = Path(member.name)
                if path.match("models/templates/*.jinja"):
                    content = archive.extractfile(member)
                    assert content is not None, f"{path} is no file"
                    (unpacked / path.name).write_bytes(content.read())
        shutil.move(unpacked, FOLDER)  # appears whole or not at all


if __name__ == "__main__":
    main()
