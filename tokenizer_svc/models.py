"""The served models: the tokenizer, template and limits of each, and the generator that runs it."""

import json
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizer_svc.families.choose import ModelOutputFormat, choose
from tokenizer_svc.generator.client import GeneratorClient
from tokenizer_svc.generator.watch import GeneratorWatch
from tokenizer_svc.output.detokenizer import Detokenizer
from tokenizer_svc.prompt.builder import Prompt, PromptBuilder
from tokenizer_svc.prompt.chat_template import ChatTemplate
from tokenizer_svc.request.types import Conversation, Message, Role, Tool, ValidOptions
from tokenizer_svc.tokenizer import Tokenizer, TooManyTokens
from trivium.field_errors import empty_string, missing
from trivium.keys.keyed_request import current_request
from trivium.model_directory import ModelDirectory, ModelDirectoryError, load_model_directory
from trivium.offload import offload
from trivium.wire import tracing
from trivium.wire.errors import ServiceError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """What this stage knows about one model. `created` is a Unix time in seconds."""

    id: str
    revision: str
    created: float
    context_length: int
    vocabulary_size: int
    tokenizer: Tokenizer
    template: ChatTemplate
    prompts: PromptBuilder
    output: ModelOutputFormat

    @property
    def fingerprint(self) -> str:
        return "fp_" + self.revision[:10]

    async def prompt(
        self, conversation: Conversation, context_length: int, kept: int | None = None
    ) -> Prompt:
        """Renders and encodes the prompt, and drops all but the last `kept` tokens; raises
        ServiceError if it fills the context."""
        size = sum(map(_message_size, conversation.messages))
        size += sum(map(_tool_size, conversation.tools))
        max_tokens = context_length if kept is None else None
        self._check_size(size, max_tokens, "messages")
        try:
            prompt = await offload(
                size, lambda: self.prompts.build(conversation, max_tokens=max_tokens)
            )
        except TooManyTokens:
            raise _too_long(context_length, f"more than {context_length}", "messages") from None
        if kept is not None:
            prompt = replace(prompt, token_ids=prompt.token_ids[-kept:])
        self.check_tokens(len(prompt.token_ids), context_length, "messages")
        return prompt

    async def encode(
        self, text: str, max_tokens: int | None, param: str, add_special_tokens: bool
    ) -> list[int]:
        """Encodes a plain prompt; may raise ServiceError if it has more than `max_tokens`."""
        self._check_size(len(text), max_tokens, param)
        try:
            with tracing.span("encode"):
                return await offload(
                    len(text),
                    lambda: self.tokenizer.encode(
                        text, add_special_tokens, max_tokens=max_tokens, parse_special=True
                    ),
                )
        except TooManyTokens:
            assert max_tokens is not None
            raise _too_long(max_tokens, f"more than {max_tokens}", param) from None

    async def encode_bad_words(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids of each, with and without a space before it; raises ServiceError."""
        if not words:
            return []
        return await offload(sum(map(len, words)), lambda: _bad_words(self.tokenizer, words))

    def check_tokens(self, tokens: int, context_length: int, param: str) -> None:
        """Raises ServiceError if a prompt of this many tokens fills the context."""
        if tokens >= context_length:
            raise _too_long(context_length, str(tokens), param)

    def _check_size(self, size: int, max_tokens: int | None, param: str) -> None:
        if max_tokens is not None and size > max_tokens * self.tokenizer.max_token_characters:
            # Far too long, however it is tokenized: not worth the time to count its tokens.
            raise _too_long(max_tokens, f"more than {max_tokens}", param)


@dataclass(frozen=True)
class ServedModel:
    """A model and the generator that runs it.

    `default_max_tokens` limits the output of requests without a limit; None means up to the end of
    the context.
    """

    model: Model
    connection: GeneratorClient
    watch: GeneratorWatch
    default_max_tokens: int | None = None

    @property
    def context_length(self) -> int:
        """The maximum number of tokens of prompt and answer together that both stages support."""
        own, generators = self.model.context_length, self.watch.context_length
        return own if generators is None else min(own, generators)

    async def prompt(self, conversation: Conversation, kept: int | None = None) -> Prompt:
        return await self.model.prompt(conversation, self.context_length, kept)

    def kept_tokens(self, options: ValidOptions) -> int | None:
        """How many tokens of a prompt are kept, None for all; raises ServiceError for none."""
        if options.truncate_prompt_tokens != -1:
            return options.truncate_prompt_tokens
        answer = max(options.max_completion_tokens or 1, options.min_tokens)
        if answer >= self.context_length:
            message = (
                f"'truncate_prompt_tokens' is -1, but {answer} tokens for the answer leave none of "
                f"the context's {self.context_length} tokens for the prompt."
            )
            raise ServiceError("invalid_value", message, "truncate_prompt_tokens")
        return self.context_length - answer


@dataclass(frozen=True)
class ServedModels:
    """All models by id, and their aliases."""

    by_id: Mapping[str, ServedModel]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str, param: str = "model") -> ServedModel:
        """The model with this id or alias; raises ServiceError if there is none."""
        if not name:
            raise missing(param)
        current_request().check_model(name, param)
        served = self.by_id.get(self.aliases.get(name, name))
        if served is None:
            raise ServiceError("model_not_found", f"The model `{name}` does not exist.", param)
        return served

    def check_any_available(self) -> None:
        """Raises ServiceError if no model has a generator that is serving."""
        if self.available:
            return
        for served in self.by_id.values():
            served.watch.check_available()
        raise ServiceError("model_loading", "No generator has been reached yet.")

    @property
    def available(self) -> list[ServedModel]:
        """The models whose generator is available, ordered by id."""
        return [served for _, served in sorted(self.by_id.items()) if served.watch.available]


def load_model(
    path: Path,
    tool_parser: str = "auto",
    reasoning_parser: str = "auto",
    variables: Set[str] = frozenset(),
    fold_messages: bool = True,
) -> Model:
    """Loads a model folder and warms it up; raises ModelDirectoryError if it is not usable.

    The parsers are names that `choose` knows; `variables` are the template variables that requests
    may set; `fold_messages` is whether conversations that the template refuses are tried in other
    forms.
    """
    directory = load_model_directory(path)
    try:
        tokenizer = Tokenizer(directory.tokenizer.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise ModelDirectoryError(f"{directory.tokenizer}: {error}") from error
    template = _chat_template(directory)
    prompts = PromptBuilder(template, tokenizer, variables, fold_messages, directory.id)
    model = Model(
        id=directory.id,
        revision=directory.revision,
        created=directory.tokenizer.stat().st_mtime,
        context_length=directory.context_length,
        vocabulary_size=directory.vocab_size,
        tokenizer=tokenizer,
        template=template,
        prompts=prompts,
        output=_output(template, prompts.shows_tools, tool_parser, reasoning_parser),
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


def _output(
    template: ChatTemplate, shows_tools: bool, tool_parser: str, reasoning_parser: str
) -> ModelOutputFormat:
    """The output format. A model not made for tools may call once, or it might not stop."""
    output = choose(template.whole_source, tool_parser, reasoning_parser)
    return replace(output, single_call=output.single_call or not shows_tools)


def _warm_up(model: Model) -> None:
    """Encodes and decodes one prompt, so that the first request does not pay for warm-up."""
    if model.template.is_missing:
        log.warning("model %s has no chat template: it serves /v1/completions only", model.id)
        token_ids = model.tokenizer.encode("Hello")
    else:
        token_ids = _chat_prompt(model)
    if max(token_ids) >= model.vocabulary_size:
        raise ModelDirectoryError(f"{model.id}: the tokenizer does not fit the model's vocabulary")
    detokenizer = Detokenizer(model.tokenizer)
    text = "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()
    log.info("model %s is ready: %d warm-up characters", model.id, len(text))


def _chat_prompt(model: Model) -> list[int]:
    try:
        prompt = model.prompts.build(Conversation((Message(Role.USER, ("Hello",)),)))
    except ServiceError as error:
        raise ModelDirectoryError(f"{model.id}: {error.message}") from error
    if not prompt.token_ids:
        raise ModelDirectoryError(f"{model.id}: the chat template renders an empty prompt")
    return prompt.token_ids


def _message_size(message: Message) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    text = sum(len(part or "") for part in message.parts)
    return text + len(message.name or "") + len(message.reasoning or "") + calls


def _tool_size(tool: Tool) -> int:
    return len(tool.name or "") + len(tool.description or "") + len(tool.parameters or "")


def _bad_words(tokenizer: Tokenizer, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Unlike vLLM's, also those of more or fewer tokens with the space: " Paris" is one, "Paris"
    may be two."""
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        bare = word.lstrip()
        for text in (bare, f" {bare}"):
            token_ids = tuple(tokenizer.encode(text, parse_special=True))
            if not token_ids:
                raise empty_string(f"bad_words[{index}]", "token")
            found[token_ids] = None
    return list(found)


def _too_long(context_length: int, tokens: str, param: str) -> ServiceError:
    what = "messages" if param == "messages" else "prompt"
    message = (
        f"This model's maximum context length is {context_length} tokens. However, your {what} "
        f"resulted in {tokens} tokens. Please reduce the length of the {what}."
    )
    return ServiceError("context_length_exceeded", message, param)
