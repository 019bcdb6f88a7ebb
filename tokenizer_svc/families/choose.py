"""Detects a model's output format from its chat template, unless the settings name one."""

from collections.abc import Callable, Set
from dataclasses import dataclass

from tokenizer_svc.families import harmony, hermes, llama3_json, mistral, thinking
from tokenizer_svc.families.harmony import HarmonyParser
from tokenizer_svc.families.hermes import HermesParser
from tokenizer_svc.families.lark import Marker, Plan
from tokenizer_svc.families.llama3_json import Llama3JsonParser
from tokenizer_svc.families.mistral import MistralParser
from tokenizer_svc.families.parser import Parser, PlainParser
from tokenizer_svc.families.thinking import Thinking, ThinkingParser

TOOL_PARSERS = ("auto", "none", "hermes", "llama3_json", "mistral", "harmony")
REASONING_PARSERS = ("auto", "none", "deepseek_r1", "qwen3", "harmony")


@dataclass(frozen=True)
class ToolFormat:
    """How tool calls are written: grammar rules, and a parser for given function names."""

    markers: frozenset[str]
    call_rule: Callable[[str, str, Marker], str]
    body_rules: Callable[[Plan, Marker], list[str]]
    parser: Callable[[Set[str]], Parser]


HERMES = ToolFormat(hermes.MARKERS, hermes.call_rule, hermes.body_rules, HermesParser)
LLAMA3_JSON = ToolFormat(
    llama3_json.MARKERS, llama3_json.call_rule, llama3_json.body_rules, Llama3JsonParser
)
MISTRAL = ToolFormat(mistral.MARKERS, mistral.call_rule, mistral.body_rules, MistralParser)
MISTRAL_NAMED = ToolFormat(
    mistral.MARKERS, mistral.named_call_rule, mistral.named_body_rules, MistralParser
)
HARMONY = ToolFormat(harmony.MARKERS, harmony.call_rule, harmony.body_rules, HarmonyParser)


@dataclass(frozen=True)
class ModelOutputFormat:
    """How a model writes its output. `tools` is None if tool calls are not parsed."""

    tools: ToolFormat | None
    thinks: bool = False
    single_call: bool = False  # the model makes at most one call in a message

    @property
    def is_harmony(self) -> bool:
        """Whether every answer consists of Harmony messages, with or without tools."""
        return self.tools is HARMONY

    def markers(self, calls: bool) -> frozenset[str]:
        """The control tokens whose text the parser has to see, if `calls` those of calls too."""
        looks = self.tools is not None and (calls or self.is_harmony)
        tools = self.tools.markers if self.tools is not None and looks else frozenset()
        return tools | thinking.MARKERS if self.thinks else tools

    @property
    def short_call_ids(self) -> bool:
        """Whether the template requires tool call ids of nine letters and digits."""
        return self.tools in (MISTRAL, MISTRAL_NAMED)

    def parser(self, names: Set[str], state: Thinking) -> Parser:
        """A parser for one answer in which these functions may be called."""
        if self.is_harmony:
            return HarmonyParser(names, in_answer=state is Thinking.DONE)
        inner: Parser = PlainParser()
        if self.tools is not None and names:
            inner = self.tools.parser(names)
        return ThinkingParser(state, inner) if self.thinks else inner


def choose(
    template: str, tool_parser: str = "auto", reasoning_parser: str = "auto"
) -> ModelOutputFormat:
    """The output format of a model with this template, unless the settings name one."""
    if tool_parser == "auto":
        tool_parser = _tool_parser(template)
    if reasoning_parser == "auto":
        is_thinking = "<think>" in template or "</think>" in template
        reasoning_parser = "qwen3" if is_thinking else "none"
    if "harmony" in (tool_parser, reasoning_parser):
        return ModelOutputFormat(HARMONY)
    formats = {"hermes": HERMES, "llama3_json": LLAMA3_JSON, "none": None}
    named = "[ARGS]" in template
    tools = (
        (MISTRAL_NAMED if named else MISTRAL) if tool_parser == "mistral" else formats[tool_parser]
    )
    return ModelOutputFormat(
        tools,
        thinks=reasoning_parser != "none",
        single_call="only supports single tool-calls" in template,
    )


def _tool_parser(template: str) -> str:
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" not in template and (
        llama3_json.TAG in template or '{"name": function name, "parameters":' in template
    ):
        return "llama3_json"
    return "hermes"
