"""Prompts of published models with their real vocabularies, special tokens and chat templates.

Vocabularies and templates are fetched by `make templates`; see download.py.
"""
# ruff: noqa: RUF001 - the wide bars are DeepSeek's

import base64
import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from bench.published import PUBLISHED
from bench.published_text import chat_template, published_tokenizer
from tests.templates.download import FOLDER, VOCABULARIES
from tokenizer_svc.families.choose import choose
from tokenizer_svc.families.thinking import Thinking
from tokenizer_svc.prompt.builder import Prompt, PromptBuilder
from tokenizer_svc.prompt.chat_template import ChatTemplate
from tokenizer_svc.request.types import Conversation, Message, Role, Tool
from tokenizer_svc.tokenizer import Tokenizer

pytestmark = pytest.mark.templates

QWEN, DEEPSEEK, GPT_OSS = "qwen-2.5-7b", "deepseek-r1-distill-llama-8b", "gpt-oss-120b"
NAMES = (QWEN, DEEPSEEK, GPT_OSS)
NAMED = ("bos_token", "eos_token", "pad_token")
QUESTION = "Wie ist 12345 naïve 日本語, it's?"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Where."}},
    "required": ["city"],
}
# What openai-harmony 0.0.8 renders for completion: a system message of 5 August 2025 with reasoning
# effort high, "Be brief." as instructions, the tool get_weather and the question.
# fmt: off
HARMONY_IDS = [
    200006, 17360, 200008, 3575, 553, 17554, 162016, 11, 261, 4410, 6439, 2359, 22203, 656, 7788,
    17527, 558, 87447, 100594, 25, 220, 1323, 19, 12, 3218, 198, 6576, 3521, 25, 220, 1323, 20, 12,
    3062, 12, 2922, 279, 30377, 289, 25, 1932, 279, 2, 13888, 18403, 25, 8450, 11, 49159, 11, 1721,
    13, 21030, 2804, 413, 7360, 395, 1753, 3176, 558, 63446, 316, 1879, 8437, 2804, 810, 316, 290,
    49159, 9334, 25, 461, 44580, 6120, 200007, 200006, 77944, 200008, 2, 68406, 279, 3238, 14567,
    364, 2, 20574, 279, 877, 9964, 279, 4797, 9964, 95359, 21733, 290, 11122, 558, 2493, 717,
    170154, 314, 11350, 25, 10168, 16349, 558, 17500, 25, 1621, 412, 9263, 871, 1062, 502, 92, 602,
    9819, 9964, 200007, 200006, 1428, 200008, 34130, 2496, 220, 7633, 2548, 153475, 737, 17428,
    40909, 11, 4275, 30, 200007, 200006, 173781,
]
# fmt: on


