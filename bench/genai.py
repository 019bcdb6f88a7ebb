"""onnxruntime-genai on the same model folder, through its own batch interface, without a server.

    PYTHON bench/genai.py MODEL_FOLDER --batch 1,8,32

PYTHON is an interpreter that has `onnxruntime-genai`; nothing from Trivium is imported. A batch is
prefilled and decoded together, greedily; every row generates all of its tokens, since end-of-text
tokens are suppressed until then. Prompts are random and new for each batch. Loading the model, a
small warm-up batch and allocating memory for a batch are not counted. Prints JSON: for each batch,
the seconds until each of its tokens was done; for each size, output tokens/s including prefill, and
times in milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

CONFIG = "genai_config.json"

Batch = list[list[int]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", default="1,8,32", help="batch sizes, run one after another")
    parser.add_argument("--batches", type=int, default=3, help="number of batches of each size")
    parser.add_argument("--prompt-tokens", type=int, default=115)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0, help="threads per run; 0: one per core")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="JSON file with the prompts to use instead: a list of "
        "batches, each a list of token ids",
    )
    return parser.parse_args()


def load(folder: Path, threads: int) -> og.Model:
    """Loads the model with `threads` threads, set in a copy of its configuration."""
    config = json.loads((folder / CONFIG).read_text())
    options = config["model"]["decoder"].setdefault("session_options", {})
    options["intra_op_num_threads"] = threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as copied:
        for path in folder.iterdir():
            if path.name != CONFIG:
                Path(copied, path.name).symlink_to(path.absolute())
        Path(copied, CONFIG).write_text(json.dumps(config))
        return og.Model(copied)


def batches(options: argparse.Namespace) -> list[Batch]:
    """The batches to run: the file's prompts, or random ones."""
    if options.prompts:
        batches: list[Batch] = json.loads(options.prompts.read_text())
        return batches
    vocabulary = json.loads((options.model / CONFIG).read_text())["model"]["vocab_size"]
    random = np.random.default_rng()
    shapes = [(int(size), options.prompt_tokens) for size in options.batch.split(",")]
    return [
        random.integers(vocabulary, size=shape).tolist()
        for shape in shapes
        for _ in range(options.batches)
    ]


def timed(model: og.Model, prompts: Batch, output: int) -> list[float]:
    """Seconds from the start until each of `output` tokens was done, in all rows."""
    length = len(prompts[0]) + output
    params = og.GeneratorParams(model)
    params.set_search_options(
        batch_size=len(prompts), max_length=length, min_length=length, do_sample=False
    )
    generator = og.Generator(model, params)
    ids = np.array(prompts, np.int32)
    began = time.perf_counter()
    generator.append_tokens(ids)
    ends = []
    while not generator.is_done():
        generator.generate_next_token()
        ends.append(time.perf_counter() - began)
    if len(ends) != output:
        raise RuntimeError(f"got {len(ends)} tokens instead of {output}")
    return ends


def summary(runs: list[tuple[int, list[float]]]) -> dict[str, dict[str, float]]:
    """The numbers by batch size; `runs` are pairs of batch size and times."""
    found = {}
    for size in dict.fromkeys(size for size, _ in runs):
        ends = [times for each, times in runs if each == size]
        gaps = [after - before for times in ends for before, after in itertools.pairwise(times)]
        tokens = size * sum(map(len, ends))
        found[str(size)] = {
            "tokens_per_second": tokens / sum(times[-1] for times in ends),
            **_percentiles("ttft", [times[0] for times in ends]),
            **_percentiles("gap", gaps),
        }
    return found


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"{name}_p{rank}_ms": float(np.percentile(seconds, rank)) * 1e3 for rank in (50, 99)}


def main() -> None:
    options = arguments()
    wanted = batches(options)
    model = load(options.model, options.threads)
    timed(model, [wanted[0][0][::-1]], 4)
    began = time.process_time()
    runs = [(len(batch), timed(model, batch, options.output_tokens)) for batch in wanted]
    report: dict[str, Any] = {
        "version": og.__version__,
        "cpu_seconds": time.process_time() - began,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "sizes": summary(runs),
        "runs": [times for _, times in runs],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
