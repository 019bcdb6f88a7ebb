"""What the services' settings turn on and off, for the banner."""

import os

from pydantic import TypeAdapter

# The settings that can turn off what services offer, by its name in the banner.
_FEATURE_SETTINGS = {
    "chat": "TRIVIUM_FACADE_CHAT_PAGE",
    "docs": "TRIVIUM_FACADE_DOCS",
    "metrics": "TRIVIUM_FACADE_METRICS",
    "reflection": "TRIVIUM_TOKENIZER_REFLECTION",
}


def requires_api_keys() -> bool:
    """Whether the REST API requires API keys, by the facade's setting."""
    return bool(os.environ.get("TRIVIUM_FACADE_API_KEYS_FILE"))


def disabled_features() -> set[str]:
    """What is turned off by the services' settings."""
    return {
        name
        for name, setting in _FEATURE_SETTINGS.items()
        if not TypeAdapter(bool).validate_python(os.environ.get(setting) or True)
    }
