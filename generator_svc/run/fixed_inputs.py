"""Inputs of decode runs at fixed device addresses, as captured CUDA graphs need them.

A captured graph is replayed with the addresses and shapes it was captured with, so the mask is
always as long as a slot. The ONNX graph DECODE_INPUTS fills both tensors from a token and a
position per row.
"""

import numpy as np

from generator_svc.device import Device, TensorRef, run_options
from generator_svc.graphs import DECODE_INPUTS
from generator_svc.plan import Row


class FixedInputs:
    """Inputs for runs of up to `slots` rows with one new token each."""

    def __init__(self, device: Device, slots: int, slot_length: int) -> None:
        self._device = device
        self._session = device.open(DECODE_INPUTS)
        self._length = np.array(slot_length, np.int64)
        self._input_ids = device.tensor((slots, 1), np.int64)
        self._attention_mask = device.tensor((slots, slot_length), np.int64)

    def write(self, rows: tuple[Row, ...]) -> tuple[TensorRef, TensorRef]:
        """Writes the inputs of `rows`; returns references to `input_ids` and `attention_mask`."""
        count = len(rows)
        ids = self._device.tensor_ref(np.int64, (count, 1), self._input_ids.data_ptr())
        shape = (count, int(self._length))
        mask = self._device.tensor_ref(np.int64, shape, self._attention_mask.data_ptr())
        binding = self._session.io_binding()
        tokens = np.array([[row.token_id] for row in rows], np.int64)
        positions = np.array([[row.position] for row in rows], np.int64)
        binding.bind_cpu_input("tokens", tokens)
        binding.bind_cpu_input("positions", positions)
        binding.bind_cpu_input("length", self._length)
        binding.bind_output("input_ids", *ids)
        binding.bind_output("attention_mask", *mask)
        self._session.run_with_iobinding(binding, run_options(synchronize=False))
        return ids, mask
