"""The stage that owns all text: chat templates, tokenizers and the models' output formats."""

import os

# The library would start a thread for each processor it sees, to share out a batch of texts; ours
# hold one text each.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
