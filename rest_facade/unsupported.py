"""Fields that mean something elsewhere and nothing here: refused, never silently dropped.

Each stands with the values that change nothing and are therefore let through; `null` always is.
Fields in neither this table nor `schema` are unknown to everyone and ignored.
"""

from collections.abc import Mapping
from typing import Any

from trivium.wire.errors import ServiceError

_REQUEST: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    # vLLM's
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "priority": (0,),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    # llama-server's
    "grammar": ("",),
    "json_schema": ({},),
    "n_predict": (-1,),
    "repeat_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
}
_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}
_MESSAGE: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "audio": (),
    "refusal": ("",),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "prefix": (False,),
}


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raises for the first field of a checked body that asks for something not built."""
    _refuse(raw, _REQUEST, "")
    _refuse(raw.get("stream_options") or {}, _STREAM_OPTIONS, "stream_options.")
    for position, message in enumerate(raw["messages"]):
        _refuse(message, _MESSAGE, f"messages[{position}].")


def _refuse(fields: Mapping[str, Any], table: dict[str, tuple[Any, ...]], place: str) -> None:
    for name, harmless in table.items():
        value = fields.get(name)
        # By repr, as True == 1 in Python and not in JSON.
        if value is None or repr(value) in map(repr, harmless):
            continue
        param = place + name
        if not harmless:
            raise ServiceError(
                "unsupported_parameter",
                f"Unsupported parameter: '{param}' is not supported by this server.",
                param,
            )
        raise ServiceError(
            "unsupported_value",
            f"Unsupported value: '{param}' has a value that this server does not support.",
            param,
        )
