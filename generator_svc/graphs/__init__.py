"""Small ONNX graphs that the engine runs beside the model, as files; `build` writes them.

And what the metadata of the model's own graph say of it.
"""

from pathlib import Path

DEVICE_TOPK = Path(__file__).with_name("device_topk.onnx")
ARGMAX = Path(__file__).with_name("argmax.onnx")
DECODE_INPUTS = Path(__file__).with_name("decode_inputs.onnx")
BYTE_PRODUCT = Path(__file__).with_name("byte_product.onnx")

# In the metadata of a graph whose logits are those of each row's last token, though prompts that
# begin together may be padded to the right.
LOGITS_OF, LAST_TOKEN = "logits_of", "last_token"

# The graph's input, which need not be given, that says of which tokens: 1 is the last, 2 the one
# before it.
TOKENS_FROM_END = "logits_tokens_from_end"
