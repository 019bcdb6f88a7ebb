"""Structured output: `response_format`, and vLLM's constraints beyond it."""

from typing import Annotated, Literal

from pydantic import Field

from rest_facade.requests.field import Name, ObjectText, SchemaText, Strict, reject_unsupported
from trivium.field_errors import contradiction, missing
from trivium.limits import MAX_CHOICES
from trivium.wire.errors import ServiceError


class JsonSchemaFormat(Strict):
    """A JSON Schema that the answer has to match."""

    name: Name = Field(description="Letters, digits, underscores and hyphens.")
    description: str | None = Field(None, description="What the format is for.")
    # Not `schema`, which is a method of pydantic's models.
    schema_text: ObjectText | None = Field(
        None, alias="schema", description="The schema. Default: any JSON value."
    )
    strict: bool | None = Field(
        None,
        description="Whether the schema is either enforced exactly or refused; otherwise it is "
        "enforced as far as possible. Default false.",
    )


class ResponseFormat(Strict):
    """The format of the answer."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        reject_unsupported("structural_tag", "grammar", "regex", "json", "python"),
    ]
    json_schema: JsonSchemaFormat | None = Field(None, description="Only with type 'json_schema'.")
    schema_text: ObjectText | None = Field(
        None,
        alias="schema",
        description="llama.cpp's field for a schema, with either JSON type; enforced as far as "
        "possible.",
    )
    value: ObjectText | None = Field(
        None, description="The same in TGI, and from Hugging Face's client."
    )

    def bare_schema(self) -> tuple[str, str] | None:
        """The field with a schema that has no name, and the schema; None if there is none."""
        for field, text in (("schema", self.schema_text), ("value", self.value)):
            # With json_object, an empty schema adds no constraint.
            if text is not None and (self.type, text) != ("json_object", "{}"):
                return field, text
        return None

    def check(self) -> None:
        """Raises ServiceError for fields that do not go together."""
        prefix = "response_format."
        values = {"json_schema": self.json_schema, "schema": self.schema_text, "value": self.value}
        given = [name for name, value in values.items() if value is not None]
        if len(given) > 1:
            raise contradiction(prefix + given[1], f"cannot be combined with '{given[0]}'.")
        if self.type == "json_schema" and not given:
            raise missing(prefix + "json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise contradiction(
                prefix + "json_schema", "is only allowed with the type 'json_schema'."
            )
        if self.type == "text" and given:
            raise contradiction(
                prefix + given[0], "is only allowed with the types 'json_object' and 'json_schema'."
            )


_Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
]


class StructuredOutputs(Strict):
    """vLLM's constraints: exactly one of these."""

    json_text: SchemaText | None = Field(
        None, alias="json", description="A JSON Schema, or the text of one."
    )
    regex: str | None = Field(None, description="A regular expression the whole answer matches.")
    choice: _Choices | None = Field(None, description="The texts to choose from.")
    grammar: str | None = Field(
        None, description="A grammar in llguidance's variant of Lark, or in GBNF."
    )
    json_object: bool | None = Field(None, description="Any JSON object, if true.")

    def kinds(self) -> list[str]:
        """The JSON names of the constraints that are set."""
        values = {
            "json": self.json_text,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
            "json_object": self.json_object or None,
        }
        return [name for name, value in values.items() if value is not None]


# Top-level fields that are another name for one of structured_outputs: vLLM's old names and
# SGLang's.
ALIASES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}


class StructuredOutputFields(Strict):
    """The fields of a request that constrain the format of its answer."""

    response_format: ResponseFormat | None = Field(None, description="Default: plain text.")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="vLLM's constraints beyond response_format."
    )
    guided_json: SchemaText | None = Field(None, description="Old name of structured_outputs.json.")
    guided_regex: str | None = Field(None, description="Old name of structured_outputs.regex.")
    guided_choice: _Choices | None = Field(
        None, description="Old name of structured_outputs.choice."
    )
    guided_grammar: str | None = Field(None, description="Old name of structured_outputs.grammar.")

    json_schema: SchemaText | None = Field(
        None, description="SGLang's name of structured_outputs.json; {} is no constraint."
    )
    regex: str | None = Field(None, description="SGLang's name of structured_outputs.regex.")
    ebnf: str | None = Field(None, description="SGLang's name of structured_outputs.grammar.")

    def constraint(self) -> StructuredOutputs | None:
        """The constraint, from whichever field has it; None if there is none."""
        if self.structured_outputs is not None:
            return self.structured_outputs
        values = {ALIASES[name]: getattr(self, name) for name in self.constraints()}
        if not values:
            return None
        return StructuredOutputs.model_construct(
            json_text=values.get("json"),
            regex=values.get("regex"),
            choice=values.get("choice"),
            grammar=values.get("grammar"),
            json_object=None,
        )

    def constraints(self) -> list[str]:
        """The fields with a constraint; at most one once the request has been validated."""
        names = ["structured_outputs", *ALIASES]
        present = [name for name in names if getattr(self, name) is not None]
        # llama.cpp's clients send an empty schema when they want none.
        return [name for name in present if name != "json_schema" or self.json_schema != "{}"]

    def check_constraint(self) -> None:
        """Raises ServiceError for more than one constraint, and for a missing one."""
        fields = self.constraints()
        if len(fields) > 1:
            raise contradiction(fields[1], f"cannot be combined with '{fields[0]}'.")
        if self.response_format is not None:
            self.response_format.check()
            if fields and self.response_format.type != "text":
                raise contradiction(fields[0], "cannot be combined with 'response_format'.")
        if self.structured_outputs is None:
            return
        kinds = self.structured_outputs.kinds()
        if len(kinds) > 1:
            raise contradiction(
                f"structured_outputs.{kinds[1]}", f"cannot be combined with '{kinds[0]}'."
            )
        if not kinds:
            raise ServiceError(
                "invalid_value",
                "Invalid 'structured_outputs': give one of 'json', 'regex', 'choice', 'grammar' "
                "and 'json_object'.",
                param="structured_outputs",
            )
