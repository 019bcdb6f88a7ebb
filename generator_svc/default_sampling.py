"""A model's own default sampling parameters, from its generation_config.json."""

import math
from typing import Any

from generator_svc.sequence import Sampling
from trivium.model_directory import ModelDirectory, ModelDirectoryError

_LIMITS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1.0, math.inf),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 10.0),
}


def default_sampling(model: ModelDirectory) -> Sampling:
    """The model's own sampling values from generation_config.json, then OpenAI's.

    A model that says `do_sample: false` in so many words is greedy by default.
    Raises ModelDirectoryError for a value that no request could have.
    """
    known: dict[str, Any] = {}
    if model.generation_config.get("do_sample") is False:
        known["temperature"] = 0.0
    for name, (least, most) in _LIMITS.items():
        value = model.generation_config.get(name)
        if value is None or name in known:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_whole = is_number and math.isfinite(value) and value == int(value)
        if not is_number or not least <= value <= most or (name == "top_k" and not is_whole):
            raise ModelDirectoryError(
                f"{model.path}: generation_config.json: {name} is {value!r}, which is not "
                f"{'a whole number ' if name == 'top_k' else ''}between {least} and {most}"
            )
        known[name] = int(value) if name == "top_k" else value  # some files say 50.0
    return Sampling(**known)
