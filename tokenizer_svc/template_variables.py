"""What a chat template is given besides messages and tools.

Knows which variables the operator allows and which of them a template reads.
"""

import json
from collections.abc import Mapping, Set
from typing import Any

from tokenizer_svc.request import Conversation
from trivium.wire.errors import ServiceError

_EFFORT = "reasoning_effort"
# Variables by which a template that knows no effort is told whether to reason at all.
_SWITCHES = ("enable_thinking", "thinking")


def template_variables(
    conversation: Conversation, source: str, allowed: Set[str]
) -> Mapping[str, Any]:
    """The variables by name; ServiceError for one that is not allowed or means nothing here."""
    variables = {}
    for name, text in conversation.variables.items():
        if name not in allowed:
            field = f"chat_template_kwargs.{name}"
            message = f"Unsupported parameter: '{field}' is not supported with this server."
            raise ServiceError("unsupported_parameter", message, field)
        variables[name] = json.loads(text)
    if conversation.reasoning_effort is not None:
        variables |= _effort(conversation.reasoning_effort, source)
    return variables


def _effort(effort: str, source: str) -> dict[str, Any]:
    if _EFFORT in source:
        return {_EFFORT: effort}
    switches = [name for name in _SWITCHES if name in source]
    if not switches:
        message = f"Unsupported parameter: '{_EFFORT}' is not supported with this model."
        raise ServiceError("unsupported_parameter", message, _EFFORT)
    return dict.fromkeys(switches, effort != "none")
