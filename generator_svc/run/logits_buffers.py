"""Where a run leaves its logits: main memory, or the device, which shows what decides."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_svc.device import Device, Place
from generator_svc.graphs import ARGMAX, DEVICE_TOPK
from generator_svc.sampling.device_row import (
    BLOCK,
    CANDIDATES,
    RELATIVE_ERROR,
    DeviceRow,
    GreedyRow,
)

Logits = npt.NDArray[np.float32]
DeviceRows = tuple[DeviceRow | GreedyRow, ...]

# TopK of 128 rows takes longer than of twice 64 (docs/log.md).
_SLICE = 64


class HostLogits:
    """Logits in main memory, in the type that the graph gives them."""

    is_on_host = True

    def __init__(self, vocabulary: int, dtype: Any) -> None:
        self._vocabulary = vocabulary
        self._dtype = dtype

    def reserve(self, rows: int) -> npt.NDArray[Any]:
        """Room for so many rows, which lasts as long as it is kept."""
        return np.empty((rows, 1, self._vocabulary), self._dtype)

    def place(self, room: npt.NDArray[Any], rows: int) -> Place:
        """What the output of a run of `rows` rows is bound to."""
        shape = (rows, 1, self._vocabulary)
        return "cpu", 0, self._dtype, shape, room.ctypes.data

    def read(self, room: npt.NDArray[Any], is_greedy: Sequence[bool]) -> Logits:
        """What the run gave, float32 [rows, vocabulary]; `is_greedy` has an item for each row."""
        rows = len(is_greedy)
        return room[:rows, 0].astype(np.float32, copy=False)


class DeviceLogits:
    """Logits, float32, on the device; `reserve`, `place` and `read` as of HostLogits."""

    is_on_host = False

    def __init__(self, device: Device, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._device = device
        self._candidates = device.open(DEVICE_TOPK)
        self._argmax = device.open(ARGMAX)

    def reserve(self, rows: int) -> Any:
        return self._device.tensor((rows, 1, self._vocabulary), np.float32)

    def place(self, room: Any, rows: int) -> Place:
        shape = (rows, 1, self._vocabulary)
        return self._device.place(np.float32, shape, room.data_ptr())

    def read(self, room: Any, is_greedy: Sequence[bool]) -> DeviceRows:
        """A row each: a GreedyRow where `is_greedy` and no other row near it needs candidates."""
        rows: list[DeviceRow | GreedyRow] = []
        for first in range(0, len(is_greedy), _SLICE):
            part = is_greedy[first : first + _SLICE]
            read = self._read_greedy if all(part) else self._read_candidates
            rows += read(room, first, len(part))
        return tuple(rows)

    def _read_greedy(self, room: Any, first: int, count: int) -> list[DeviceRow | GreedyRow]:
        ids = np.empty(count, np.int64)
        largest = np.empty(count, np.float32)
        equals = np.empty(count, np.float32)
        outputs = {"ids": ids, "largest": largest, "equals": equals}
        self._run(self._argmax, room, first, count, outputs)
        is_certain = (equals == 1) & np.isfinite(largest)
        return [
            GreedyRow(*row, fetch=functools.partial(self._fetch_row, room, first + index))
            for index, row in enumerate(zip(ids.tolist(), is_certain.tolist(), strict=True))
        ]

    def _read_candidates(self, room: Any, first: int, count: int) -> list[DeviceRow | GreedyRow]:
        blocks = -(-self._vocabulary // BLOCK)
        ids = np.empty((count, CANDIDATES), np.int64)
        values = np.empty((count, CANDIDATES), np.float32)
        rest = np.empty((count, blocks), np.float32)
        outputs = {"ids": ids, "values": values, "rest": rest}
        self._run(self._candidates, room, first, count, outputs)
        return [
            DeviceRow(
                self._vocabulary,
                *parts,
                fetch=functools.partial(self._fetch_row, room, first + index),
            )
            for index, parts in enumerate(zip(ids, values, rest, strict=True))
        ]

    def _run(
        self, session: Any, room: Any, first: int, count: int, outputs: dict[str, Any]
    ) -> None:
        """Runs a graph over `count` rows from `first`; waits until `outputs` are there."""
        binding = session.io_binding()
        address = room.data_ptr() + first * self._vocabulary * np.dtype(np.float32).itemsize
        shape = (count, self._vocabulary)
        binding.bind_input("logits", *self._device.place(np.float32, shape, address))
        for name, array in outputs.items():
            place = "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
            binding.bind_output(name, *place)
        session.run_with_iobinding(binding)

    def check(self) -> None:
        """Raises ArithmeticError unless known logits come back as they are."""
        numbers = np.random.default_rng(0).permutation(2 * self._vocabulary)
        logits = (numbers / self._vocabulary).astype(np.float32).reshape(2, 1, -1)
        room = self.reserve(2)
        room.update_inplace(logits)
        rows = zip(
            logits[:, 0],
            self.read(room, [False, False]),
            self.read(room, [True, True]),
            strict=True,
        )
        for row, given, best in rows:
            assert isinstance(given, DeviceRow)
            assert isinstance(best, GreedyRow)
            ids = np.argsort(-row)[:CANDIDATES]
            rest = np.where(row > row[ids[-1]], 0, np.exp(row - row.max())).sum()
            if not (
                np.array_equal(row, given.whole)
                and np.array_equal(row[ids], given.values)
                and np.array_equal(given.values, row[given.ids])
                and np.isclose(rest, given.rest.sum(), rtol=RELATIVE_ERROR)
                and (ids[0], True) == (best.token_id, best.is_certain)
            ):
                raise ArithmeticError("the candidates that the device picks are not the largest")

    def _fetch_row(self, room: Any, row: int) -> Logits:
        logits = np.empty(self._vocabulary, np.float32)
        self._device.copy_to_host(
            logits.ctypes.data, room.data_ptr() + row * logits.nbytes, logits.nbytes
        )
        return logits
