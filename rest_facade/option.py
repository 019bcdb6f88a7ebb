"""What chat and plain completions say alike of the answer they want."""

from rest_facade.format import OTHER_NAMES, Constrained
from rest_facade.sampling import Sampling


class Options(Constrained, Sampling):
    """The form of an answer, how it is drawn, where it ends and how it is sent."""

    def old_names(self) -> dict[str, str]:
        """The names that the client used where the next stage knows others, by the latter."""
        names = {}
        if self.max_tokens is not None:
            names["max_completion_tokens"] = "max_tokens"
        for name in self.constraints():
            if name in OTHER_NAMES:
                names[f"structured_outputs.{OTHER_NAMES[name]}"] = name
                names["structured_outputs"] = name
        return names
