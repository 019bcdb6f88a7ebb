"""A model folder appears complete or not at all, even with concurrent or killed exports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import groupby
from pathlib import Path

import onnxruntime
import pytest
from safetensors.torch import load_file, save_file

from generator_svc.export import ExportError, ExportOptions, export_model, pipeline
from generator_svc.export.progress import Progress
from tests.tiny_models import tiny_checkpoint, tiny_model_directory
from trivium.model_directory import MANIFEST, load_model_directory

FP32 = ExportOptions("fp32")


@pytest.fixture
def source() -> str:
    return str(tiny_checkpoint("llama"))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


def test_progress_only_moves_forward(source, tmp_path):
    """The callback gets named steps in order, some of them with bytes."""
    seen: list[tuple[str, int, int | None]] = []

    def show(step: str, done: int = 0, total: int | None = None) -> None:
        seen.append((step, done, total))

    export_model(source, tmp_path / "m", FP32, show)

    names = [step for step, _, _ in seen]
    assert [name for name, _ in groupby(names)] == list(dict.fromkeys(names))
    assert ("fetching", "done") == (names[0], names[-1])
    counted = [(done, total) for step, done, total in seen if step == "writing the weights"]
    assert counted == sorted(counted)
    assert 0 < counted[0][0] < counted[-1][0] <= counted[-1][1]
    assert {total for _, total in counted} == {(tmp_path / "m" / "model.onnx.data").stat().st_size}


def test_the_long_steps_count_bytes(source, tmp_path):
    """Steps that read all weights report how many bytes are done, up to all of them."""
    seen: dict[str, list[tuple[int, int | None]]] = {}

    def show(step: str, done: int = 0, total: int | None = None) -> None:
        seen.setdefault(step, []).append((done, total))

    export_model(source, tmp_path / "m", ExportOptions("w8a8"), show)

    for step in ("calibrating", "smoothing", "running the checkpoint"):
        counts = seen[step]
        assert [] == [total for _, total in counts if not total or total != counts[0][1]]
        assert counts == sorted(counts)
        assert (0, counts[0][1]) == (counts[0][0], counts[-1][0])
        assert len(counts) > 3


class Broken(Exception):
    """Raised by a step that fails."""


def fail_at(wanted: str) -> Progress:
    def show(step: str, done: int = 0, total: int | None = None) -> None:
        if step == wanted:
            raise Broken

    return show


@pytest.mark.parametrize("step", ["tracing", "writing the weights", "computing digests"])
def test_failed_export_changes_nothing(source, tmp_path, step):
    """Whichever step fails, no folder is made, or the one to be replaced stays."""
    with pytest.raises(Broken):
        export_model(source, tmp_path / "m", FP32, fail_at(step))

    assert leftovers(tmp_path) == []

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / MANIFEST).write_text('{"exporter_version": 1}')
    with pytest.raises(Broken):
        export_model(source, tmp_path / "m", FP32, fail_at(step), force=True)

    assert leftovers(tmp_path) == ["m"]
    assert [MANIFEST] == leftovers(tmp_path / "m")


@pytest.mark.parametrize("manifest", [None, "", "[]", "{}", '{"exporter_ver'])
def test_folder_that_is_not_an_export_is_never_replaced(source, tmp_path, manifest):
    """Not even with --force, as a wrong --out would delete other files. It is refused at once."""
    mine = tmp_path / "m"
    mine.mkdir()
    (mine / "mine").touch()
    if manifest is not None:
        (mine / MANIFEST).write_text(manifest)
    files = sorted(leftovers(mine))

    for force in (False, True):
        with pytest.raises(
            ExportError, match=rf"{mine} already exists and is not an export .*--out$"
        ):
            export_model(source, mine, FP32, fail_at("fetching"), force=force)

    assert files == sorted(leftovers(mine))


def test_a_file_is_never_replaced(source, tmp_path):
    """Not even with --force."""
    (tmp_path / "m").write_text("mine")

    with pytest.raises(ExportError, match="already exists and is not an export"):
        export_model(source, tmp_path / "m", FP32, fail_at("fetching"), force=True)

    assert "mine" == (tmp_path / "m").read_text()


@pytest.mark.parametrize("is_there", [False, True])
def test_an_empty_folder_is_filled(source, tmp_path, is_there):
    """With --force too, as nothing is lost."""
    if is_there:
        (tmp_path / "m").mkdir()

    with pytest.raises(Broken):
        export_model(source, tmp_path / "m", FP32, fail_at("fetching"), force=True)


def test_interrupted_replacement_is_undone(source, tmp_path):
    """As after a power failure between the two renames of --force."""
    moved = tmp_path / ".m.partial" / "replaced"
    moved.mkdir(parents=True)
    (moved / "mine").touch()

    with pytest.raises(ExportError, match="already exists"):
        export_model(source, tmp_path / "m", FP32)

    assert leftovers(tmp_path) == ["m"]
    assert ["mine"] == leftovers(tmp_path / "m")


def test_the_shortest_context_is_exported(tmp_path):
    """Even the smallest context that is accepted is enough to verify the export."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 18}))

    made = export_model(str(folder), tmp_path / "m", FP32)

    agreement = json.loads((made / MANIFEST).read_text())["agreement"]
    assert (2, 16) == (agreement["positions"], agreement["greedy_tokens_equal"])


