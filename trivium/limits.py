"""The ranges and maximum counts of request fields, for REST and gRPC callers alike.

Defined only here: the facade's request models, the checks in tokenizer and generator, and a model's
own defaults all use them. Counts are generous for legitimate use, and far below what would keep a
process busy for seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """The numbers from `minimum` to `maximum`, inclusive; `above_minimum` excludes the minimum."""

    minimum: int
    maximum: int
    above_minimum: bool = False

    def __str__(self) -> str:
        return f"{'above' if self.above_minimum else 'from'} {self.minimum} to {self.maximum}"

    def __contains__(self, value: float) -> bool:
        return not self.is_below(value) and value <= self.maximum

    def is_below(self, value: float) -> bool:
        """Whether `value` is too small."""
        return value <= self.minimum if self.above_minimum else value < self.minimum


# The numeric fields of trivium.sampling.v1.SamplingParams by name, except `seed`.
SAMPLING: Mapping[str, Range] = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1),
    "top_k": Range(-1, INT32_MAX),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 10, above_minimum=True),
    "top_n_sigma": Range(-1, 100),
}
SEED = Range(-(2**63), 2**63 - 1)
LOGIT_BIAS = Range(-100, 100)
TOKEN_ID = Range(0, INT32_MAX)

MAX_COMPLETION_TOKENS = Range(1, INT32_MAX)
PLAIN_COMPLETION_TOKENS = Range(0, INT32_MAX)  # 0 to echo or score a prompt
MIN_TOKENS = Range(0, INT32_MAX)
TRUNCATE_PROMPT_TOKENS = Range(-1, INT32_MAX)  # but not 0
N = Range(1, 128)
TOP_LOGPROBS = Range(0, 20)
COMPLETION_LOGPROBS = Range(0, 5)  # of a plain completion

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 4_096  # of each
MAX_STOP_TOKENS = 64
MAX_CHOICES = 1_024  # of structured_outputs.choice
MAX_PATTERN_CHARACTERS = 65_536  # of a regular expression, a grammar, or one of the choices
MAX_SCHEMA_CHARACTERS = 262_144
MAX_NAME_CHARACTERS = 64  # of a function or a response format
NAME_PATTERN = "^[a-zA-Z0-9_-]+$"
MAX_MESSAGES = 2_048
MAX_CONTENT_PARTS = 8_192  # of all messages together
MAX_TOOL_CALLS = 4_096  # of all messages together
MAX_TOOLS = 128
MAX_LOGIT_BIASES = 16_384
MAX_ALLOWED_TOKENS = 16_384
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 256  # of each
MAX_TEMPLATE_VARIABLES = 64
MAX_PROMPTS = 128  # of a plain completion
MAX_TOKEN_IDS = 524_288  # of one list
MAX_PROMPT_LOGPROBS = 524_288  # of prompts, in all choices, alternatives included
