"""Whether services of one machine have the keys that they ask each other for."""

from __future__ import annotations

import os

from trivium.cli.pipeline import SettingConflict

# The keys that a stage accepts, and the one by which the stage before calls it.
_PAIRS = {
    "TRIVIUM_TOKENIZER_API_KEYS_FILE": "TRIVIUM_FACADE_TOKENIZER_API_KEY_FILE",
    "TRIVIUM_GENERATOR_API_KEYS_FILE": "TRIVIUM_TOKENIZER_GENERATOR_API_KEY_FILE",
}


def check_stage_keys() -> None:
    """Raises SettingConflict for a stage that would be refused for want of a key."""
    for accepted, own in _PAIRS.items():
        if os.environ.get(accepted) and not os.environ.get(own):
            raise SettingConflict(
                f"{accepted} needs {own}, the file with the key of the stage that calls"
            )