def test_checkpoint_without_eos_is_refused_early(tmp_path):
    """Without an end-of-sequence token no answer would end. Refused before the long steps."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    steps: list[str] = []

    with pytest.raises(ExportError, match="no end-of-sequence token"):
        export_model(str(folder), tmp_path / "m", FP32, lambda step, *_: steps.append(step))

    assert steps == ["fetching", "opening the checkpoint"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token_id": []}, r"eos_token_id is \[\], neither a token of the model nor a list"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', neither a token of the model"),
        (
            {"eos_token_id": [2, 99_999]},
            r"eos_token_id is \[2, 99999\], neither a token of the model",
        ),
        ({"temperature": "hot"}, r"generation_config\.json: temperature is 'hot', which is not "),
        ({"top_k": float("inf")}, r"generation_config\.json: top_k is inf, which is not "),
    ],
)
def test_invalid_sampling_defaults_are_refused_early(tmp_path, settings, message):
    """Not with a traceback after the long steps, nor only when the folder is served."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))

    with pytest.raises(ExportError, match=message):
        export_model(str(folder), tmp_path / "m", FP32, fail_at("tracing"))


def test_eos_may_be_in_config_json_only(tmp_path):
    """A null in generation_config.json counts as absent."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')

    exported = export_model(str(folder), tmp_path / "m", FP32)

    assert load_model_directory(exported).eos_token_ids == (2,)


def test_mismatched_tokenizer_is_refused_early(tmp_path):
    """Some of its tokens have no embedding."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:300].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))

    message = r"does not match the model: it produces token 5\d\d, but vocab_size .* is 300"
    with pytest.raises(ExportError, match=message):
        export_model(str(folder), tmp_path / "m", FP32, fail_at("tracing"))


def test_float16_overflow_is_reported(tmp_path):
    """Some bfloat16 checkpoints have such activations; every answer would be noise."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = r"NaN or infinity where the checkpoint does not: .* exceed float16"

    with pytest.raises(ExportError, match=said):
        export_model(str(folder), tmp_path / "m", ExportOptions("fp16", "cuda"))

    assert leftovers(tmp_path) == ["checkpoint"]


def test_a_killed_export_leaves_no_folder_and_the_next_one_works(source, tmp_path):
    """After kill -9 nothing has the final name, and the next export removes what is left."""
    command = [sys.executable, "-m", "generator_svc.export", source, "--precision", "fp32"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "m")], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "writing the weights" in line:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.stderr.close()
    process.wait()
    assert not (tmp_path / "m").exists()
    assert leftovers(tmp_path) != []

    export_model(source, tmp_path / "m", FP32)

    assert leftovers(tmp_path) == ["m"]


def test_concurrent_exports_to_one_folder_wait(source, tmp_path):
    """Of two concurrent exports, one does the work and both return the same valid folder."""
    steps: list[str] = []

    def work() -> None:
        export_model(source, tmp_path / "m", FP32, lambda step, *_: steps.append(step))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert steps.count("tracing") == 1
    assert steps.count("waiting for another export to this folder") == 1
    assert load_model_directory(tmp_path / "m").num_layers == 3


def test_an_existing_folder_is_kept_or_refused(source, tmp_path, monkeypatch):
    """For the same source and options, kept, or renewed if broken or old. Others are refused."""
    folder = export_model(source, tmp_path / "m", FP32)
    made = (folder / "model.onnx").stat().st_mtime_ns

    assert export_model(source, folder, FP32) == folder
    assert (folder / "model.onnx").stat().st_mtime_ns == made
    with pytest.raises(ExportError, match="already exists"):
        export_model(source, folder, ExportOptions("int8"))

    (folder / "model.onnx.data").write_bytes(b"broken")
    export_model(source, folder, FP32)
    assert load_model_directory(folder).precision == "fp32"

    made = (folder / "model.onnx").stat().st_mtime_ns
    monkeypatch.setattr(pipeline, "EXPORTER_VERSION", 1000)
    export_model(source, folder, FP32)
    assert (folder / "model.onnx").stat().st_mtime_ns != made

    export_model(source, folder, ExportOptions("int8"), force=True)
    assert load_model_directory(folder).precision == "int8"
    assert leftovers(tmp_path) == ["m"]


def test_changed_checkpoint_is_exported_again(source, tmp_path):
    """After more training, the same command exports again; without the checkpoint, it is kept."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(source, checkpoint)
    folder = export_model(str(checkpoint), tmp_path / "m", FP32)
    first = load_model_directory(folder).revision

    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    export_model(str(checkpoint), folder, FP32)
    second = load_model_directory(folder).revision
    shutil.rmtree(checkpoint)

    assert first != second
    assert folder == export_model(str(checkpoint), folder, FP32)
    assert second == load_model_directory(folder).revision


