"""transformers' own generate on a model with random weights, one batch after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


def tokens_per_second(
    config: dict[str, Any], device: str, batches: Sequence[int], prompt: int, output: int
) -> dict[int, float]:
    """Output tokens/s by number of sequences; the time includes prefill.

    `config` has LlamaConfig's fields; float16 on CUDA, float32 elsewhere. All sequences generate
    all of their tokens, greedily. Loading and a short warm-up are not counted. A batch that does
    not fit into memory is left out, and so are all if PyTorch does not see the device.
    """
    import torch
    import transformers

    if device == "cuda" and not torch.cuda.is_available():
        return {}

    transformers.logging.set_verbosity_error()
    kind = torch.float16 if device == "cuda" else torch.float32
    with torch.device(device):
        torch.manual_seed(0)
        llama = transformers.LlamaConfig(**config)
        model = transformers.AutoModelForCausalLM.from_config(llama, torch_dtype=kind).eval()

    def seconds(rows: int, new: int) -> float:
        ids = torch.randint(2, config["vocab_size"], (rows, prompt), device=device)
        began = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
        )
        made = made.cpu()  # waits for the device
        assert made.shape == (rows, prompt + new)
        return time.perf_counter() - began

    seconds(1, 2)
    found = {}
    for rows in batches:
        try:
            found[rows] = rows * output / seconds(rows, output)
        except torch.OutOfMemoryError:
            continue
    return found
