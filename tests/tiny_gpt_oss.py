"""A tiny gpt-oss with its experts in MXFP4, and one that was trained to write Harmony.

The random one depends on every peculiarity of the family: sinks, biases, windows, the clamps of its
experts' activation, YaRN.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.tokenizer_svc.sample_templates import HARMONY, HARMONY_TOKENS
from tokenizer_svc.prompt.chat_template import ChatTemplate

SPECIAL_TOKENS = ("<|endoftext|>", *HARMONY_TOKENS)
END_TOKENS = ("<|return|>", "<|endoftext|>", "<|call|>")  # as in generation_config.json
WINDOW = 24
LIMIT = 7.0

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "max_position_embeddings": 2048,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "swiglu_limit": LIMIT,
}

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
FINAL = "<|channel|>final<|message|>The capital is Paris.<|return|>"
# What the trained model answers: messages, further template variables, its whole output.
TRAINING_EXAMPLES: tuple[tuple[list[dict[str, str]], dict[str, Any], str], ...] = (
    (QUESTION, {"reasoning_effort": "low"}, FINAL),
    (
        QUESTION,
        {"reasoning_effort": "medium"},
        f"<|channel|>analysis<|message|>An easy one.<|end|><|start|>assistant{FINAL}",
    ),
    (
        QUESTION,
        {"reasoning_effort": "high"},
        "<|channel|>analysis<|message|>France has many cities; one is the capital.<|end|>"
        f"<|start|>assistant{FINAL}",
    ),
    (
        WEATHER,
        {"reasoning_effort": "medium", "tools": [TOOL]},
        "<|channel|>analysis<|message|>The tool knows.<|end|><|start|>assistant<|channel|>"
        "commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Paris"}<|call|>',
    ),
)


def write_gpt_oss(family: str, tokenizer: Any, folder: Path) -> None:
    """`gpt-oss`, `gpt-oss-bf16` (the same, not quantised) or `gpt-oss-taught`."""
    import torch

    model = _random_model(tokenizer)
    round_experts(model)
    if family == "gpt-oss-taught":
        _train_on_examples(model, tokenizer)
    model = model.to(torch.bfloat16)
    if family == "gpt-oss-bf16":
        model.save_pretrained(folder)
    else:
        _save_in_mxfp4(model, folder)
    ends = [tokenizer.token_to_id(token) for token in END_TOKENS]
    generation = {"do_sample": True, "eos_token_id": ends, "pad_token_id": ends[1]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    _write_tokenizer(tokenizer, folder)


def harmony_text() -> list[str]:
    """Everything that the trained model reads and writes, to train its tokenizer."""
    return [_prompt(*example[:2]) + example[2] for example in TRAINING_EXAMPLES]


def _prompt(messages: list[dict[str, str]], variables: dict[str, Any]) -> str:
    rest = {name: value for name, value in variables.items() if name != "tools"}
    return ChatTemplate(HARMONY, {}).render(messages, variables.get("tools"), variables=rest)


def _random_model(tokenizer: Any) -> Any:
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=tokenizer.token_to_id("<|return|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
        bos_token_id=tokenizer.token_to_id("<|startoftext|>"),
        **SHAPE,
    )
    model = GptOssForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(2024)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else _deviation(name) * noise)
    return model


def _deviation(name: str) -> float:
    """Large enough for gate and up that a sixth of the activations is clamped."""
    deviations = {"sinks": 1.5, "bias": 0.7, "gate_up_proj": 0.6, "down_proj": 0.05, "router": 0.3}
    deviations["embed_tokens"] = 1.0
    return next((value for key, value in deviations.items() if key in name), 0.125)


def to_mxfp4(weight: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """The nearest blocks, uint8 [..., rows, blocks, 16], and scales for [..., rows, columns]."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(-1))) - 2
    scaled = blocks / 2.0 ** exponents[..., None]
    codes = np.abs(np.abs(scaled)[..., None] - magnitudes).argmin(-1) | (scaled < 0) << 3
    codes = codes.astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).astype(np.uint8)


def round_experts(model: Any) -> None:
    """Rounds the experts to values that MXFP4 represents exactly."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                packed = to_mxfp4(weight.float().transpose(1, 2).contiguous().numpy())
                rounded = convert_moe_packed_tensors(*map(torch.from_numpy, packed))
                weight.copy_(rounded)


def _save_in_mxfp4(model: Any, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weight = parameter.float().transpose(1, 2).contiguous().numpy()
            for suffix, array in zip(("blocks", "scales"), to_mxfp4(weight), strict=True):
                tensors[f"{name}_{suffix}"] = torch.from_numpy(np.ascontiguousarray(array))
        else:
            tensors[name] = parameter.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = ["GptOssForCausalLM"]
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (folder / "config.json").write_text(json.dumps(config, default=str))


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(HARMONY)


def _train_on_examples(model: Any, tokenizer: Any) -> None:
    """Trains all weights first, then, with the experts rounded, all but the experts' matrices."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for products this small
    texts = [(_prompt(*example[:2]), example[2]) for example in TRAINING_EXAMPLES]
    examples = [[tokenizer.encode(part).ids for part in text] for text in texts]
    _train(model, list(model.parameters()), examples)
    round_experts(model)
    rest = [p for n, p in model.named_parameters() if not n.endswith(("gate_up_proj", "down_proj"))]
    _train(model, rest, examples)
    torch.set_num_threads(threads)


def _train(model: Any, parameters: list[Any], examples: list[list[list[int]]]) -> None:
    """Trains until every answer token is by far the most likely, so that rounding is harmless."""
    import torch

    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    tokens = torch.zeros(len(examples), width, dtype=torch.int64)
    targets = torch.full((len(examples), width), -100)  # ignored by the loss
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(1000):
        logits = model(tokens).logits.flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
        if losses.max() < 0.01:
            return
        optimizer.zero_grad()
        (losses.sum() / (losses > 0).sum()).backward()
        optimizer.step()
    raise AssertionError("training did not converge")


def in_transformers(folder: Path) -> Any:
    """The model without quantisation, in float32, in which MXFP4 values are exact."""
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    return model.float().eval()
