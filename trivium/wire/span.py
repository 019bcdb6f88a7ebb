"""A span of a trace, which records nothing: the base of those that OpenTelemetry records."""

from collections.abc import Mapping, Sequence

Attributes = Mapping[str, str | bool | int | float | Sequence[str]]


class Span:
    """A span that is not recorded. `traceparent` is empty if there is no trace to continue."""

    is_recording = False
    traceparent = ""

    def rename(self, name: str) -> None:
        """Changes its name."""

    def set(self, attributes: Attributes) -> None:
        """Adds attributes."""

    def event(
        self, name: str, at: float | None = None, attributes: Attributes | None = None
    ) -> None:
        """Adds an event at this time of the monotonic clock, or now."""

    def fail(self, description: str) -> None:
        """Marks it as failed."""

    def end(self, at: float | None = None) -> None:
        """Ends it, at this time of the monotonic clock, or now."""
