"""Where a run leaves its logits: main memory, or the device, which shows their candidates."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_svc.device import Device, Place
from generator_svc.device_row import BLOCK, CANDIDATES, GRAPH, RELATIVE_ERROR, DeviceRow

Logits = npt.NDArray[np.float32]


class HostLogits:
    """Logits in main memory, in the type that the graph gives them."""

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

    def read(self, room: npt.NDArray[Any], rows: int) -> Logits:
        """What the run gave, float32 [rows, vocabulary]."""
        return room[:rows, 0].astype(np.float32, copy=False)


class DeviceLogits:
    """Logits, float32, on the device; `reserve`, `place` and `read` as of HostLogits."""

    def __init__(self, device: Device, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._device = device
        self._session = device.open(GRAPH)

    def reserve(self, rows: int) -> Any:
        return self._device.tensor((rows, 1, self._vocabulary), np.float32)

    def place(self, room: Any, rows: int) -> Place:
        shape = (rows, 1, self._vocabulary)
        return self._device.place(np.float32, shape, room.data_ptr())

    def read(self, room: Any, rows: int) -> tuple[DeviceRow, ...]:
        blocks = -(-self._vocabulary // BLOCK)
        ids = np.empty((rows, CANDIDATES), np.int64)
        values = np.empty((rows, CANDIDATES), np.float32)
        rest = np.empty((rows, blocks), np.float32)
        binding = self._session.io_binding()
        shape = (rows, self._vocabulary)
        binding.bind_input("logits", *self._device.place(np.float32, shape, room.data_ptr()))
        for name, array in (("ids", ids), ("values", values), ("rest", rest)):
            place = "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
            binding.bind_output(name, *place)
        self._session.run_with_iobinding(binding)
        return tuple(
            DeviceRow(self._vocabulary, *parts, fetch=functools.partial(self._fetch_row, room, row))
            for row, parts in enumerate(zip(ids, values, rest, strict=True))
        )

    def check(self) -> None:
        """Raises ArithmeticError unless known logits come back as they are."""
        numbers = np.random.default_rng(0).permutation(2 * self._vocabulary)
        logits = (numbers / self._vocabulary).astype(np.float32).reshape(2, 1, -1)
        room = self.reserve(2)
        room.update_inplace(logits)
        for row, given in zip(logits[:, 0], self.read(room, 2), strict=True):
            ids = np.argsort(-row)[:CANDIDATES]
            rest = np.where(row > row[ids[-1]], 0, np.exp(row - row.max())).sum()
            if not (
                np.array_equal(row, given.whole)
                and np.array_equal(row[ids], given.values)
                and np.array_equal(given.values, row[given.ids])
                and np.isclose(rest, given.rest.sum(), rtol=RELATIVE_ERROR)
            ):
                raise ArithmeticError("the candidates that the device picks are not the largest")

    def _fetch_row(self, room: Any, row: int) -> Logits:
        logits = np.empty(self._vocabulary, np.float32)
        self._device.copy_to_host(
            logits.ctypes.data, room.data_ptr() + row * logits.nbytes, logits.nbytes
        )
        return logits
