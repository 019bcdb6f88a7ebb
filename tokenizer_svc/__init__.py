"""The stage that owns all text: chat templates, tokenizers and the models' output formats."""

import os

# The library would start a thread per processor to split up a batch of texts; ours hold one each.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
