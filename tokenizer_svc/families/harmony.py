"""gpt-oss's Harmony format: messages on channels for reasoning, tool calls and the answer.

`<|channel|>analysis<|message|>…<|end|>`, then `<|start|>assistant<|channel|>commentary
to=functions.NAME <|constrain|>json<|message|>{…}<|call|>` or
`<|start|>assistant<|channel|>final<|message|>…<|return|>`.
"""

import re
from collections.abc import Set

from tokenizer_svc.families.json_scan import JsonScan
from tokenizer_svc.families.lark import Marker, Plan, literal
from tokenizer_svc.families.parser import (
    CallArguments,
    CallStart,
    Channel,
    Phase,
    Segment,
    Text,
    content,
)

_TOKENS = frozenset(
    f"<|{name}|>" for name in ("start", "channel", "message", "end", "call", "return", "constrain")
)
_CALL = "to=functions."
# The recipient is written in ordinary tokens; output cut off within it is not text either.
MARKERS = _TOKENS | {_CALL}

_MARKER = re.compile("|".join(map(re.escape, sorted(_TOKENS))))
_BEGINNINGS = {marker[:cut] for marker in _TOKENS for cut in range(1, len(marker))}
_MAX_BEGINNING_LENGTH = max(map(len, _BEGINNINGS))
_MAX_HEADER_LENGTH = 512  # a longer header is shown as text
_CHANNEL = re.compile(r"<\|channel\|>\s*([a-z]+)")
_RECIPIENT = re.compile(r"\bto=functions\.([a-zA-Z0-9_-]+)")
# Followed by a character that cannot be part of the name, so the name is complete.
_WHOLE_RECIPIENT = re.compile(_RECIPIENT.pattern + "(?=[^a-zA-Z0-9_-])")
_HEADERS = ("<|channel|>", "<|start|>", "<|message|>", _CALL)


def call_rule(name: str, schema: str, marker: Marker) -> str:
    """A call of this function, after `<|channel|>`; the token that ends it ends the answer."""
    start = literal(f"commentary to=functions.{name} ")
    return f'{start} {marker("<|constrain|>")} "json" {marker("<|message|>")} %json {schema}'


def body_rules(plan: Plan, marker: Marker) -> list[str]:
    """Rules for `body`: reasoning, a preamble to a call, then a call or the answer."""
    channel, message = marker("<|channel|>"), marker("<|message|>")
    again = f'{marker("<|end|>")} {marker("<|start|>")} "assistant" {channel}'
    answer = "answer" if plan.answer else "TEXT"
    ends = [f'"final" {message} {answer}'] if not plan.forced else []
    ends += ["call"] if plan.calls else []
    return [
        f"body: {channel} thought? remark? ({' | '.join(ends)})",
        f'thought: "analysis" {message} TEXT {again}',
        f'remark: "commentary" {message} TEXT {again}',
    ]


