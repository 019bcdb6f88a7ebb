"""Names of models on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^\s:]+))?(?::(?P<gguf>\S+))?")


@dataclass(frozen=True)
class HubName:
    """`owner/name`, `@` a branch, tag or commit, `:` a GGUF file or its quantisation (Q4_K_M)."""

    text: str
    repo: str
    revision: str
    gguf: str | None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parses a name; None if it does not have this form or can only be a path."""
        found = None if is_path(text) else _NAME.fullmatch(text)
        return found and cls(text, found["repo"], found["revision"] or "main", found["gguf"])


def is_path(text: str) -> bool:
    """Whether it can only be a path, although it may look like owner/name."""
    return text.startswith(("/", "./", "../", "~")) or (
        text.endswith((".gguf", ".safetensors")) and ":" not in text
    )
