"""Validates response constraints: response_format and structured_outputs.

Raises ServiceError as `validate` does. The generator compiles them and may still refuse them.
"""

from dataclasses import replace

from tokenizer_svc.request.field_checks import check_array, check_length, check_nonempty
from tokenizer_svc.request.gbnf import is_gbnf, to_lark
from tokenizer_svc.request.json_schema import check_schema
from tokenizer_svc.request.types import ResponseConstraint, ResponseKind
from tokenizer_svc.request.validate_tools import check_name
from trivium.field_errors import empty_string, missing, unknown_value
from trivium.limits import MAX_CHOICES, MAX_PATTERN_CHARACTERS
from trivium.wire.errors import ServiceError


def valid_response_constraint(
    response_format: ResponseConstraint | None, structured_outputs: ResponseConstraint | None
) -> ResponseConstraint | None:
    """The constraint that either field gives; None for plain text."""
    for form in (response_format, structured_outputs):
        if form is not None:
            _check(form)
    if response_format is not None and response_format.kind is ResponseKind.TEXT:
        response_format = None
    if response_format is not None and structured_outputs is not None:
        message = (
            "'structured_outputs' cannot be used together with a 'response_format' other than text."
        )
        raise ServiceError("invalid_parameter_combination", message, "structured_outputs")
    return response_format or (structured_outputs and _in_lark(structured_outputs))


def _in_lark(form: ResponseConstraint) -> ResponseConstraint:
    """The same constraint, with a grammar in GBNF translated to Lark."""
    if form.kind is not ResponseKind.GRAMMAR or not is_gbnf(form.definition or ""):
        return form
    try:
        return replace(form, definition=to_lark(form.definition or ""))
    except ValueError as error:
        message = f"Invalid '{form.param}': the grammar cannot be used: {error}."
        raise ServiceError("invalid_value", message, form.param) from error


def _check(form: ResponseConstraint) -> None:
    if form.kind is None:
        known = (
            "'text', 'json_object' and 'json_schema'"
            if form.param == "response_format"
            else "'json', 'regex', 'choice', 'grammar' and 'json_object'"
        )
        raise unknown_value(form.param, known)
    if form.param.startswith("response_format.json_schema"):
        check_name("response_format.json_schema.name", form.name or "")
    if form.kind is ResponseKind.JSON_SCHEMA and form.definition is not None:
        check_schema(form.definition, form.param)
    elif form.kind in (ResponseKind.REGEX, ResponseKind.GRAMMAR):
        if not form.definition:
            raise missing(form.param)
        check_length(form.param, form.definition, MAX_PATTERN_CHARACTERS)
    elif form.kind is ResponseKind.CHOICE:
        _check_choices(form)


def _check_choices(form: ResponseConstraint) -> None:
    check_nonempty(form.param, form.choices)
    check_array(form.param, form.choices, MAX_CHOICES)
    for index, choice in enumerate(form.choices):
        field = f"{form.param}[{index}]"
        if not choice:
            raise empty_string(field)
        check_length(field, choice, MAX_PATTERN_CHARACTERS)
