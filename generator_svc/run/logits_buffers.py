"""Output buffers for logits: in host memory, or in device memory with only the top-k copied."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_svc.device import Device, TensorRef
from generator_svc.graphs import ARGMAX, DEVICE_TOPK
from generator_svc.sampling.device_row import (
    BLOCK,
    CANDIDATES,
    RELATIVE_ERROR,
    DeviceRow,
    GreedyRow,
)
from generator_svc.sampling.draw import MIN_TEMPERATURE

Logits = npt.NDArray[np.float32]
DeviceRows = tuple[DeviceRow | GreedyRow, ...]

# TopK of 128 rows takes longer than two of 64 (docs/log.md).
_MAX_ROWS = 64


class HostLogits:
    """Logits in host memory, in the element type of the graph's output."""

    is_on_host = True

    def __init__(self, vocabulary: int, dtype: Any) -> None:
        self._vocabulary = vocabulary
        self._dtype = dtype

    def allocate(self, rows: int) -> npt.NDArray[Any]:
        """A buffer for `rows` rows, freed with its last reference."""
        return np.empty((rows, 1, self._vocabulary), self._dtype)

    def tensor_ref(self, buffer: npt.NDArray[Any], rows: int) -> TensorRef:
        """The buffer as the logits output of a run with `rows` rows."""
        shape = (rows, 1, self._vocabulary)
        address, _ = buffer.__array_interface__["data"]  # `.ctypes` takes four times as long
        return "cpu", 0, self._dtype, shape, address

    def read(
        self, buffer: npt.NDArray[Any], temperatures: Sequence[float | None]
    ) -> Logits | tuple[GreedyRow, ...]:
        """The run's logits, float32 [rows, vocabulary]; if all of `temperatures`, one per row, are
        None, a GreedyRow per row instead."""
        count = len(temperatures)
        logits = buffer[:count, 0].astype(np.float32, copy=False)
        if temperatures.count(None) < count:
            return logits
        ids = logits.argmax(axis=1)
        is_certain = np.isfinite(logits[np.arange(count), ids])  # argmax picks a NaN, if any
        return tuple(
            GreedyRow(*row, functools.partial(logits.__getitem__, index))
            for index, row in enumerate(zip(ids.tolist(), is_certain.tolist(), strict=True))
        )


