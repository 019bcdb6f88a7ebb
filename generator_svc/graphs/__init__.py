"""Small ONNX graphs that the engine runs beside the model, as files; `build` writes them."""

from pathlib import Path

DEVICE_TOPK = Path(__file__).with_name("device_topk.onnx")
ARGMAX = Path(__file__).with_name("argmax.onnx")
DECODE_INPUTS = Path(__file__).with_name("decode_inputs.onnx")
BYTE_PRODUCT = Path(__file__).with_name("byte_product.onnx")
