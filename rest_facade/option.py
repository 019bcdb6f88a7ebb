"""What chat and plain completions say alike of the answer they want."""

from rest_facade.format import Constrained
from rest_facade.sampling import Sampling


class Options(Constrained, Sampling):
    """The form of an answer, how it is drawn, where it ends and how it is sent."""
