"""Published checkpoints: configurations, special tokens and pre-tokenizer patterns.

The values are from config.json, generation_config.json, tokenizer_config.json and the added tokens
of tokenizer.json in Qwen/Qwen2.5-7B-Instruct, deepseek-ai/DeepSeek-R1-Distill-Llama-8B,
openai/gpt-oss-20b and openai/gpt-oss-120b. Keys are the ids under which the models are served.
"""
# ruff: noqa: RUF001 - the wide bars are DeepSeek's

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# Fields of a configuration that hold one token id or a list of them.
TOKEN_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in text before the BPE runs; `special` ones are control tokens."""

    content: str
    special: bool = True


@dataclass(frozen=True)
class Published:
    """One checkpoint without its weights.

    Ids below `ordinary_tokens` belong to the BPE; the added tokens follow consecutively.
    `chat_template` is its name in llama.cpp's collection.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    ordinary_tokens: int
    added_tokens: tuple[AddedToken, ...]
    split: str
    chat_template: str
    normalizer: str | None = None
    adds_bos: bool = False

    def with_config(self, **fields: Any) -> Published:
        """The same checkpoint with other values in config.json, kept consistent with each other.

        Fewer layers truncate the per-layer values; a smaller vocabulary shrinks the BPE, and the
        ids of all added tokens move accordingly.
        """
        config = self.config | fields
        layers = config["num_hidden_layers"]
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
        if "max_window_layers" in config:
            config["max_window_layers"] = min(config["max_window_layers"], layers)
        moved = config["vocab_size"] - self.config["vocab_size"]
        return dataclasses.replace(
            self,
            config=_move_token_ids(config, moved),
            generation_config=_move_token_ids(self.generation_config, moved),
            ordinary_tokens=self.ordinary_tokens + moved,
        )


def _move_token_ids(config: dict[str, Any], by: int) -> dict[str, Any]:
    moved = dict(config)
    for field in TOKEN_ID_FIELDS:
        if (value := config.get(field)) is not None:
            moved[field] = [one + by for one in value] if isinstance(value, list) else value + by
    return moved


def _special(*names: str) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(name) for name in names)


def _plain(*names: str) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(name, special=False) for name in names)


def _reserved(start: int, stop: int) -> tuple[AddedToken, ...]:
    return _special(*(f"<|reserved_{index}|>" for index in range(start, stop)))


def _llama_reserved(start: int, stop: int) -> tuple[AddedToken, ...]:
    return _special(*(f"<|reserved_special_token_{index}|>" for index in range(start, stop)))


_QWEN = Published(
    config={
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    generation_config={
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "transformers_version": "4.37.0",
    },
    tokenizer_config={
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    },
    ordinary_tokens=151643,
    added_tokens=(
        *_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *_special("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
        *_special("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
        *_special("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
        *_plain("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
        *_plain("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    ),
    split=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    chat_template="Qwen-Qwen2.5-7B-Instruct",
    normalizer="NFC",
)

_DEEPSEEK = Published(
    config={
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    generation_config={
        "_from_model_config": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "transformers_version": "4.39.3",
    },
    tokenizer_config={
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<｜begin▁of▁sentence｜>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<｜end▁of▁sentence｜>",
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": "<｜end▁of▁sentence｜>",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
        "use_default_system_prompt": False,
    },
    ordinary_tokens=128000,
    added_tokens=(
        *_special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        *_llama_reserved(0, 2),
        *_special("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"),
        *_special("<|start_header_id|>", "<|end_header_id|>"),
        *_special("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        *_plain("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        *_special("<｜▁pad▁｜>"),
        *_llama_reserved(8, 248),
    ),
    split=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    chat_template="deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    adds_bos=True,
)

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

_GPT_OSS = Published(
    config={
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": 201088,
    },
    generation_config={
        "bos_token_id": 199998,
        "do_sample": True,
        "eos_token_id": [200002, 199999, 200012],
        "pad_token_id": 199999,
        "transformers_version": "4.55.0.dev0",
    },
    tokenizer_config={
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    ordinary_tokens=199998,
    added_tokens=(
        *_special("<|startoftext|>", "<|endoftext|>"),
        *_reserved(200000, 200002),
        *_special("<|return|>", "<|constrain|>"),
        *_reserved(200004, 200005),
        *_special("<|channel|>", "<|start|>", "<|end|>", "<|message|>"),
        *_reserved(200009, 200012),
        *_special("<|call|>"),
        *_reserved(200013, 200018),
        *_special("<|endofprompt|>"),
    ),
    split=rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    chat_template="openai-gpt-oss-120b",
)

PUBLISHED = {
    "qwen-2.5-7b": _QWEN,
    "deepseek-r1-distill-llama-8b": _DEEPSEEK,
    "gpt-oss-20b": _GPT_OSS.with_config(num_hidden_layers=24, num_local_experts=32),
    "gpt-oss-120b": _GPT_OSS,
}
