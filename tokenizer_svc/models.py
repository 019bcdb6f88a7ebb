"""A model as this stage holds it: its folder's identity, its text and its limits.

Knows nothing of the generator that runs it.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tokenizer_svc.chat_template import ChatTemplate
from tokenizer_svc.detokenizer import Detokenizer
from tokenizer_svc.prompt import Prompt, PromptBuilder
from tokenizer_svc.request import Message, Role
from tokenizer_svc.tokenizer import Tokenizer
from trivium.model_directory import ModelDirectory, ModelDirectoryError, load_model_directory
from trivium.wire.errors import ServiceError

log = logging.getLogger(__name__)

# Up to here a text is done in place, within a few milliseconds; longer ones go to a thread, so
# that no stream waits for them.
INLINE_CHARACTERS = 2048

Result = TypeVar("Result")


@dataclass(frozen=True)
class Model:
    """One model's text side. `created` is in seconds since 1970."""

    id: str
    revision: str
    created: float
    context_length: int
    vocabulary_size: int
    tokenizer: Tokenizer
    prompts: PromptBuilder

    @property
    def fingerprint(self) -> str:
        return "fp_" + self.revision[:10]

    async def prompt(self, messages: Sequence[Message], context_length: int) -> Prompt:
        """The messages' prompt; context_length_exceeded if it leaves no room for an answer."""
        size = sum(_size(message) for message in messages)
        if size > context_length * self.tokenizer.longest_token:
            # Far too long, whatever its tokens: not worth the time to count them.
            raise _too_long(context_length, f"more than {context_length}")
        prompt = await off_loop(size, lambda: self.prompts.build(messages))
        if len(prompt.token_ids) >= context_length:
            raise _too_long(context_length, str(len(prompt.token_ids)))
        return prompt


async def off_loop(size: int, work: Callable[[], Result]) -> Result:
    """Does `work` on a text of `size` characters without holding up the event loop."""
    return work() if size <= INLINE_CHARACTERS else await asyncio.to_thread(work)


def load_model(path: Path) -> Model:
    """Reads a model folder and tries it out; ModelDirectoryError when it is not usable."""
    directory = load_model_directory(path)
    try:
        tokenizer = Tokenizer(directory.tokenizer.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise ModelDirectoryError(f"{directory.tokenizer}: {error}") from error
    model = Model(
        id=directory.id,
        revision=directory.revision,
        created=directory.tokenizer.stat().st_mtime,
        context_length=directory.context_length,
        vocabulary_size=directory.vocab_size,
        tokenizer=tokenizer,
        prompts=PromptBuilder(_chat_template(directory), tokenizer),
    )
    _warm_up(model)
    return model


def _chat_template(directory: ModelDirectory) -> ChatTemplate:
    try:
        config = json.loads(directory.tokenizer_config.read_text(encoding="utf-8"))
        file = directory.chat_template
        source = None if file is None else file.read_text(encoding="utf-8")
        return ChatTemplate.from_config(config, source)
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"{directory.path}: chat template: {error}") from error


def _warm_up(model: Model) -> None:
    """One prompt there and back, so that the first request finds everything built."""
    try:
        prompt = model.prompts.build([Message(Role.USER, ("Hello",))])
    except ServiceError as error:
        raise ModelDirectoryError(f"{model.id}: {error.message}") from error
    if not prompt.token_ids:
        raise ModelDirectoryError(f"{model.id}: the chat template makes an empty prompt")
    if max(prompt.token_ids) >= model.vocabulary_size:
        raise ModelDirectoryError(f"{model.id}: the tokenizer does not fit the model's vocabulary")
    detokenizer = Detokenizer(model.tokenizer)
    text = "".join(map(detokenizer.push, prompt.token_ids)) + detokenizer.flush()
    log.info("model %s is ready: %d warm-up characters", model.id, len(text))


def _size(message: Message) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return len(message.content or "") + len(message.name or "") + calls


def _too_long(context_length: int, tokens: str) -> ServiceError:
    message = (
        f"This model's maximum context length is {context_length} tokens. However, your messages "
        f"resulted in {tokens} tokens. Please reduce the length of the messages."
    )
    return ServiceError("context_length_exceeded", message, "messages")
