"""Small ONNX graphs that the engine runs besides the model, as files; `build` writes them.

Also the names that the exporter and the runner agree on for the model's own graph.
"""

from pathlib import Path

DEVICE_TOPK = Path(__file__).with_name("device_topk.onnx")
ARGMAX = Path(__file__).with_name("argmax.onnx")
DECODE_INPUTS = Path(__file__).with_name("decode_inputs.onnx")
BYTE_PRODUCT = Path(__file__).with_name("byte_product.onnx")

# Metadata of a graph that returns the logits of each row's last token even if prompts that start
# at position 0 are padded on the right.
LOGITS_OF, LAST_TOKEN = "logits_of", "last_token"

# Optional graph input that selects the tokens whose logits are returned: 1 is the last token, 2 the
# one before it.
TOKENS_FROM_END = "logits_tokens_from_end"
