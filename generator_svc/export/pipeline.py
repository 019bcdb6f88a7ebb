"""The steps of an export, in order."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generator_svc.default_sampling import sampling_values
from generator_svc.export.atomic_folder import locked, new_folder
from generator_svc.export.checkpoint.source import EMBEDDED_SAMPLING, locate, state
from generator_svc.export.errors import ExportError
from generator_svc.export.options import DEFAULT_OPTIONS, ExportOptions
from generator_svc.export.progress import Progress, silent
from trivium.embedded_model import EMBEDDED_MODEL
from trivium.file_digest import read_digest
from trivium.host_limits import cpu_limit
from trivium.model_directory import (
    CONFIG,
    GENAI_CONFIG,
    GENERATION_CONFIG,
    MANIFEST,
    ModelDirectoryError,
    load_model_directory,
)

if TYPE_CHECKING:
    from generator_svc.export.calibration.activations import MeanSquares, Ranges
    from generator_svc.export.checkpoint.checkpoint import Checkpoint
    from generator_svc.export.graph.experts import Form
    from generator_svc.export.graph.graph import Graph

# Increased when the exporter's output changes, so that older folders are exported again.
EXPORTER_VERSION = 7


def export_model(
    source: str,
    out: str | Path,
    options: ExportOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
    *,
    force: bool = False,
    cache: Path | None = None,
) -> Path:
    """Exports `source` to the model directory `out` and returns its path.

    An existing export of the same source with the same options is kept, or replaced if it is
    damaged, from another exporter version, or the checkpoint's files have changed since. For any
    other export, raises ExportError unless `force`. Always raises ExportError if the folder holds
    something other than an export, or cannot be written.
    """
    final = Path(out).expanduser().absolute()
    if final.is_symlink():  # replaces the link's target, not the link
        final = final.resolve()
    if final.is_mount():
        raise ExportError(f"{final} is a mount point: choose a folder inside it")
    try:
        with locked(final, lambda: progress("waiting for another export to this folder")):
            if is_current(final, source, options, force):
                return final
            with new_folder(final) as (folder, scratch):
                _build(source, folder, scratch, options, progress, cache)
    except OSError as error:
        raise ExportError(f"{final} cannot be created: {_reason(error)}") from error
    progress("done")
    return final


def _reason(error: OSError) -> str:
    """The reason in one line, with the file that could not be written, if known."""
    if error.strerror is None:  # raised by a library, not the system
        return (str(error).splitlines() or [type(error).__name__])[0]
    file = error.filename2 or error.filename
    return f"{error.strerror}: {file}" if file else error.strerror


def is_current(folder: Path, source: str, options: ExportOptions, force: bool = False) -> bool:
    """Whether `folder` is up to date; raises ExportError if it must not be replaced.

    False if it may be made or replaced: it is missing or empty; it is the same export, but damaged,
    from another exporter version or of a checkpoint that has changed; or any export with `force`.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or "exporter_version" not in manifest:
        raise ExportError(
            f"{folder} already exists and is not an export ({MANIFEST} is missing or damaged): "
            "remove it, or choose another --out"
        )
    if force:
        return False
    wanted = {"source": source, **asdict(options)}
    if any(manifest.get(key) != value for key, value in wanted.items()):
        raise ExportError(f"{folder} already exists and is a different export; --force replaces it")
    try:
        load_model_directory(folder)
    except ModelDirectoryError:
        return False
    is_same = state(source) in (None, manifest.get("checkpoint_state"))
    return is_same and bool(manifest.get("exporter_version") == EXPORTER_VERSION)