def test_the_folder_has_the_layout_of_the_model_builder():
    """The file that onnxruntime-genai reads has all tensor names and sizes."""
    folder = tiny_model_directory("qwen2")
    model = json.loads((folder / "genai_config.json").read_text())["model"]

    assert model["type"] == "qwen2"
    assert model["context_length"] == 2048
    assert model["eos_token_id"] == 2
    assert model["decoder"]["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert model["decoder"]["outputs"]["present_value_names"] == "present.%d.value"
    assert model["decoder"]["num_key_value_heads"] == 2
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert {"input_ids", "attention_mask"} == {
        value.name for value in session.get_inputs() if "past_key_values" not in value.name
    }
    assert 1 == session.get_outputs()[0].shape[1]  # tells it to expect the last token's logits only
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "chat_template.jinja"}


def test_wrong_source_gives_one_line_and_status_1(tmp_path):
    """A wrong source gives one line on stderr and exit status 1."""
    done = subprocess.run(
        [sys.executable, "-m", "generator_svc.export", "nothing", "--out", str(tmp_path / "m")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("trivium export: 'nothing' is neither a folder")


def test_an_empty_folder_may_be_filled(source, tmp_path):
    """Such as one that was created by hand."""
    (tmp_path / "m").mkdir()

    assert load_model_directory(export_model(source, tmp_path / "m", FP32)).num_layers == 3


@pytest.mark.parametrize("is_there", [False, True])
def test_symlink_to_a_folder_is_kept(source, tmp_path, is_there):
    """Such as one to a larger disk: its target is created, or with --force replaced."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
    if is_there:
        export_model(source, tmp_path / "disk" / "m", FP32)

    export_model(source, tmp_path / "m", ExportOptions("int8"), force=True)

    assert (tmp_path / "m").is_symlink()
    assert load_model_directory(tmp_path / "disk" / "m").precision == "int8"
    assert leftovers(tmp_path / "disk") == ["m"]


def test_mount_point_is_refused_early(source, tmp_path, monkeypatch):
    """A mount point cannot be renamed, so no folder can appear there atomically."""
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)

    with pytest.raises(ExportError, match="is a mount point: choose a folder inside it"):
        export_model(source, tmp_path, FP32, fail_at("fetching"))


def exported_by_command(source: str, out: Path) -> str:
    """The command's stderr."""
    command = [sys.executable, "-m", "generator_svc.export", source, "--precision", "fp32"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=True)
    return done.stderr


def test_the_next_command_can_be_copied(source, tmp_path):
    """A folder's name with spaces is quoted."""
    said = exported_by_command(source, tmp_path / "my model")

    assert f"my model is ready: trivium up --model '{tmp_path / 'my model'}'" in said


def test_missing_chat_template_is_reported(tmp_path):
    """A base model often has none."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    (folder / "chat_template.jinja").unlink()

    said = exported_by_command(str(folder), tmp_path / "m")

    assert "m is ready for plain completions (chat needs a chat_template.jinja in it): " in said
    assert f"trivium up --model {tmp_path / 'm'}" in said
