"""The models that can be asked for, each with the generator that runs it.

Knows nothing of gRPC.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizer_svc.generator.client import GeneratorClient
from tokenizer_svc.generator.watch import GeneratorWatch
from tokenizer_svc.models import Model
from tokenizer_svc.prompt.builder import Prompt
from tokenizer_svc.request.types import Conversation
from trivium.wire.errors import ServiceError


@dataclass(frozen=True)
class ServedModel:
    """A model and the generator that runs it.

    `default_max_tokens` is the longest answer where the request names none; None is all that the
    context leaves.
    """

    model: Model
    connection: GeneratorClient
    watch: GeneratorWatch
    default_max_tokens: int | None = None

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together that both stages take."""
        own, generators = self.model.context_length, self.watch.context_length
        return own if generators is None else min(own, generators)

    async def prompt(self, conversation: Conversation) -> Prompt:
        return await self.model.prompt(conversation, self.context_length)


@dataclass(frozen=True)
class ServedModels:
    """All models by id, and the other names that they go by."""

    by_id: Mapping[str, ServedModel]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str, param: str = "model") -> ServedModel:
        """The model of this id or alias; ServiceError if there is none."""
        if not name:
            message = f"Missing required parameter: '{param}'."
            raise ServiceError("missing_required_parameter", message, param)
        served = self.by_id.get(self.aliases.get(name, name))
        if served is None:
            raise ServiceError("model_not_found", f"The model `{name}` does not exist.", param)
        return served

    def check_any(self) -> None:
        """Raises ServiceError if no generator of any model can be asked, and why."""
        if self.available:
            return
        for served in self.by_id.values():
            served.watch.check_available()
        raise ServiceError("model_loading", "No generator has been reached yet.")

    @property
    def available(self) -> list[ServedModel]:
        """Those whose generator can be asked, by id."""
        return [served for _, served in sorted(self.by_id.items()) if served.watch.available]