class DeviceLogits:
    """Logits on the device, float32; `allocate` and `tensor_ref` as in HostLogits."""

    is_on_host = False

    def __init__(self, device: Device, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._device = device
        self._topk = device.open(DEVICE_TOPK)
        self._argmax = device.open(ARGMAX)

    def allocate(self, rows: int) -> Any:
        return self._device.tensor((rows, 1, self._vocabulary), np.float32)

    def tensor_ref(self, buffer: Any, rows: int) -> TensorRef:
        shape = (rows, 1, self._vocabulary)
        return self._device.tensor_ref(np.float32, shape, buffer.data_ptr())

    def read(self, buffer: Any, temperatures: Sequence[float | None]) -> DeviceRows:
        """A GreedyRow for each row whose temperature is None, a DeviceRow for each other row.

        ArgMax takes a fraction of the time of TopK, so TopK runs only over the rows that need it,
        wherever they are in the batch.
        """
        count = len(temperatures)
        rows: dict[int, DeviceRow | GreedyRow] = {}
        for first in range(0, count, _MAX_ROWS):
            part = temperatures[first : first + _MAX_ROWS]
            if None in part:
                rows |= enumerate(self._read_greedy(buffer, first, len(part)), first)
        sampled = [(place, t) for place, t in enumerate(temperatures) if t is not None]
        for first in range(0, len(sampled), _MAX_ROWS):
            rows |= self._read_candidates(buffer, count, sampled[first : first + _MAX_ROWS])
        return tuple(rows[place] for place in range(count))

    def _read_greedy(self, buffer: Any, first: int, count: int) -> list[GreedyRow]:
        ids = np.empty(count, np.int64)
        largest = np.empty(count, np.float32)
        equals = np.empty(count, np.float32)
        outputs = {"ids": ids, "largest": largest, "equals": equals}
        self._run(self._argmax, buffer, first, count, {}, outputs)
        is_certain = (equals == 1) & np.isfinite(largest)
        return [
            GreedyRow(*row, functools.partial(self._fetch_row, buffer, first + index))
            for index, row in enumerate(zip(ids.tolist(), is_certain.tolist(), strict=True))
        ]

    def _read_candidates(
        self, buffer: Any, rows: int, sampled: Sequence[tuple[int, float]]
    ) -> dict[int, DeviceRow]:
        """The DeviceRows of a buffer with `rows` rows, by row index.

        `sampled` has the index and the temperature of each row to read.
        """
        count, blocks = len(sampled), -(-self._vocabulary // BLOCK)
        # A greedy row, whose `rest` is not used, may have a temperature of zero.
        used = [max(temperature, MIN_TEMPERATURE) for _, temperature in sampled]
        inputs = {
            "places": np.array([place for place, _ in sampled], np.int64),
            "inverse_temperatures": (1 / np.array(used)).astype(np.float32)[:, None],
        }
        ids = np.empty((count, CANDIDATES), np.int64)
        values = np.empty((count, CANDIDATES), np.float32)
        rest = np.empty((count, blocks), np.float32)
        outputs = {"ids": ids, "values": values, "rest": rest}
        self._run(self._topk, buffer, 0, rows, inputs, outputs)
        return {
            place: DeviceRow(
                self._vocabulary,
                ids[index],
                values[index],
                rest[index],
                temperature,
                fetch=functools.partial(self._fetch_row, buffer, place),
            )
            for index, (place, temperature) in enumerate(sampled)
        }

    def _run(
        self,
        session: Any,
        buffer: Any,
        first: int,
        count: int,
        inputs: dict[str, Any],
        outputs: dict[str, Any],
    ) -> None:
        """Runs a graph over `count` rows from `first` and waits for `outputs`."""
        binding = session.io_binding()
        address = buffer.data_ptr() + first * self._vocabulary * np.dtype(np.float32).itemsize
        shape = (count, self._vocabulary)
        binding.bind_input("logits", *self._device.tensor_ref(np.float32, shape, address))
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, array in outputs.items():
            ref = "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
            binding.bind_output(name, *ref)
        session.run_with_iobinding(binding)

    def check(self) -> None:
        """Raises ArithmeticError unless the graphs give correct results for known logits."""
        numbers = np.random.default_rng(0).permutation(2 * self._vocabulary)
        logits = (numbers / self._vocabulary).astype(np.float32).reshape(2, 1, -1)
        buffer = self.allocate(2)
        buffer.update_inplace(logits)
        rows = zip(
            logits[:, 0],
            self.read(buffer, [0.5, 1.5]),
            self.read(buffer, [None, None]),
            strict=True,
        )
        for row, candidates, best in rows:
            assert isinstance(candidates, DeviceRow)
            assert isinstance(best, GreedyRow)
            ids = np.argsort(-row)[:CANDIDATES]
            masses = np.exp((row - row.max()) / candidates.temperature)
            rest = np.where(row > row[ids[-1]], 0, masses).sum()
            if not (
                np.array_equal(row, candidates.whole)
                and np.array_equal(row[ids], candidates.values)
                and np.array_equal(candidates.values, row[candidates.ids])
                and np.isclose(rest, candidates.rest.sum(), rtol=RELATIVE_ERROR)
                and (ids[0], True) == (best.token_id, best.is_certain)
            ):
                raise ArithmeticError("top-k on the device gives wrong results")

    def _fetch_row(self, buffer: Any, row: int) -> Logits:
        logits = np.empty(self._vocabulary, np.float32)
        self._device.copy_to_host(
            logits.ctypes.data, buffer.data_ptr() + row * logits.nbytes, logits.nbytes
        )
        return logits
