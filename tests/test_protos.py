"""The protocol is lint-clean and fully documented, and the committed stubs match it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "protos"


def names() -> list[str]:
    return sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))


def compile_protos(*options: str) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *options, *names()]
    subprocess.run(command, check=True, cwd=PROTOS)


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    """`make protos` would change nothing."""
    out = str(tmp_path)
    plugin = Path(sys.executable).with_name("protoc-gen-mypy_grpc")
    compile_protos(
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        f"--plugin={plugin}",
        f"--mypy_grpc_out=quiet:{out}",
    )
    made = [path for path in tmp_path.rglob("*") if path.is_file()]

    assert len(made) == 4 * len(names())
    for path in made:
        committed = ROOT / path.relative_to(tmp_path)
        assert path.read_text() == committed.read_text(), f"{committed}: run make protos"


def test_buf_lint_finds_nothing() -> None:
    """buf finds no violations of its standard rules."""
    buf = Path(sys.executable).with_name("buf")
    done = subprocess.run([buf, "lint", PROTOS], capture_output=True, text=True)

    assert (0, "") == (done.returncode, done.stdout)


def test_no_two_fields_share_an_accessor(tmp_path: Path) -> None:
    """Java generates getTokenBytes for a string `token`, and getIdsCount for repeated `ids`."""
    out = tmp_path / "descriptors"
    compile_protos(f"--descriptor_set_out={out}")
    files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    messages = [message for file in files for message in file.message_type]
    messages += [nested for message in messages for nested in message.nested_type]
    field_kind = descriptor_pb2.FieldDescriptorProto
    clashes = []
    for message in messages:
        names = {field.name for field in message.field}
        for field in message.field:
            made = {f"{field.name}_bytes"} if field.type == field_kind.TYPE_STRING else set()
            if field.label == field_kind.LABEL_REPEATED:
                made |= {f"{field.name}_count", f"{field.name}_list"}
            clashes += [f"{message.name}: {field.name} and {name}" for name in made & names]

    assert [] == clashes


def test_clients_of_the_last_tag_are_served(tmp_path: Path) -> None:
    """Without a tag nothing can break; after one, a field with a changed type is found."""
    shutil.copytree(PROTOS, tmp_path / "protos")
    shutil.copy2(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    venv = Path(sys.prefix)

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "tag.gpgsign=false")
        subprocess.run(["git", *author, *arguments], check=True, cwd=tmp_path, capture_output=True)

    def breaking() -> tuple[int, str]:
        command = ["make", "--no-print-directory", "breaking", f"VENV={venv}", "-o", f"{venv}/.dev"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    git("init", "--quiet")
    untagged = breaking()
    git("add", ".")
    git("commit", "--quiet", "--no-gpg-sign", "-m", "first")
    git("tag", "v1")
    unchanged = breaking()
    proto = tmp_path / "protos/trivium/sampling/v1/sampling.proto"
    proto.write_text(proto.read_text().replace("double top_p = 2", "int32 top_p = 2"))
    changed = breaking()

    assert (0, "No tag yet") == (untagged[0], untagged[1][:10])
    assert (0, "buf breaking protos, against v1\n") == unchanged
    assert 0 != changed[0]
    assert '"top_p" on message "SamplingParams" changed type' in changed[1]


def test_everything_is_documented(tmp_path: Path) -> None:
    """Every service, method, message, field and enum value has its own comment."""
    out = tmp_path / "descriptors"
    compile_protos(f"--descriptor_set_out={out}", "--include_source_info")
    silent = []
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        said = {tuple(at.path) for at in file.source_code_info.location if at.leading_comments}
        silent += [f"{file.name} {path}" for path in documentable(file) if path not in said]

    assert [] == silent


def documentable(file: descriptor_pb2.FileDescriptorProto) -> list[tuple[int, ...]]:
    """Paths, as in source_code_info, of all that needs a comment. Map entries are generated."""
    found: list[tuple[int, ...]] = []
    for number, message in enumerate(file.message_type):
        found += [(4, number), *((4, number, 2, field) for field in range(len(message.field)))]
        assert all(nested.options.map_entry for nested in message.nested_type)
    for number, enum in enumerate(file.enum_type):
        found += [(5, number), *((5, number, 2, value) for value in range(len(enum.value)))]
    for number, service in enumerate(file.service):
        found += [(6, number), *((6, number, 2, call) for call in range(len(service.method)))]
    return found


def test_scalars_with_a_default_can_be_absent() -> None:
    """A field whose comment states a default distinguishes absent from zero."""
    text = "\n".join((PROTOS / name).read_text() for name in names())
    fields = re.findall(r"((?:  //.*\n)+)  ((?:optional )?(?:double|int32|int64|bool) \w+)", text)
    vague = [
        field
        for comment, field in fields
        if re.search(r"default", comment, re.IGNORECASE) and not field.startswith("optional ")
    ]

    assert len(fields) > 50
    assert [] == vague
