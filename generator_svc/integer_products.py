"""Whether this processor multiplies 8-bit integers exactly.

x86 processors with AVX2 or AVX-512 but without their VNNI instructions add two products of
unsigned and signed bytes into 16 bits, which saturates; ONNX Runtime uses that instruction there
(its quantisation guide calls for 7-bit weights then). Precision w8a8 needs the exact sum.
"""

import numpy as np

from generator_svc.device import Device

# y = a b, MatMulInteger of uint8 [1, 8] and eight constants of 127: a serialised ONNX model of IR
# version 8 and opset 17.
_GRAPH = (
    b"\x08\x08\x12\x00:\\\n\x18\n\x01a\n\x01b\x12\x01y\x22\rMatMulInteger\x12\x01g*\x13\x08\x08"
    b"\x08\x01\x10\x03B\x01bJ\x08" + b"\x7f" * 8 + b"Z\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08"
    b"\n\x02\x08\x01\n\x02\x08\x08b\x13\n\x01y\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x01\n\x02"
    b"\x08\x01B\x04\n\x00\x10\x11"
)
_LARGEST = np.full((1, 8), 255, np.uint8)
_EXACT = 8 * 255 * 127


def are_exact() -> bool:
    """Asks ONNX Runtime's CPU provider for the largest sum there is."""
    (product,) = Device("cpu").open(_GRAPH).run(None, {"a": _LARGEST})
    return int(product[0, 0]) == _EXACT
