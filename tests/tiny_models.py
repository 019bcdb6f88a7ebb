"""Tiny checkpoints with random weights, and model folders that the real exporter makes of them.

Exports are cached in a folder named after a digest of the sources of these models and the exporter,
so that they are made only once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tests import tiny_gpt_oss
from tests.tokenizer_svc import sample_templates

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = range(3)
CONTEXT_LENGTH = 2048

# Enough English for a few hundred merges, so that tokens are neither bytes nor whole words.
CORPUS = (
    "The capital of France is Paris. What is the capital of France? You are a helpful assistant. "
    "Once upon a time there was a small house near the river, and in the house lived an old man "
    "who told stories to the children of the village. Every evening they came to listen. "
    "He spoke of ships and storms, of kings and thieves, of mountains that touch the clouds. "
    "Numbers come in order: one two three four five six seven eight nine ten, 1 2 3 4 5 6 7 8 9. "
    "def main(arguments): return sum(value for value in arguments if value is not None)\n"
    '{"name": "value", "list": [1, 2, 3], "nothing": null, "true": false}\n'
    "system user assistant tool developer\n"
)

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LINEAR_SCALING = {"rope_type": "linear", "factor": 4.0}

# By name: the configuration class in transformers, and the differences from `SHAPE`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama-llama3": ("LlamaConfig", {"rope_theta": 500_000.0, "rope_scaling": LLAMA3_SCALING}),
    "llama-yarn": ("LlamaConfig", {"rope_scaling": YARN_SCALING}),
    "llama-linear": ("LlamaConfig", {"rope_scaling": LINEAR_SCALING}),
    "llama-transformers5": ("LlamaConfig", {"rope_theta": 250.0}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": 24, "head_dim": 16}),
    "gpt-oss": ("GptOssConfig", {}),
}
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "rope_theta": 10_000.0,
    "bos_token_id": IM_START,
    "eos_token_id": IM_END,
    "pad_token_id": END_OF_TEXT,
    # Wide enough that the logits are far from flat and the generated tokens vary.
    "initializer_range": 0.25,
}


def tiny_model_directory(family: str = "llama", precision: str = "fp32") -> Path:
    """A model folder of about a megabyte, made by the real exporter in seconds, then cached."""
    from generator_svc.export import ExportOptions, export_model

    out = cache_folder() / f"tiny-{family}-{precision}"
    options = ExportOptions(precision=precision)
    return export_model(str(tiny_checkpoint(family)), out, options)


def tiny_checkpoint(family: str = "llama") -> Path:
    """A Hugging Face folder with random weights, a tokenizer and a ChatML template; cached."""
    from filelock import FileLock

    folder = cache_folder() / "checkpoints" / family
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "complete").exists():
            _write_checkpoint(family, folder)
            (folder / "complete").touch()
    return folder


@functools.cache
def cache_folder() -> Path:
    """Named after the sources' digest, so that a change in the exporter makes new models."""
    import generator_svc.export as exporter

    own = [Path(__file__), Path(tiny_gpt_oss.__file__), Path(sample_templates.__file__)]
    digest = hashlib.sha256()
    for path in [*own, *sorted(Path(exporter.__file__).parent.rglob("*.py"))]:
        digest.update(path.read_bytes())
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "trivium" / "tests" / digest.hexdigest()[:16]


def _write_checkpoint(family: str, folder: Path) -> None:
    import torch
    import transformers

    if family.startswith("gpt-oss"):
        corpus = [CORPUS, *tiny_gpt_oss.harmony_text() * 2]
        tokenizer = _tokenizer(tiny_gpt_oss.SPECIAL_TOKENS, corpus)
        tiny_gpt_oss.write_gpt_oss(family, tokenizer, folder)
        return
    kind, differences = FAMILIES[family]
    tokenizer = _tokenizer(SPECIAL_TOKENS, [CORPUS])
    settings = SHAPE | {"vocab_size": tokenizer.get_vocab_size()} | differences
    config = getattr(transformers, kind)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(2024)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # Norm weights and biases start as ones and zeros, which would hide a lost one.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if family == "llama-transformers5":
        _rewrite_as_transformers5(folder / "config.json")
    _write_tokenizer(tokenizer, folder)


def _rewrite_as_transformers5(file: Path) -> None:
    config = json.loads(file.read_text())
    theta = config.pop("rope_theta")
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config["transformers_version"] = "5.0.0"
    file.write_text(json.dumps(config))


def _tokenizer(special_tokens: tuple[str, ...], corpus: list[str]) -> Any:
    """Byte-level BPE over all 256 bytes, which encodes any text losslessly."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        # The class that transformers 5 writes and 4 does not know.
        "tokenizer_class": "TokenizersBackend",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
