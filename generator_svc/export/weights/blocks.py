"""Rows of weights cut into blocks that share a scale."""

from __future__ import annotations

import numpy as np

from generator_svc.export.weights.matrix import Array

BLOCK_SIZE = 32


def cut(rows: Array) -> Array:
    """Rows [n, K] as [n, blocks, block size]; the last block of each is padded with zeros."""
    count, columns = rows.shape
    padding = -columns % BLOCK_SIZE
    padded = np.pad(rows, ((0, 0), (0, padding))) if padding else np.ascontiguousarray(rows)
    return padded.reshape(count, -1, BLOCK_SIZE)
