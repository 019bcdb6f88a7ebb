"""Token masks for constrained decoding: the only importer of llguidance.

    grammar_of           the caller's constraint as an llguidance grammar
    TokenTable           the tokens of a model, loaded once
    CompiledConstraint   a grammar compiled for one request; never shared, see below
    ConstraintState      the state of one sequence in it

Copies of a matcher share the lexer's cache and thereby its limits: what one copy uses up is missing
for the others. So every request compiles a matcher of its own, shared by its sequences only, and no
request's result depends on other requests.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from generator_svc.constraint.json_schema import OPTIONS, prepared, prepared_lark
from generator_svc.sequence import ConstraintError
from trivium.ecma_regex import to_rust

# An optional property takes four items in a row of the Earley parser. The rows of JSON schemas are
# wide and cheap, while a step of an ambiguous grammar, which only Lark can express, takes 15 ms at
# 500 items and 170 ms at 1,000.
_MAX_ITEMS_IN_ROW = {"json_schema": 2_000, "regex": 500, "lark": 500}
_OVER_LIMIT = re.compile(
    r"too (big|large|many|complex|deep|long)|fuel|recursion limit|nest|max is|exceed|TooComplex"
)
# Parts of an error message that quote the caller: quotations, and lines of patterns or grammars.
_QUOTED = re.compile(r"\n .*|'[^'\n]*'|\"[^\"\n]*\"|(?<=Invalid type: ).*|(?<=Unknown format: ).*")
_MAX_MESSAGE_LENGTH = 500


def grammar_of(kind: str, text: str) -> str:
    """The llguidance grammar of a `json_schema`, `regex` or `lark`; raises ConstraintError."""
    if kind == "regex":
        return LLMatcher.grammar_from_regex(to_rust(text))
    try:
        if kind == "lark":
            return LLMatcher.grammar_from_lark(prepared_lark(text))
        assert kind == "json_schema", f"unknown kind of constraint: {kind}. This is a bug."
        if text.strip() == "true":
            text = "{}"
        options = cast("Any", OPTIONS)
        return LLMatcher.grammar_from_json_schema(prepared(text), overrides=options)
    except ValueError as error:
        _reject(kind, str(error))


class TokenTable:
    """A model's tokens: their bytes, which are control tokens, and which end a text.

    Ids range from 0 to `vocabulary_size` - 1; those without a token in the tokenizer file are never
    allowed. Raises ValueError for a file that llguidance does not support, or if no token ends a
    text.
    """

    def __init__(self, file: Path, vocabulary_size: int, eos_token_ids: Sequence[int]) -> None:
        text = file.read_text(encoding="utf-8")
        try:
            num_tokens = LLTokenizer(text).vocab_size
            self.tokenizer = LLTokenizer(
                text, max(num_tokens, vocabulary_size), list(eos_token_ids) or None
            )
        except BaseException as error:  # a Rust panic is not an Exception
            raise ValueError(
                f"{file}: the tokenizer does not support constraints: {error}"
            ) from error
        self.vocabulary_size = vocabulary_size
        self.num_tokens = num_tokens
        ends = (token_id for token_id in self.tokenizer.eos_tokens if token_id < vocabulary_size)
        self.end_token_ids = frozenset(ends)
        if not self.end_token_ids:
            raise ValueError(f"{file}: none of the model's tokens ends a text")


def _limits(kind: str) -> LLParserLimits:
    return LLParserLimits(
        max_items_in_row=_MAX_ITEMS_IN_ROW[kind],
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,  # 14 ms
        step_max_items=50_000,  # 3 ms
        max_lexer_states=32_000,  # one or two kB each
        max_grammar_size=500_000,
        verbose_errors=False,
    )


class CompiledConstraint:
    """A constraint compiled for the sequences of one request. Raises ConstraintError.

    `end_token_ids` end a text; they are allowed once it is complete.
    """

    def __init__(self, table: TokenTable, kind: str, grammar: str) -> None:
        self.end_token_ids = table.end_token_ids
        self._table = table
        self._kind = kind
        try:
            self._matcher = LLMatcher(table.tokenizer, grammar, log_level=0, limits=_limits(kind))
        except BaseException as error:  # a Rust panic is not an Exception
            _reject(kind, str(error))
        if self._matcher.is_error():
            _reject(kind, self._matcher.get_error())

    def new_state(self) -> "ConstraintState":
        """The state before the first token; takes a few microseconds."""
        return ConstraintState(self._table, self._kind, self._matcher.deep_copy())


class ConstraintState:
    """A sequence's state in its constraint; for one thread."""

    def __init__(self, table: TokenTable, kind: str, matcher: LLMatcher) -> None:
        self._table = table
        self._kind = kind
        self._matcher = matcher
        self._bits = np.zeros((table.tokenizer.vocab_size + 31) // 32, np.int32)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Mask of allowed next tokens, bool [vocabulary], at least one; raises ConstraintError."""
        try:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        except BaseException as error:  # a Rust panic is not an Exception
            _reject(self._kind, str(error))
        if self._matcher.is_error():
            _reject(self._kind, self._matcher.get_error())
        table = self._table
        bits = np.unpackbits(
            self._bits.view(np.uint8), count=table.vocabulary_size, bitorder="little"
        )
        bits[table.num_tokens :] = 0
        return bits.view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Advances by the next token, which has to be allowed; raises ConstraintError."""
        try:
            accepted = self._matcher.consume_token(token_id)
        except BaseException as error:  # a Rust panic is not an Exception
            _reject(self._kind, str(error))
        if not accepted:
            _reject(self._kind, self._matcher.get_error())


def _reject(kind: str, reason: str) -> NoReturn:
    """Raises the ConstraintError for an llguidance error message."""
    reason = reason.replace("<non-verbose/>", "").strip()[:_MAX_MESSAGE_LENGTH]
    if reason.startswith("NoExtension"):
        reason = "no text matches it"
    if _OVER_LIMIT.search(_QUOTED.sub("", reason)):
        raise ConstraintError("json_schema_too_complex", f"The constraint is too complex: {reason}")
    if kind == "json_schema":
        raise ConstraintError("invalid_json_schema", f"The JSON schema cannot be used: {reason}")
    raise ConstraintError("invalid_value", f"The {kind} cannot be used: {reason}")
