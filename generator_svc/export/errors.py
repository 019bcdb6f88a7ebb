"""The one error of this package that callers can cause."""


class ExportError(ValueError):
    """The source cannot be exported; the message explains why, in terms an operator understands."""
