"""How many of a thing a request may have: what REST and gRPC callers are both held to.

Generous for whoever means it, and far below what would keep a process busy for seconds.
"""

MAX_MESSAGES = 2_048
MAX_CONTENT_PARTS = 8_192  # of all messages together
MAX_TOOL_CALLS = 4_096  # of all messages together
MAX_TOOLS = 128
MAX_LOGIT_BIASES = 16_384
MAX_TEMPLATE_VARIABLES = 64
MAX_PROMPTS = 128  # of a plain completion
MAX_TOKEN_IDS = 524_288  # of one list
