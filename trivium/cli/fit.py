"""Whether all models together fit into this machine's memory, as their generators plan it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from trivium.cli.pipeline import Pipeline

# Host memory of tokenizer_svc, rest_facade and this command together; and of each further replica.
SERVICES_BYTES = 320 * 2**20
TOKENIZER_BYTES, FACADE_BYTES = 140 * 2**20, 80 * 2**20


class DoesNotFit(Exception):
    """Generators refused, and said why on stderr; `status` is their exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def memory_plans(pipeline: Pipeline) -> list[str]:
    """One line per model: its weights, KV cache and available memory. Raises DoesNotFit.

    Each model is planned with room for the models before it, with one sequence each, even if one of
    those does not fit, so that the last reported shortfall covers all models. A separate process
    makes the plan, so that no CUDA context stays open here.
    """
    more = (pipeline.tokenizers - 1) * TOKENIZER_BYTES + (pipeline.facades - 1) * FACADE_BYTES
    reserved = {"cpu": SERVICES_BYTES + more, "cuda": 0}
    lines, status = [], 0
    for stage in pipeline.stages()[: len(pipeline.models)]:
        done = subprocess.run(
            [sys.executable, "-m", "generator_svc.fit", json.dumps(reserved)],
            env={**os.environ, **stage.environment},
            stdout=subprocess.PIPE,
            check=False,
        )
        status = status or done.returncode
        if not done.stdout:  # failed for another reason than memory
            break
        plan = json.loads(done.stdout)
        reserved[plan["device"]] += plan["needed_bytes"]
        lines.append(plan.get("text", ""))
    if status != 0:
        raise DoesNotFit(status)
    return lines
