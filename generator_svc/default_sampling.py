"""A model's default sampling parameters, from its generation_config.json."""

import math
from typing import Any

from generator_svc.sequence import SamplingParams
from trivium.limits import SAMPLING
from trivium.model_directory import ModelDirectory, ModelDirectoryError

# The fields that generation_config.json of transformers shares with a request.
_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def default_sampling(model: ModelDirectory) -> SamplingParams:
    """Default sampling parameters: from generation_config.json, else OpenAI's defaults.

    Raises ModelDirectoryError for a value outside the range allowed in requests.
    """
    try:
        values = sampling_values(model.generation_config)
    except ValueError as error:
        raise ModelDirectoryError(f"{model.path}: generation_config.json: {error}") from None
    return SamplingParams(**values)


def sampling_values(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The request fields for which the configuration has defaults.

    A model with an explicit `do_sample: false` is greedy by default. Raises ValueError for a value
    outside the range allowed in requests.
    """
    values: dict[str, Any] = {}
    if generation_config.get("do_sample") is False:
        values["temperature"] = 0.0
    for name in _MODEL_DEFAULTS:
        allowed, value = SAMPLING[name], generation_config.get(name)
        if value is None or name in values:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_whole = is_number and math.isfinite(value) and value == int(value)
        if not is_number or value not in allowed or (name == "top_k" and not is_whole):
            whole = "a whole number " if name == "top_k" else ""
            raise ValueError(f"{name} is {value!r}, which is not {whole}{allowed}")
        values[name] = int(value) if name == "top_k" else value  # some files have 50.0
    return values
