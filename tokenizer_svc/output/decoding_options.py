"""Per-request decoding options, for plain completions and for chats."""

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tokenizer_svc.families.choose import ModelOutputFormat
from tokenizer_svc.families.parser import Parser, PlainParser
from tokenizer_svc.families.thinking import Thinking
from tokenizer_svc.output.events import FinishReason
from tokenizer_svc.output.stop import StopStrings
from tokenizer_svc.request.types import ToolUse, ValidOptions

_LETTERS_AND_DIGITS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class DecodingOptions:
    """How a request's choices are decoded: output parser, visible special tokens, stop strings.

    `markers` are the special tokens that the parser has to see. `multi_token_markers` are those of
    several tokens, within which the output may end. `forced_call` is whether the output has to be a
    tool call; `call_finish_reason` is the finish reason of a choice with calls. `shown_stop_tokens`
    are the stop tokens that stay in the text. `continues` is whether the answer continues a text in
    the prompt. `return_token_ids` is whether deltas carry their tokens.
    """

    parser: Callable[[], Parser] = PlainParser
    call_id: Callable[[], str] = str
    markers: frozenset[str] = frozenset()
    multi_token_markers: frozenset[str] = frozenset()
    forced_call: bool = False
    call_finish_reason: FinishReason = FinishReason.TOOL_CALLS
    show_special: bool = False
    stops: StopStrings = field(default_factory=lambda: StopStrings(()))
    include_stop: bool = False
    shown_stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0
    continues: bool = False
    return_token_ids: bool = False


def plain_decoding(options: ValidOptions, continues: bool = True) -> DecodingOptions:
    """For an answer of plain text."""
    return DecodingOptions(
        show_special=not options.skip_special_tokens,
        stops=StopStrings(options.stop),
        include_stop=options.include_stop,
        shown_stop_tokens=frozenset(options.stop_token_ids if options.include_stop else ()),
        min_tokens=options.min_tokens,
        continues=continues,
        return_token_ids=options.return_token_ids,
    )


def chat_decoding(
    options: ValidOptions,
    use: ToolUse,
    output: ModelOutputFormat,
    thinking: Thinking,
    marker_id: Callable[[str], int | None],
    continues: bool,
) -> DecodingOptions:
    """For an answer to a conversation. `marker_id` maps the text of a control token to its id."""
    names, markers = use.names, output.markers(calls=bool(use.names))

    def parser() -> Parser:
        return output.parser(names, thinking)

    return replace(
        plain_decoding(options, continues),
        parser=parser,
        call_id=_short_call_id if output.short_call_ids else _call_id,
        markers=markers,
        multi_token_markers=frozenset(text for text in markers if marker_id(text) is None),
        forced_call=use.forced,
        # As with OpenAI: a call that the caller named was not the model's decision.
        call_finish_reason=FinishReason.STOP if use.named else FinishReason.TOOL_CALLS,
    )


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_call_id() -> str:
    """The form that Mistral's templates require."""
    return "".join(secrets.choice(_LETTERS_AND_DIGITS) for _ in range(9))