def _build(
    source: str,
    folder: Path,
    scratch: Path,
    options: ExportOptions,
    progress: Progress,
    cache: Path | None,
) -> None:
    """Runs all steps, into `folder`. Heavy imports are local, so that importing this is cheap."""
    os.environ.setdefault("OMP_NUM_THREADS", str(cpu_limit().cores))  # PyTorch reads it once
    began = time.monotonic()
    checkpoint_state = state(source)  # before reading, so that later changes are noticed
    progress("fetching")
    origin = locate(source, cache, lambda done, total: progress("fetching", done, total))
    progress("opening the checkpoint")
    from generator_svc.export.calibration.activations import TEXT
    from generator_svc.export.checkpoint.checkpoint import load_checkpoint
    from generator_svc.export.checkpoint.residual import scale_residual
    from generator_svc.export.genai_config import GRAPH_FILE, WEIGHTS_FILE
    from generator_svc.export.graph.external_data import save
    from generator_svc.export.graph.trace import trace
    from generator_svc.export.tokenizer_files import encode, write_tokenizer
    from generator_svc.export.weights.blocks import BLOCK_SIZE

    checkpoint = load_checkpoint(origin)
    if checkpoint.decoder.experts is not None:
        options.check_experts()
        if options.is_half:
            checkpoint = scale_residual(checkpoint)
    generation = generation_config(checkpoint)
    progress("writing the tokenizer")
    write_tokenizer(origin, folder)
    token_ids = encode(folder, TEXT.read_text(encoding="utf-8"))
    _check_vocabulary(checkpoint, token_ids)
    ranges, squares = _measure_activations(checkpoint, options, token_ids, progress)
    progress("tracing")
    graph = trace(checkpoint, scratch / "traced")
    rewrite(graph, checkpoint, options, ranges, squares)
    shutil.rmtree(scratch / "traced")
    save(graph, folder / GRAPH_FILE, folder / WEIGHTS_FILE, progress)
    _write_configs(checkpoint, generation, folder)
    manifest = {
        "source": source,
        "checkpoint_state": checkpoint_state,
        **asdict(options),
        "exporter_version": EXPORTER_VERSION,
        "node_count": len(graph.nodes),
        "agreement": _verify(checkpoint, folder, scratch, options, progress),
        "seconds": round(time.monotonic() - began, 1),
    }
    if options.is_symmetric:
        manifest["symmetric_block_size"] = BLOCK_SIZE
    progress("computing digests")
    _write_manifest(folder, manifest)


def _check_vocabulary(checkpoint: Checkpoint, token_ids: list[int]) -> None:
    """Raises ExportError if a multilingual text encodes to token ids that the model lacks.

    A tokenizer may define more tokens than the model has, as long as they are never used.
    """
    highest, size = max(token_ids), checkpoint.decoder.vocab_size
    if highest >= size:
        raise ExportError(
            f"{checkpoint.source.label}: the tokenizer does not match the model: it produces "
            f"token {highest}, but vocab_size in config.json is {size}"
        )


def _measure_activations(
    checkpoint: Checkpoint, options: ExportOptions, token_ids: list[int], progress: Progress
) -> tuple[Ranges | None, MeanSquares | None]:
    """What quantization needs to know of the activations; for w8a8 it smooths the model in
    place."""
    from generator_svc.export.calibration.activations import calibrate, mean_squares
    from generator_svc.export.calibration.smooth import smooth

    if options.precision == "w8a8":
        ranges = calibrate(checkpoint.model, token_ids, progress)
        smooth(checkpoint.model, ranges, progress)
        return ranges, None
    if options.is_symmetric and options.precision == "int4" and not checkpoint.decoder.experts:
        return None, mean_squares(checkpoint.model, token_ids, progress)
    return None, None


def rewrite(
    graph: Graph,
    checkpoint: Checkpoint,
    options: ExportOptions,
    ranges: Ranges | None = None,
    squares: MeanSquares | None = None,
    experts_form: Form | None = None,
) -> None:
    """Runs all passes over the traced graph.

    `ranges` of activations are used for w8a8 only, their mean `squares` for int4 on CUDA only.
    """
    from generator_svc.export.graph import attention, experts, half, head, norm, projection
    from generator_svc.export.graph.integer import integer_products
    from generator_svc.export.graph.quantize import quantize_embedding, quantize_weights

    decoder = checkpoint.decoder
    attention.swap_attention(graph, decoder)
    norm.fuse_norms(graph, decoder.norm_epsilon)
    projection.join_projections(graph, decoder.num_layers)
    if decoder.experts is not None:
        form = experts_form or experts.choose_form(options, decoder.experts.is_mxfp4)
        experts.swap_experts(graph, decoder.experts, form, options.is_half)
    head.select_logits(graph, decoder.hidden_size)
    if options.precision == "w8a8":
        assert ranges is not None
        integer_products(graph, ranges)
    if options.precision in ("int8", "int4", "w8a8"):
        bits = 4 if options.precision == "int4" else 8
        quantize_weights(graph, bits, options.is_half, squares)
        quantize_embedding(graph, decoder.hidden_size, decoder.tied_embeddings, options.is_half)
    elif decoder.tied_embeddings:
        head.share_embedding(graph)
    if options.is_half:
        half.to_half(graph)


