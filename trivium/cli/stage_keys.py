"""Checks that the local services have the API keys that they require of each other."""

from __future__ import annotations

import os

from trivium.cli.pipeline import SettingConflict

# The setting of the keys that a stage accepts, and of the key with which the caller calls it.
_PAIRS = {
    "TRIVIUM_TOKENIZER_API_KEYS_FILE": "TRIVIUM_FACADE_TOKENIZER_API_KEY_FILE",
    "TRIVIUM_GENERATOR_API_KEYS_FILE": "TRIVIUM_TOKENIZER_GENERATOR_API_KEY_FILE",
}


def check_stage_keys() -> None:
    """Raises SettingConflict if a stage would be refused by the next one for lack of a key."""
    for accepted, own in _PAIRS.items():
        if os.environ.get(accepted) and not os.environ.get(own):
            raise SettingConflict(
                f"{accepted} requires {own}, the file with the calling stage's key"
            )