@functools.cache
def real_bpe(name: str) -> BPE:
    if name == GPT_OSS:
        lines = (VOCABULARIES / "o200k.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        return BPE(*_from_ranks(ranks), ignore_merges=True)
    model = _file(name)["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    # Llama 3's tokenizer does not apply merges to a word that is a token.
    return BPE(model["vocab"], merges, ignore_merges=name == DEEPSEEK)


@functools.cache
def _file(name: str) -> dict[str, Any]:
    """tokenizer.json of Qwen 3 or Llama 3.2, which have the BPE of Qwen 2.5 or Llama 3."""
    file = {QWEN: "qwen.json", DEEPSEEK: "llama3.json"}[name]
    found: dict[str, Any] = json.loads((VOCABULARIES / file).read_text(encoding="utf-8"))
    return found


def _from_ranks(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE given by its tokens' ranks.

    Two tokens that together are a token may be merged, those of the lowest rank first.
    """
    letters = _byte_letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        (text(token[:cut]), text(token[cut:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return {text(token): rank for token, rank in ranks.items()}, merges


def _byte_letters() -> list[str]:
    """The letter for each byte in a byte-level BPE."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(code) for code in range(0x100, 0x200))
    letters = [chr(byte) if byte in printable else next(others) for byte in range(256)]
    assert set(letters) == set(ByteLevel.alphabet())
    return letters


@functools.cache
def real_tokenizer(name: str) -> tokenizers.Tokenizer:
    return published_tokenizer(PUBLISHED[name], real_bpe(name))


def named_tokens(name: str) -> dict[str, str]:
    config = PUBLISHED[name].tokenizer_config
    return {role: config[role] for role in NAMED if config[role] is not None}


@functools.cache
def builder(name: str) -> PromptBuilder:
    """Builds prompts as on 5 August 2025."""
    source = chat_template(PUBLISHED[name]).replace('strftime_now("%Y-%m-%d")', '"2025-08-05"')
    template = ChatTemplate(source, named_tokens(name))
    return PromptBuilder(template, Tokenizer(real_tokenizer(name).to_str()))


def prompt(name: str, messages: Sequence[Message], tools: Any = (), **fields: Any) -> Prompt:
    return builder(name).build(Conversation(tuple(messages), tools, **fields))


def test_all_files_were_downloaded() -> None:
    """If this fails, fetch them with `make templates`."""
    for published in PUBLISHED.values():
        assert (FOLDER / f"{published.chat_template}.jinja").exists()
    assert {"qwen.json", "llama3.json", "o200k.tiktoken"} == {
        p.name for p in VOCABULARIES.iterdir()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_vocabulary_size_is_as_published(name: str) -> None:
    """The added tokens therefore have the published ids."""
    size = tokenizers.Tokenizer(real_bpe(name)).get_vocab_size()

    assert size == PUBLISHED[name].ordinary_tokens


def test_qwens_pre_tokenizer_and_special_tokens_are_as_published() -> None:
    """Apart from them, Qwen 3's tokenizer has four more added tokens."""
    published, real = PUBLISHED[QWEN], _file(QWEN)
    added = [(token["content"], token["special"]) for token in real["added_tokens"]]

    assert published.split == real["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert published.normalizer == real["normalizer"]["type"]
    assert [(t.content, t.special) for t in published.added_tokens] == added[:-4]


def test_deepseeks_pre_tokenizer_and_bos_are_llama_3s() -> None:
    """It keeps Llama's names of the control tokens that it does not rename."""
    published, real = PUBLISHED[DEEPSEEK], _file(DEEPSEEK)
    llamas = {token["id"]: token["content"] for token in real["added_tokens"]}
    [template] = [p for p in real["post_processor"]["processors"] if "single" in p]
    kept = range(128006, 128011)

    assert published.split == real["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert "<|begin_of_text|>" == template["single"][0]["SpecialToken"]["id"] == llamas[128000]
    assert published.adds_bos
    assert [published.added_tokens[i - 128000].content for i in kept] == [llamas[i] for i in kept]


@pytest.mark.parametrize(("name", "with_tools"), [(QWEN, False), (QWEN, True), (DEEPSEEK, False)])
def test_prompts_equal_those_of_transformers(name: str, with_tools: bool) -> None:
    """They are equal to the last token, with an earlier answer and its reasoning."""
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "<think>\nHm.\n</think>\n\nHello."),
        ("user", QUESTION),
    ]
    function = {"name": "get_weather", "description": "Gets it.", "parameters": PARAMETERS}
    oracle = PreTrainedTokenizerFast(tokenizer_object=real_tokenizer(name), **named_tokens(name))
    tools = [{"type": "function", "function": function}] if with_tools else None
    expected = oracle.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        tools=tools,
        chat_template=chat_template(PUBLISHED[name]),
        add_generation_prompt=True,
    )
    ours = (Tool("get_weather", "Gets it.", json.dumps(PARAMETERS)),) if tools else ()
    made = prompt(name, [Message(Role(role), (text,)) for role, text in turns], ours)

    assert expected == made.token_ids


def test_gpt_oss_prompts_equal_those_of_openai_harmony() -> None:
    """The template and the vocabulary together give the ids of OpenAI's own library."""
    tool = Tool("get_weather", "Gets the weather.", json.dumps(PARAMETERS))
    messages = [Message(Role.SYSTEM, ("Be brief.",)), Message(Role.USER, (QUESTION,))]
    made = prompt(GPT_OSS, messages, (tool,), reasoning_effort="high")

    assert made.token_ids == HARMONY_IDS


def test_deepseeks_answer_begins_inside_the_reasoning() -> None:
    """The template writes BOS and opens <think>, and the answer continues there."""
    made = prompt(DEEPSEEK, [Message(Role.USER, ("Hi",))])
    bos, user, assistant, think = 128000, 128011, 128012, 128013

    assert [token for token in made.token_ids if token >= 128000] == [bos, user, assistant, think]
    assert made.thinking is Thinking.OPENED
    assert made.token_ids[0] == bos


@pytest.mark.parametrize("name", NAMES)
def test_the_format_is_detected_from_the_template(name: str) -> None:
    """DeepSeek's template has think tags, gpt-oss's has channels; Qwen 2.5 does not reason."""
    output = choose(chat_template(PUBLISHED[name]))

    assert output.is_harmony == (name == GPT_OSS)
    assert output.thinks == (name == DEEPSEEK)


@pytest.mark.parametrize("name", NAMES)
def test_the_eos_tokens_are_those_of_the_format(name: str) -> None:
    """For gpt-oss they are those that openai-harmony stops at, and the end of a document."""
    ends = {
        QWEN: {"<|im_end|>", "<|endoftext|>"},
        DEEPSEEK: {"<｜end▁of▁sentence｜>"},
        GPT_OSS: {"<|return|>", "<|call|>", "<|endoftext|>"},
    }[name]
    value = PUBLISHED[name].generation_config["eos_token_id"]
    ids = value if isinstance(value, list) else [value]

    assert ends == {real_tokenizer(name).id_to_token(token_id) for token_id in ids}