def _write_configs(checkpoint: Checkpoint, generation: dict[str, Any], folder: Path) -> None:
    from generator_svc.export.genai_config import genai_config

    eos = generation["eos_token_id"]
    config = checkpoint.config
    genai = genai_config(
        checkpoint.decoder,
        eos if isinstance(eos, list) else [eos],
        config.bos_token_id,
        config.pad_token_id,
        generation,
    )
    _write_json(folder / GENAI_CONFIG, genai)
    _write_json(folder / CONFIG, config.to_dict())
    _write_json(folder / GENERATION_CONFIG, generation)


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own defaults, or only token ids if it has none. Raises ExportError."""
    from generator_svc.export.gguf_tokenizer import GgufTokenizer

    file = checkpoint.source.path / GENERATION_CONFIG
    generation: dict[str, Any] = {}
    if checkpoint.source.kind == "folder" and file.is_file():
        try:
            generation = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ExportError(f"{file}: not a JSON object: {error}") from None
    if checkpoint.source.kind == "gguf" and (
        eos_ids := GgufTokenizer(checkpoint.source.path).end_token_ids
    ):
        generation["eos_token_id"] = eos_ids if len(eos_ids) > 1 else eos_ids[0]
    if checkpoint.source.label == EMBEDDED_MODEL:
        generation |= EMBEDDED_SAMPLING
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(checkpoint.config, name, None)
        if value is not None and generation.get(name) is None:
            generation[name] = value
    _check_generation(checkpoint, generation)
    return generation


def _check_generation(checkpoint: Checkpoint, generation: dict[str, Any]) -> None:
    """Raises ExportError for values with which the model cannot be served or would never stop."""
    label, size = checkpoint.source.label, checkpoint.decoder.vocab_size
    eos = generation.get("eos_token_id")
    if eos is None:
        raise ExportError(
            f"{label}: no end-of-sequence token (eos_token_id) in generation_config.json or "
            "config.json"
        )
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(token) is int and token < size for token in ids) or max(ids) < 0:
        raise ExportError(
            f"{label}: eos_token_id is {eos!r}, neither a token of the model nor a list of them"
        )
    try:
        sampling_values(generation)
    except ValueError as error:
        raise ExportError(f"{label}: generation_config.json: {error}") from None


def _verify(
    checkpoint: Checkpoint,
    folder: Path,
    scratch: Path,
    options: ExportOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Compares export and checkpoint, always on the CPU, which also runs graphs made for CUDA.

    MXFP4 experts, which it cannot run, are verified in another way (see `verify_experts`).
    """
    from generator_svc.export import verify, verify_experts
    from generator_svc.export.genai_config import GRAPH_FILE, WEIGHTS_FILE
    from generator_svc.export.graph.experts import choose_form
    from generator_svc.export.graph.external_data import save
    from generator_svc.export.graph.trace import trace
    from generator_svc.export.tokenizer_files import encode

    def export_twin(twin: Checkpoint) -> Path:
        twin_folder = scratch / "twin"
        twin_folder.mkdir()
        graph = trace(twin, scratch / "traced")
        rewrite(graph, twin, options, experts_form="int8")
        save(graph, twin_folder / GRAPH_FILE, twin_folder / WEIGHTS_FILE)
        return twin_folder / GRAPH_FILE

    graph = folder / GRAPH_FILE
    tokens = encode(folder, verify.TEXT)
    limit = min(verify.MAX_TOKENS, checkpoint.decoder.context_length - verify.GREEDY_TOKENS)
    experts = checkpoint.decoder.experts
    if experts is None or choose_form(options, experts.is_mxfp4) != "fp4":
        return verify.compare(checkpoint, graph, tokens[:limit], progress).as_dict()
    progress("verifying the experts")
    verify_experts.check_packed(graph, experts)
    agreement = verify_experts.compare_twin(checkpoint, export_twin, tokens[:limit], progress)
    return agreement.as_dict()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, the last step, with size and digest of every file."""
    digests = {path.name: read_digest(path) for path in sorted(folder.iterdir())}
    files = {name: digest.size for name, digest in digests.items()}
    digests_json = {name: asdict(digest) for name, digest in digests.items()}
    _write_json(folder / MANIFEST, {"files": files, "digests": digests_json, **manifest})


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