class HarmonyParser:
    """Splits the output after `<|start|>assistant` into its messages."""

    may_reason = True  # reasoning may follow any message

    def __init__(self, names: Set[str], in_answer: bool = False) -> None:
        self._names = names
        self._held = ""  # may become a marker
        self._at = 0  # where the next piece begins
        # None within a message's body, where the output begins if the prompt opened the answer.
        self._header: list[str] | None = None if in_answer else []
        self._header_length = 0
        self._header_start = ""  # the header without the white space before it
        self._channel = Channel.CONTENT
        self._callee: str | None = None  # the function that the message calls
        self._arguments: JsonScan | None = None
        self._space: list[str] = []  # white space before the arguments
        self._spaces = 0
        self._out: list[Segment] = []

    @property
    def held(self) -> int:
        return len(self._held) + self._header_length + self._spaces

    @property
    def phase(self) -> Phase:
        if self._header is not None:
            return Phase.UNDECIDED
        return Phase.REASONING if self._channel is Channel.REASONING else Phase.ANSWER

    def push(self, text: str, start: int) -> list[Segment]:
        self._out = []
        whole = self._held + text
        self._at = start - len(self._held)
        position = 0
        for match in _MARKER.finditer(whole):
            self._take_text(whole[position : match.start()])
            self._take_marker(match[0])
            position = match.end()
        # A suffix that may become a marker is held back: a tokenizer without these special tokens
        # splits markers into several tokens.
        end = len(whole)
        for cut in range(min(_MAX_BEGINNING_LENGTH, end - position), 0, -1):
            if whole[end - cut :] in _BEGINNINGS:
                end -= cut
                break
        self._take_text(whole[position:end])
        self._held = whole[end:]
        return self._out

    def flush(self, cut: Set[str] = frozenset()) -> list[Segment]:
        self._out = []
        held, self._held = self._held, ""
        if not _begins_one_of(cut, held):
            self._take_text(held)
        if self._header is not None:
            self._finish_header("".join(self._header), cut)
        elif self._callee is not None and self._arguments is None:
            # Cut off between the name and the arguments: emit the incomplete call.
            self._out.append(CallStart(self._callee))
        return self._out

    def _finish_header(self, header: str, cut: Set[str]) -> None:
        stripped = header.lstrip()
        if stripped.startswith(_HEADERS):
            # A header that was cut off is never text. It is a call if its name is complete.
            recipient = _WHOLE_RECIPIENT.search(header)
            if recipient is not None and recipient[1] in self._names:
                self._out.append(CallStart(recipient[1]))
        elif not _begins_one_of(cut, stripped):
            self._show(header)
        self._header, self._header_length = None, 0

    def _take_marker(self, marker: str) -> None:
        if self._header is not None:
            if marker == "<|message|>":
                self._at += len(marker)
                self._begin_body("".join(self._header))
            else:
                self._take_header(marker)
        elif marker in ("<|message|>", "<|constrain|>"):
            self._take_body(marker)  # neither ends a message: within one they are text
        else:
            self._end_body()
            # Markers that begin the next header are kept with it, to be shown if it turns out not
            # to be a header; markers that only end a message are dropped.
            if marker in ("<|start|>", "<|channel|>"):
                self._take_header(marker)
            else:
                self._at += len(marker)

    def _take_text(self, text: str) -> None:
        if text and self._header is not None:
            self._take_header(text)
        elif text:
            self._take_body(text)

    def _take_header(self, text: str) -> None:
        assert self._header is not None, "A body was taken for a header. This is a bug."
        self._header.append(text)
        self._header_length += len(text)
        self._at += len(text)
        self._header_start = (self._header_start + text).lstrip()
        # Text where a header should be: the model left it out, so all that follows is content.
        if self._header_start and not _may_be_header(self._header_start):
            whole = "".join(self._header)
            self._header, self._header_length = None, 0
            self._channel, self._callee = Channel.CONTENT, None
            self._show(whole)

    def _begin_body(self, header: str) -> None:
        self._header, self._header_length = None, 0
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        analysis = channel is not None and channel[1] == "analysis"
        callee = recipient[1] if recipient is not None else None
        self._callee = callee if callee in self._names else None
        # A call in `analysis` is not reasoning: a body that is not a JSON object is shown as
        # content.
        reasoning = analysis and self._callee is None
        self._channel = Channel.REASONING if reasoning else Channel.CONTENT
        self._arguments = None

    def _end_body(self) -> None:
        if self._callee is not None and self._arguments is None:
            # An empty body is a call without arguments, which clients expect as an empty object.
            self._take_space()
            self._out += [CallStart(self._callee), CallArguments("{}")]
        self._header, self._header_length, self._header_start = [], 0, ""

    def _take_body(self, text: str) -> None:
        self._at += len(text)
        if self._callee is not None:
            text = self._take_arguments(self._callee, text)
        self._show(text)

    def _take_arguments(self, callee: str, text: str) -> str:
        """Takes the call's arguments from `text`; returns the rest, which is message text."""
        if self._arguments is None:
            start = len(text) - len(text.lstrip())
            if start == len(text):
                # Held back: dropped before an object, text before anything else.
                self._space.append(text)
                self._spaces += len(text)
                return ""
            if text[start] != "{":
                self._callee = None
                return self._take_space() + text
            self._arguments, text = JsonScan(), text[start:]
            self._take_space()
            self._out.append(CallStart(callee))
        end = self._arguments.feed(text, 0)
        if end:
            self._out.append(CallArguments(text[:end]))
        if self._arguments.done or self._arguments.wrong:
            self._callee = None
        return text[end:]

    def _take_space(self) -> str:
        space = "".join(self._space)
        self._space, self._spaces = [], 0
        return space

    def _show(self, text: str) -> None:
        """Emits `text`, which ends where the next piece begins, as part of the message."""
        if text and self._channel is Channel.CONTENT:
            self._out.extend(content(text, self._at - len(text)))
        elif text:
            self._out.append(Text(self._channel, text, self._at - len(text)))


def _begins_one_of(markers: Set[str], text: str) -> bool:
    return bool(text) and any(marker.startswith(text) for marker in markers)


def _may_be_header(text: str) -> bool:
    return len(text) <= _MAX_HEADER_LENGTH and any(
        text.startswith(known) or known.startswith(text) for known in _HEADERS
    )
