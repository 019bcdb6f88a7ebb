"""Text in, text out: the stage that owns templates, tokenizers and the formats of answers."""

import os

# The library would start a thread for each processor it sees, to share out a batch of texts; ours
# hold one text each.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
