"""Whether the models fit into this machine, together, as their generators plan it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from trivium.cli.pipeline import Pipeline

# Of tokenizer_svc, rest_facade and the command itself, on the host; and of further ones.
SERVICES_BYTES = 320 * 2**20
TOKENIZER_BYTES, FACADE_BYTES = 140 * 2**20, 80 * 2**20


class DoesNotFit(Exception):
    """Generators refused, in words of their own on stderr; `status` is their exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def memory_plans(pipeline: Pipeline) -> list[str]:
    """One line for each model: its weights, its cache, the memory there is. Raises DoesNotFit.

    Each model is planned beside one sequence of those before it, even if one of them is refused:
    what the last one says is missing is then enough for all. A process of its own does it, so that
    no CUDA context stays open here.
    """
    more = (pipeline.tokenizers - 1) * TOKENIZER_BYTES + (pipeline.facades - 1) * FACADE_BYTES
    taken = {"cpu": SERVICES_BYTES + more, "cuda": 0}
    lines, status = [], 0
    for stage in pipeline.stages()[: len(pipeline.models)]:
        done = subprocess.run(
            [sys.executable, "-m", "generator_svc.fit", json.dumps(taken)],
            env={**os.environ, **stage.environment},
            stdout=subprocess.PIPE,
            check=False,
        )
        status = status or done.returncode
        if not done.stdout:  # it is not for want of memory
            break
        plan = json.loads(done.stdout)
        taken[plan["device"]] += plan["needed_bytes"]
        lines.append(plan.get("text", ""))
    if status != 0:
        raise DoesNotFit(status)
    return lines
