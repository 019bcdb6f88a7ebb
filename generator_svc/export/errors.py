"""The one error of this package that a caller can cause."""


class ExportError(ValueError):
    """The source cannot become a model directory; the text says why in words for an operator."""
