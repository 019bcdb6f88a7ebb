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
    """A generator refused, in words of its own on stderr; `status` is its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def memory_plans(pipeline: Pipeline) -> list[str]:
    """One line for each model: its weights, its cache, the memory there is. Raises DoesNotFit.

    Each model is planned beside one sequence of those before it. A process of its own does it, so
    that no CUDA context stays open here.
    """
    more = (pipeline.tokenizers - 1) * TOKENIZER_BYTES + (pipeline.facades - 1) * FACADE_BYTES
    taken = {"cpu": SERVICES_BYTES + more, "cuda": 0}
    lines = []
    for stage in pipeline.stages()[: len(pipeline.models)]:
        done = subprocess.run(
            [sys.executable, "-m", "generator_svc.fit", json.dumps(taken)],
            env={**os.environ, **stage.environment},
            stdout=subprocess.PIPE,
            check=False,
        )
        if done.returncode != 0:
            raise DoesNotFit(done.returncode)
        plan = json.loads(done.stdout)
        taken[plan["device"]] += plan["needed_bytes"]
        lines.append(plan["text"])
    return lines
