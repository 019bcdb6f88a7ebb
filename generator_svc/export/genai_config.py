"""`genai_config.json` in the layout of onnxruntime-genai's model builder."""

from __future__ import annotations

from typing import Any

from generator_svc.export.checkpoint.decoder import Decoder

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"


def genai_config(
    decoder: Decoder,
    eos_token_ids: list[int],
    bos_token_id: int | None,
    pad_token_id: int | None,
    sampling: dict[str, Any],
) -> dict[str, Any]:
    """The content of the file; `sampling` is the model's generation_config."""
    model = {
        "bos_token_id": bos_token_id,
        "context_length": decoder.context_length,
        "decoder": _decoder(decoder),
        "eos_token_id": eos_token_ids[0] if len(eos_token_ids) == 1 else eos_token_ids,
        "pad_token_id": eos_token_ids[0] if pad_token_id is None else pad_token_id,
        "type": "gptoss" if decoder.family == "gpt_oss" else decoder.family,
        "vocab_size": decoder.vocab_size,
    }
    if bos_token_id is None:
        del model["bos_token_id"]
    return {"model": model, "search": _search(decoder, sampling)}


def _decoder(decoder: Decoder) -> dict[str, Any]:
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH_FILE,
        "head_size": decoder.head_size,
        "hidden_size": decoder.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": decoder.num_attention_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
    }


def _search(decoder: Decoder, sampling: dict[str, Any]) -> dict[str, Any]:
    return {
        "do_sample": bool(sampling.get("do_sample", False)),
        "early_stopping": True,
        "max_length": decoder.context_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": float(sampling.get("repetition_penalty") or 1.0),
        "temperature": float(sampling.get("temperature") or 1.0),
        "top_k": int(sampling.get("top_k") or 50),
        "top_p": float(sampling.get("top_p") or 1.0),
    }
