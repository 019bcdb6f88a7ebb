"""Replaces every traced RMSNorm by one operator, fused with the residual addition before it.

Optimum traces an RMSNorm as ten nodes with casts that hide it from ONNX Runtime's own fusion, so
it is found by its module's name.
"""

from __future__ import annotations

import re

from generator_svc.export.graph.attention import module_output
from generator_svc.export.graph.graph import MICROSOFT, Graph

NORM_MODULE = re.compile(r"(/model/(?:.*/)?\w*norm/)[^/]+")


def fuse_norms(graph: Graph, epsilon: float) -> None:
    """Fuses all modules named `…norm`: x · rsqrt(mean(x²) + epsilon) · weight, on the last axis."""
    matches = (NORM_MODULE.fullmatch(name) for name in graph.nodes)
    for module in dict.fromkeys(match[1] for match in matches if match):
        _drop_casts(graph, module)
        _fuse(graph, module, epsilon)
    graph.finish()


def _drop_casts(graph: Graph, module: str) -> None:
    """Removes the casts inside a norm, which in a float32 trace are from float32 to float32.

    The residual is read from a cast's output, so the cast would otherwise survive the fusion.
    """
    casts = [node for node in graph.under(module) if node.op_type == "Cast"]
    for cast in casts:
        graph.replace_uses(cast.output[0], cast.input[0])
    graph.remove(casts)


def _fuse(graph: Graph, module: str, epsilon: float) -> None:
    nodes = graph.under(module)
    made = {name for node in nodes for name in node.output}
    outside = {name for node in nodes for name in node.input} - made
    weights = outside & graph.initializers.keys()
    assert (len(weights), len(outside)) == (1, 2), f"{module} reads {outside}"
    (weight,), (source,) = weights, outside - weights
    result = module_output(graph, module)
    graph.remove(nodes)
    residual = graph.producer(source)
    if residual is not None and residual.op_type == "Add" and "/mlp/" not in residual.name:
        _add_skip_norm(graph, module, [*residual.input, weight], result, source, epsilon)
        graph.remove([residual])
    else:
        graph.add(
            "SimplifiedLayerNormalization",
            f"{module}SimplifiedLayerNormalization",
            [source, weight],
            [result],
            axis=-1,
            epsilon=epsilon,
            stash_type=1,
        )


def _add_skip_norm(
    graph: Graph, module: str, inputs: list[str], result: str, total: str, epsilon: float
) -> None:
    """Adds a norm of a sum; the sum itself is the fourth output, for the next residual."""
    outputs = [result, "", "", total] if graph.consumers(total) else [result]
    graph.add(
        "SkipSimplifiedLayerNormalization",
        f"{module}SkipSimplifiedLayerNormalization",
        inputs,
        outputs,
        domain=MICROSOFT,
        epsilon=epsilon,
    )
