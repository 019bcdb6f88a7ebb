"""Maps a matrix product to the module whose input was observed in calibration."""

from __future__ import annotations

import re

_PRODUCT = re.compile(r"/model/layers\.(\d+)/(?:self_attn|mlp)/(\w+)/MatMul")

# Modules that read the same tensor are observed as the first of them.
_INPUTS = {
    "qkv_proj": "self_attn.q_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.q_proj",
    "v_proj": "self_attn.q_proj",
    "o_proj": "self_attn.o_proj",
    "gate_up_proj": "mlp.gate_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.gate_proj",
    "down_proj": "mlp.down_proj",
}


def observed_module(product: str) -> tuple[int, str]:
    """`/model/layers.3/mlp/gate_up_proj/MatMul` to (3, "mlp.gate_proj"); (-1, "") for others."""
    found = _PRODUCT.fullmatch(product)
    name = _INPUTS.get(found[2], "") if found else ""
    return (int(found[1]), name) if found and name else (-1, "")
