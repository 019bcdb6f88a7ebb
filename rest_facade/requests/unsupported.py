"""Fields that other servers support and this one does not: refused, never silently dropped.

Each is listed with the values that change nothing and are therefore accepted, as `null` always is.
Fields in neither these tables nor the request models are unknown and ignored.
"""

from collections.abc import Mapping
from typing import Any

from rest_facade.json_encoding import to_json
from trivium.field_errors import unsupported_parameter
from trivium.wire.errors import ServiceError

Table = dict[str, tuple[Any, ...]]

# For both kinds of completions.
_OPENAI: Table = {
    "store": (False,),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "prompt_cache_options": (),
    "functions": (),
    "function_call": (),
    "suffix": ("",),
    "best_of": (1,),
}
_VLLM: Table = {
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "truncation_side": ("left",),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "thinking_token_budget": (),
}
_LLAMA: Table = {
    "grammar": ("",),
    "n_predict": (-1,),
    "repeat_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
}
_SGLANG: Table = {
    "stop_regex": (),
    "no_stop_trim": (False,),
    "custom_logit_processor": (),
    "custom_params": (),
    "lora_path": (),
    "return_hidden_states": (False,),
}
_CHAT: Table = {
    **_OPENAI,
    **_VLLM,
    **_LLAMA,
    **_SGLANG,
    "chat_template": (),
    "documents": ([],),
    "add_special_tokens": (False,),
    "echo": (False,),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
}
_COMPLETION: Table = {
    **_OPENAI,
    **_VLLM,
    **_LLAMA,
    **_SGLANG,
    "messages": (),
    "tools": ([],),
    "reasoning_effort": (),
}
_TOKENIZE: Table = {
    "mm_processor_kwargs": ({},),
    "chat_template": (),
}
_STREAM_OPTIONS: Table = {"include_obfuscation": (False,)}
_STRUCTURED_OUTPUTS: Table = {
    "whitespace_pattern": (),
    "structural_tag": (),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "disable_fallback": (True, False),
}
_MESSAGE: Table = {
    "function_call": (),
    "audio": (),
    "refusal": ("",),
    "prefix": (False,),
}


def refuse_unsupported_chat(raw: Mapping[str, Any]) -> None:
    """Raises ServiceError for the first unsupported field of a chat body of valid types."""
    _refuse(raw, _CHAT, "")
    _refuse_in_objects(raw)
    for position, message in enumerate(raw["messages"]):
        _refuse(message, _MESSAGE, f"messages[{position}].")


def refuse_unsupported_completion(raw: Mapping[str, Any]) -> None:
    """The same for plain completions."""
    _refuse(raw, _COMPLETION, "")
    _refuse_in_objects(raw)


def refuse_unsupported_tokenize(raw: Mapping[str, Any]) -> None:
    """The same for /tokenize."""
    _refuse(raw, _TOKENIZE, "")


def _refuse_in_objects(raw: Mapping[str, Any]) -> None:
    for name, table in (
        ("stream_options", _STREAM_OPTIONS),
        ("structured_outputs", _STRUCTURED_OUTPUTS),
    ):
        _refuse(raw.get(name) or {}, table, f"{name}.")


def _refuse(fields: Mapping[str, Any], table: Table, prefix: str) -> None:
    for name, allowed in table.items():
        value = fields.get(name)
        # By repr, as True == 1 in Python but not in JSON.
        if value is None or repr(value) in map(repr, allowed):
            continue
        param = prefix + name
        if not allowed:
            raise unsupported_parameter(param, "by this server")
        supported = " or ".join(dict.fromkeys(map(to_json, allowed)))
        raise ServiceError(
            "unsupported_value",
            f"Unsupported value: '{param}' supports only {supported} with this server.",
            param,
        )
