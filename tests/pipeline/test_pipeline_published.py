"""The text side of published models, through the three services with tiny random weights.

Configurations, special tokens and their order are the published ones; so is the chat template if
`make templates` has fetched it, else it is a shortened one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers

from bench.published import PUBLISHED, Published
from bench.published_text import write_text_side
from bench.random_checkpoint import write_random_checkpoint
from bench.random_llama import Shape, make_random_llama
from generator_svc.default_sampling import default_sampling
from generator_svc.export import ExportOptions, export_model
from generator_svc.sequence import SamplingParams
from tests.pipeline.services import Services
from trivium.model_directory import load_model_directory

QWEN, DEEPSEEK, GPT_OSS = "qwen-2.5-7b", "deepseek-r1-distill-llama-8b", "gpt-oss-120b"
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
SAMPLING = {
    QWEN: SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05),
    DEEPSEEK: SamplingParams(temperature=0.6, top_p=0.95),
    GPT_OSS: SamplingParams(),
}
MESSAGES: list[Any] = [{"role": "user", "content": "Once upon a time in a village"}]
# ruff: noqa: RUF001 - the wide bars are DeepSeek's
ENDS = {
    QWEN: {"<|im_end|>", "<|endoftext|>"},
    DEEPSEEK: {"<｜end▁of▁sentence｜>"},
    GPT_OSS: {"<|return|>", "<|call|>", "<|endoftext|>"},
}
NO_ENDS = {
    QWEN: {"<|im_start|>", "<tool_call>"},
    DEEPSEEK: {"<｜begin▁of▁sentence｜>", "<|eot_id|>", "<｜User｜>"},
    GPT_OSS: {"<|end|>", "<|start|>", "<|message|>", "<|channel|>"},
}


@dataclass(frozen=True)
class Serving:
    """A served model: its services, its folder and its tokenizer."""

    name: str
    folder: Path
    services: Services
    tokenizer: tokenizers.Tokenizer

    def ask(self, **fields: Any) -> Any:
        """The answer's choice."""
        body = {"model": self.name, "messages": MESSAGES, "seed": 5, "max_tokens": 32, **fields}
        return self.post("/v1/chat/completions", **body)["choices"][0]

    def post(self, path: str, **body: Any) -> Any:
        return httpx.post(f"{self.services.url}{path}", json=body).raise_for_status().json()


@pytest.fixture(scope="module", params=list(SAMPLING))
def serving(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    scratch = tmp_path_factory.mktemp("published")
    name = request.param
    published = PUBLISHED[name].with_config(**SMALL)
    folder = scratch / name
    if name == GPT_OSS:
        _as_gpt_oss(folder, published)
    else:
        write_random_checkpoint(scratch / "checkpoint", published)
        export_model(str(scratch / "checkpoint"), folder, ExportOptions("fp32"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with Services(folder, scratch) as services:
        yield Serving(name, folder, services, tokenizer)


def _as_gpt_oss(folder: Path, published: Published) -> None:
    """A Llama graph with gpt-oss's text side: these tests are not about experts."""
    shape = Shape(64, 2, 4, 2, 16, 160, published.config["vocab_size"], 4096)
    make_random_llama(folder, shape, "fp32")
    (folder / "trivium_export.json").unlink()
    file = folder / "genai_config.json"
    genai = json.loads(file.read_text())
    genai["model"]["eos_token_id"] = published.generation_config["eos_token_id"]
    write_text_side(folder, published)
    file.write_text(json.dumps(genai))


def test_the_folder_name_is_the_model_id(serving: Serving) -> None:
    models = httpx.get(f"{serving.services.url}/v1/models").json()["data"]

    assert [serving.name] == [model["id"] for model in models]


def test_sampling_defaults_come_from_the_model(serving: Serving) -> None:
    """Omitted sampling values come from generation_config.json, not from OpenAI's defaults."""
    own = SAMPLING[serving.name]
    fields = ("temperature", "top_p", "top_k", "repetition_penalty")
    said = serving.ask(**{field: getattr(own, field) for field in fields})
    openais = serving.ask(temperature=1, top_p=1, top_k=-1, repetition_penalty=1)
    silent = serving.ask()

    assert own == default_sampling(load_model_directory(serving.folder))
    assert said == silent
    assert (openais == silent) == (own == SamplingParams())


def test_each_eos_token_ends_the_answer(serving: Serving) -> None:
    """Each of them ends the answer and is hidden; other control tokens do not end it."""
    for token in ENDS[serving.name] | NO_ENDS[serving.name]:
        token_id = serving.tokenizer.token_to_id(token)
        choice = serving.ask(logit_bias={str(token_id): 100}, max_tokens=3)
        ends = token in ENDS[serving.name]

        assert choice["finish_reason"] == ("stop" if ends else "length"), token
        assert not ends or not choice["message"]["content"]


def test_the_prompt_has_one_bos(serving: Serving) -> None:
    """It begins with BOS if the template writes it, to which the tokenizer does not add another."""
    tokens = serving.post("/tokenize", messages=MESSAGES)["tokens"]
    bos = serving.tokenizer.token_to_id("<｜begin▁of▁sentence｜>")
    template = (serving.folder / "chat_template.jinja").read_text()
    text = serving.tokenizer.decode(tokens, skip_special_tokens=False)

    if serving.name == DEEPSEEK:
        assert "bos_token" in template
        assert [bos] == [token for token in tokens if token == bos] == tokens[:1]
        assert text.endswith("<｜User｜>Once upon a time in a village<｜Assistant｜><think>\n")
    else:
        start = {QWEN: "<|im_start|>system\n", GPT_OSS: "<|start|>system<|message|>"}[serving.name]
        assert text.startswith(start)
        assert text.count(start) == 1


def test_reasoning_comes_first_if_the_template_opens_it(serving: Serving) -> None:
    """It begins with reasoning if the template opens it, else with the answer."""
    message = serving.ask()["message"]
    reasoning = message.get("reasoning_content")

    if serving.name == DEEPSEEK:
        assert (bool(reasoning), message["content"] or "") == (True, "")
    elif serving.name == QWEN:
        assert (reasoning, bool(message["content"])) == (None, True)
    else:
        assert reasoning or message["content"]


@pytest.mark.parametrize("serving", [DEEPSEEK], indirect=True)
def test_the_answer_follows_the_reasoning(serving: Serving) -> None:
    """It comes once the model closes the reasoning; a constraint applies to the answer alone."""
    closes = {str(serving.tokenizer.token_to_id("</think>")): 100}
    choice = serving.ask(logit_bias=closes, structured_outputs={"regex": "Yes[.]"})

    assert (None, "Yes.") == (
        choice["message"].get("reasoning_content") or None,
        choice["message"]["content"],
    )
