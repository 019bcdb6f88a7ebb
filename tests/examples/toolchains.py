"""The Go and Java examples, built with the toolchains and libraries of Debian's packages."""

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
    """Skips the test where something is not installed."""
    gone = [name for name in PROGRAMS[language] if not shutil.which(name)]
    gone += [str(path) for path in FILES[language] if not path.exists()]
    if gone:
        pytest.skip(f"not installed: {', '.join(gone)}; docs/clients.md names the packages")


def copied(language: str, folder: Path) -> Path:
    """A copy of the example, at the place that its import path has below a GOPATH."""
    example = folder / "src" / "example.com" / "chat"
    shutil.copytree(EXAMPLES / f"{language}_grpc", example)
    return example


def environment(folder: Path) -> dict[str, str]:
    """What finds plugins by their usual names and Go's libraries without a network."""
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
    """The same by the example's script."""
    example = copied(language, folder)
    subprocess.run(["./generate.sh"], cwd=example, env=environment(folder), check=True)
    return example


def build(language: str, example: Path, folder: Path) -> list[str]:
    """Compiles an example that has its stubs; the command that runs it."""
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
    """What the generated files offer, by file. Beside it they hold the protocol itself in bytes, in
    which buf notes the packages that it was told of."""
    return {
        path.relative_to(example).as_posix(): re.findall(
            r"^(?:package|func|type|\s*public) .*", path.read_text(), re.MULTILINE
        )
        for path in [*example.rglob("*.pb.go"), *example.rglob("stubs/**/*.java")]
    }
