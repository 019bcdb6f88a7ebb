"""Checks what form the answer's text is to have.

Raises ServiceError as `validate` does. Whether it can be compiled is the generator's to say.
"""

from dataclasses import replace

from tokenizer_svc.request.field_checks import check_array, check_length, check_nonempty, missing
from tokenizer_svc.request.gbnf import is_gbnf, to_lark
from tokenizer_svc.request.json_schema import check_schema
from tokenizer_svc.request.types import Form, OutputForm
from tokenizer_svc.request.validate_tools import check_name
from trivium.wire.errors import ServiceError

MAX_CHOICES = 1024
MAX_PATTERN_CHARACTERS = 65_536


def valid_form(
    response_format: OutputForm | None, structured_outputs: OutputForm | None
) -> OutputForm | None:
    """The form that either of the two asks for; None for plain text."""
    for form in (response_format, structured_outputs):
        if form is not None:
            _check(form)
    if response_format is not None and response_format.form is Form.TEXT:
        response_format = None
    if response_format is not None and structured_outputs is not None:
        message = (
            "'structured_outputs' cannot be used together with a 'response_format' other than text."
        )
        raise ServiceError("invalid_parameter_combination", message, "structured_outputs")
    return response_format or (structured_outputs and _in_lark(structured_outputs))


def _in_lark(form: OutputForm) -> OutputForm:
    """The same form, with Lark for a grammar in GBNF."""
    if form.form is not Form.GRAMMAR or not is_gbnf(form.definition or ""):
        return form
    try:
        return replace(form, definition=to_lark(form.definition or ""))
    except ValueError as error:
        message = f"Invalid '{form.param}': the grammar cannot be used: {error}."
        raise ServiceError("invalid_value", message, form.param) from error


def _check(form: OutputForm) -> None:
    if form.form is None:
        known = (
            "'text', 'json_object' and 'json_schema'"
            if form.param == "response_format"
            else "'json', 'regex', 'choice', 'grammar' and 'json_object'"
        )
        text = f"Invalid value for '{form.param}'. Supported values are: {known}."
        raise ServiceError("invalid_value", text, form.param)
    if form.param.startswith("response_format.json_schema"):
        check_name("response_format.json_schema.name", form.name or "")
    if form.form is Form.JSON_SCHEMA and form.definition is not None:
        check_schema(form.definition, form.param)
    elif form.form in (Form.REGEX, Form.GRAMMAR):
        if not form.definition:
            raise missing(form.param)
        check_length(form.param, form.definition, MAX_PATTERN_CHARACTERS)
    elif form.form is Form.CHOICE:
        _check_choices(form)


def _check_choices(form: OutputForm) -> None:
    check_nonempty(form.param, form.choices)
    check_array(form.param, form.choices, MAX_CHOICES)
    for index, choice in enumerate(form.choices):
        field = f"{form.param}[{index}]"
        if not choice:
            text = f"Invalid '{field}': empty string. Expected at least one character."
            raise ServiceError("invalid_value", text, field)
        check_length(field, choice, MAX_PATTERN_CHARACTERS)
