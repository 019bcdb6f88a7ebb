"""Exports a checkpoint to a model directory.

The only package that imports torch, transformers, optimum and onnx, and only inside the steps that
need them: `from generator_svc.export import export_model` is cheap. It runs before serving, never
during it.
"""

from generator_svc.export.errors import ExportError
from generator_svc.export.options import (
    DEVICES,
    PRECISIONS,
    ExportOptions,
    embedded_precision,
)
from generator_svc.export.pipeline import EXPORTER_VERSION, export_model, is_current
from generator_svc.export.progress import Progress

__all__ = [
    "DEVICES",
    "EXPORTER_VERSION",
    "PRECISIONS",
    "ExportError",
    "ExportOptions",
    "Progress",
    "embedded_precision",
    "export_model",
    "is_current",
]
