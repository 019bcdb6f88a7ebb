"""The part of a row of logits that usually determines the token, with the rest on demand.

For a greedy row that is the arg max; for any other row on a device, its top 256, the candidates.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CANDIDATES = 256  # the k of the device's top-k
BLOCK = 256  # tokens with consecutive ids, whose weights are summed unless they are candidates
# Of a block's sum, from adding 256 float32 terms and rounding their exponents.
RELATIVE_ERROR = 1e-4


@dataclass(slots=True, eq=False)  # one for each token: frozen would take a microsecond more
class GreedyRow:
    """The arg max of a row, for plain greedy sampling.

    `token_id` has the largest logit; `is_certain` says that it is the token to take and that no
    logit is NaN. `fetch` returns all logits, float32 [vocabulary]; call it before the next step.
    """

    token_id: int
    is_certain: bool
    fetch: Callable[[], npt.NDArray[np.float32]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.fetch(), dtype)


@dataclass(frozen=True, eq=False)
class DeviceRow:
    """A device-resident row of logits with its top 256, the candidates, copied to the host.

    `values`, float32 [256], are the largest logits in descending order, and `ids`, int64 [256],
    their tokens. `rest`, float32 [blocks], is for each block of ids the sum of
    exp((logit - values[0]) / temperature) over all logits that are not above the last of `values`,
    NaN if any is NaN. `size` is the vocabulary size. `fetch` copies all logits, float32 [size], to
    the host; call it before the next step.
    """

    size: int
    ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float32]
    temperature: float
    fetch: Callable[[], npt.NDArray[np.float32]]

    @functools.cached_property
    def whole(self) -> npt.NDArray[np.float32]:
        """All logits, float32 [size], copied once."""
        return self.fetch()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.whole, dtype)
