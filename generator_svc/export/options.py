"""The options of an export, and which of them a processor or device rules out."""

from __future__ import annotations

from dataclasses import dataclass

from generator_svc.export.errors import ExportError

PRECISIONS = ("int8", "int4", "w8a8", "fp16", "fp32")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class ExportOptions:
    """Precision and target device of an export; raises ExportError if they do not go together."""

    precision: str = "int8"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ExportError(f"precision {self.precision!r}: choose from {', '.join(PRECISIONS)}")
        if self.device not in DEVICES:
            raise ExportError(f"device {self.device!r}: choose from {', '.join(DEVICES)}")
        if self.precision == "fp16" and self.device == "cpu":
            raise ExportError("precision fp16 is for cuda: the CPU provider computes in fp32")
        if self.precision == "w8a8":
            if self.device != "cpu":
                raise ExportError(
                    "precision w8a8 is for cpu: there is no CUDA kernel for its products"
                )
            if not _multiplies_bytes_exactly():
                raise ExportError(
                    "precision w8a8 needs a processor with exact int8 products (on x86: VNNI), "
                    "which this one lacks; use int8"
                )

    @property
    def is_half(self) -> bool:
        """Whether activations and KV cache are float16: on CUDA, unless precision is fp32."""
        return self.device == "cuda" and self.precision != "fp32"

    @property
    def is_symmetric(self) -> bool:
        """Whether quantised weights of matrix products are symmetric, without zero points."""
        return self.device == "cuda" and self.precision in ("int8", "int4")

    def check_experts(self) -> None:
        """Raises ExportError if a model with experts cannot be exported with these options."""
        if self.precision == "w8a8":
            raise ExportError("precision w8a8 does not support experts; use int8")
        if self.device == "cuda" and self.precision == "fp32":
            raise ExportError("precision fp32 has no CUDA kernel for experts; use fp16")


DEFAULT_OPTIONS = ExportOptions()


def embedded_precision() -> str:
    """The fastest precision of the embedded model on this processor."""
    return "w8a8" if _multiplies_bytes_exactly() else "int8"


def _multiplies_bytes_exactly() -> bool:
    from generator_svc.device import multiplies_bytes_exactly

    return multiplies_bytes_exactly()
