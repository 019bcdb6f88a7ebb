"""The Go and Java examples, built with toolchains and libraries from Debian packages."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.example_runs import EXAMPLES, ROOT

PROTOS = ROOT / "protos"
GO_LIBRARIES = Path("/usr/share/gocode")
JAVA_LIBRARIES = Path("/usr/share/java")
JARS = [
    JAVA_LIBRARIES / f"{name}.jar"
    for name in (
        *("grpc-api", "grpc-context", "grpc-core", "grpc-netty", "grpc-protobuf"),
        *("grpc-protobuf-lite", "grpc-stub", "protobuf", "guava", "perfmark-api", "jsr305"),
        *("geronimo-annotation-1.3-spec", "netty-buffer", "netty-codec", "netty-codec-http"),
        *("netty-codec-http2", "netty-common", "netty-handler", "netty-handler-proxy"),
        *("netty-resolver", "netty-transport"),
    )
]
PROGRAMS = {
    "go": ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"),
    "java": ("java", "javac", "protoc", "grpc_java_plugin"),
}
FILES = {"go": [GO_LIBRARIES / "src/google.golang.org" / n for n in ("grpc", "protobuf")]}
FILES["java"] = JARS


def require(language: str) -> None:
    """Skips the test if a program or library is not installed."""
    gone = [name for name in PROGRAMS[language] if not shutil.which(name)]
    gone += [str(path) for path in FILES[language] if not path.exists()]
    if gone:
        pytest.skip(f"not installed: {', '.join(gone)}; docs/clients.md names the packages")


def copied(language: str, folder: Path) -> Path:
    """A copy of the example at its import path below a GOPATH."""
    example = folder / "src" / "example.com" / "chat"
    shutil.copytree(EXAMPLES / f"{language}_grpc", example)
    return example


def environment(folder: Path) -> dict[str, str]:
    """Variables with which plugins have their usual names and Go finds its libraries offline."""
    plugins = folder / "bin"
    plugins.mkdir(exist_ok=True)
    java_plugin = plugins / "protoc-gen-grpc-java"
    if not java_plugin.exists() and shutil.which("grpc_java_plugin"):
        java_plugin.symlink_to(str(shutil.which("grpc_java_plugin")))
    return {
        **os.environ,
        "PATH": f"{plugins}:{os.environ['PATH']}",
        "TRIVIUM_PROTOS": str(PROTOS),
        "GO111MODULE": "off",
        "GOPATH": f"{folder}:{GO_LIBRARIES}",
        "GOCACHE": str(folder / "cache"),
    }


def generate_by_buf(language: str, folder: Path) -> Path:
    """A copy of the example with its stubs."""
    example = copied(language, folder)
    buf = Path(sys.executable).with_name("buf")
    command = [str(buf), "generate", str(PROTOS)]
    subprocess.run(command, cwd=example, env=environment(folder), check=True)
    return example


def generate_by_protoc(language: str, folder: Path) -> Path:
    """The same with the example's script."""
    example = copied(language, folder)
    subprocess.run(["./generate.sh"], cwd=example, env=environment(folder), check=True)
    return example


def build(language: str, example: Path, folder: Path) -> list[str]:
    """Compiles an example that has its stubs; returns the command that runs it."""
    classpath = ":".join(map(str, JARS))
    commands = {
        "go": ["go", "build", "-o", "chat", "."],
        "java": ["javac", "-cp", classpath, "-sourcepath", "stubs", "-d", "classes", "Chat.java"],
    }
    subprocess.run(commands[language], cwd=example, env=environment(folder), check=True)
    if language == "go":
        return [str(example / "chat")]
    return ["java", "-cp", f"{example / 'classes'}:{classpath}", "Chat"]


def declarations(example: Path) -> dict[str, list[str]]:
    """The public declarations of the generated files, by file. The serialized protocol in them
    differs, as buf records the packages that it was given."""
    return {
        path.relative_to(example).as_posix(): re.findall(
            r"^(?:package|func|type|\s*public) .*", path.read_text(), re.MULTILINE
        )
        for path in [*example.rglob("*.pb.go"), *example.rglob("stubs/**/*.java")]
    }
