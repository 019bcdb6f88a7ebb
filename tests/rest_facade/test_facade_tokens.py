"""Token endpoints of the facade, in vLLM's formats."""

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.rest_facade.conftest import StartFacade
from tests.rest_facade.scripted_backend import MODEL, ScriptedBackend

MESSAGES = [{"role": "user", "content": "Hi"}]
INFO = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "vocab_size": 0xD800,
    "model_max_length": 2048,
    "chat_template": "{{ messages }}",
    "bos_token": None,
    "eos_token": "<end>",
    "added_tokens_decoder": {"3": {"content": "<end>", "special": True}},
}


async def test_tokenize_a_text(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """A prompt is tokenized with the special tokens of a lone text, unless they are turned off."""
    answer = await client.post("/tokenize", json={"model": MODEL, "prompt": "Hi"})
    await client.post(
        "/tokenize", json={"model": MODEL, "prompt": "Hi", "add_special_tokens": False}
    )

    assert answer.json() == {
        "count": 2,
        "max_model_len": 2048,
        "tokens": [72, 105],
        "token_strs": None,
    }
    assert [True, False] == [request.add_special_tokens for request in backend.requests]


async def test_tokenize_a_conversation(client: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    """Messages are rendered first, with all options of the chat template."""
    fields: dict[str, Any] = {
        "add_generation_prompt": False,
        "continue_final_message": True,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"x": True},
    }
    answer = await client.post("/tokenize", json={"model": MODEL, "messages": MESSAGES, **fields})
    request = backend.requests[0]

    assert answer.json()["tokens"] == [72, 105]
    assert request.messages[0].content[0].text == "Hi"
    assert request.tools[0].function.name == "f"
    assert not request.add_generation_prompt
    assert request.continue_final_message
    assert request.chat_template_kwargs == {"x": "true"}


@pytest.mark.parametrize("fields", [{"prompt": "Hi"}, {"messages": MESSAGES}])
async def test_token_strings(
    client: httpx.AsyncClient, backend: ScriptedBackend, fields: dict[str, Any]
) -> None:
    """With return_token_strs the answer has the tokens as strings too."""
    answer = await client.post(
        "/tokenize", json={"model": MODEL, "return_token_strs": True, **fields}
    )

    assert answer.json()["token_strs"] == ["H", "i"]
    assert backend.requests[0].return_token_strs


async def test_detokenize(client: httpx.AsyncClient) -> None:
    """Token ids become text; ids that do not exist are refused."""
    answer = await client.post("/detokenize", json={"model": MODEL, "tokens": [72, 105]})
    refused = await client.post("/detokenize", json={"model": MODEL, "tokens": [0xD800]})

    assert answer.json() == {"prompt": "Hi"}
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens[0]")
    assert refused.json()["error"]["message"] == "Not in tokens."


async def test_tokenizer_info(client: httpx.AsyncClient) -> None:
    """GET and POST return the contents of tokenizer_config.json."""
    by_get = await client.get("/tokenizer_info", params={"model": MODEL})
    by_post = await client.post("/tokenizer_info", json={"model": MODEL})

    assert INFO == by_get.json() == by_post.json()


async def test_the_model_is_optional_if_there_is_only_one(
    client: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    """With one model its id may be omitted; with two it is required."""
    ambiguous = await client.post("/tokenize", json={"prompt": "Hi"})
    backend.model_names = [MODEL]
    answer = await client.post("/tokenize", json={"prompt": "Hi"})
    info = await client.get("/tokenizer_info")
    unknown = await client.post("/detokenize", json={"model": "none", "tokens": []})

    assert ambiguous.json()["error"]["param"] == "model"
    assert ambiguous.json()["error"]["code"] == "missing_required_parameter"
    assert answer.json()["count"] == 2
    assert info.json() == INFO
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert unknown.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "prompt"),
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"messages": []}, "empty_array", "messages"),
        ({"prompt": "a", "messages": MESSAGES}, "invalid_parameter_combination", "messages"),
        ({"prompt": "a", "tools": [{}]}, "missing_required_parameter", "tools[0].function"),
        ({"prompt": "a", "return_token_strs": 1}, "invalid_type", "return_token_strs"),
        (
            {"messages": MESSAGES, "add_special_tokens": True},
            "invalid_parameter_combination",
            "add_special_tokens",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
    ],
)
async def test_refused_tokenize(
    client: httpx.AsyncClient, fields: dict[str, Any], code: str, param: str
) -> None:
    """Invalid and contradictory fields are refused; the error names them."""
    answer = await client.post("/tokenize", json={"model": MODEL, **fields})
    error = answer.json()["error"]

    assert (400, code, param) == (answer.status_code, error["code"], error["param"])


async def test_tokenize_needs_a_key(start_facade: StartFacade, tmp_path: Path) -> None:
    """With a key file, /tokenize and its neighbours need a key too."""
    file = tmp_path / "keys"
    file.write_text(hashlib.sha256(b"one").hexdigest())
    client = await start_facade(api_keys_file=file)
    answers = [
        await client.post("/tokenize", json={"prompt": "a"}),
        await client.post("/detokenize", json={"tokens": []}),
        await client.get("/tokenizer_info"),
    ]

    assert [401] * 3 == [answer.status_code for answer in answers]
