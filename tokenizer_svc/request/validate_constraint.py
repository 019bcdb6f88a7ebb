"""Validates response constraints: response_format and structured_outputs.

Raises ServiceError as `validate` does. The generator compiles them and may still refuse them.
"""

from dataclasses import replace

from tokenizer_svc.request.field_checks import check_length
from tokenizer_svc.request.gbnf import is_gbnf, to_lark
from tokenizer_svc.request.json_schema import check_schema
from tokenizer_svc.request.types import ResponseConstraint, ResponseKind
from tokenizer_svc.request.validate_tools import check_name
from trivium.field_errors import check_array, check_nonempty, empty_string, missing, unknown_value
from trivium.limits import MAX_CHOICES, MAX_PATTERN_CHARACTERS
from trivium.wire.errors import ServiceError


def valid_response_constraint(
    response_format: ResponseConstraint | None, structured_outputs: ResponseConstraint | None
) -> ResponseConstraint | None:
    """The constraint that either field gives; None for plain text."""
    for constraint in (response_format, structured_outputs):
        if constraint is not None:
            _check(constraint)
    if response_format is not None and response_format.kind is ResponseKind.TEXT:
        response_format = None
    if response_format is not None and structured_outputs is not None:
        message = (
            "'structured_outputs' cannot be used together with a 'response_format' other than text."
        )
        raise ServiceError("invalid_parameter_combination", message, "structured_outputs")
    return response_format or (structured_outputs and _in_lark(structured_outputs))


def _in_lark(constraint: ResponseConstraint) -> ResponseConstraint:
    """The same constraint, with a grammar in GBNF translated to Lark."""
    if constraint.kind is not ResponseKind.GRAMMAR or not is_gbnf(constraint.definition or ""):
        return constraint
    try:
        return replace(constraint, definition=to_lark(constraint.definition or ""))
    except ValueError as error:
        message = f"Invalid '{constraint.param}': the grammar cannot be used: {error}."
        raise ServiceError("invalid_value", message, constraint.param) from error


def _check(constraint: ResponseConstraint) -> None:
    if constraint.kind is None:
        known = (
            "'text', 'json_object' and 'json_schema'"
            if constraint.param == "response_format"
            else "'json', 'regex', 'choice', 'grammar' and 'json_object'"
        )
        raise unknown_value(constraint.param, known)
    if constraint.param.startswith("response_format.json_schema"):
        check_name("response_format.json_schema.name", constraint.name or "")
    if constraint.kind is ResponseKind.JSON_SCHEMA and constraint.definition is not None:
        check_schema(constraint.definition, constraint.param)
    elif constraint.kind in (ResponseKind.REGEX, ResponseKind.GRAMMAR):
        if not constraint.definition:
            raise missing(constraint.param)
        check_length(constraint.param, constraint.definition, MAX_PATTERN_CHARACTERS)
    elif constraint.kind is ResponseKind.CHOICE:
        _check_choices(constraint)


def _check_choices(constraint: ResponseConstraint) -> None:
    check_nonempty(constraint.param, constraint.choices)
    check_array(constraint.param, constraint.choices, MAX_CHOICES)
    for index, choice in enumerate(constraint.choices):
        field = f"{constraint.param}[{index}]"
        if not choice:
            raise empty_string(field)
        check_length(field, choice, MAX_PATTERN_CHARACTERS)
