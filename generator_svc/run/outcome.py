"""What the engine knows of a device: how it runs plans, what comes of them, and its sizes."""

from dataclasses import dataclass
from typing import Protocol

from generator_svc.plan import StepPlan
from generator_svc.run.logits_buffers import DeviceRows, Logits


@dataclass(frozen=True)
class RunResult:
    """One run: its device time, and either its logits, float32 [rows, vocabulary], or its error.

    Logits that stay on the device are a DeviceRow per row, those of which only the arg max is
    needed a GreedyRow. `all_logits`, float32 [tokens, vocabulary], are those of every token of a
    chunk with `wants_all_logits`.
    """

    nanoseconds: int
    logits: Logits | DeviceRows | None = None
    error: BaseException | None = None
    all_logits: Logits | None = None


@dataclass(frozen=True)
class StepOutcome:
    """The results of one plan: one per prompt batch, one per chunk, and one for the decode rows, if
    any."""

    move_nanoseconds: int = 0
    chunks: tuple[RunResult, ...] = ()
    rows: RunResult | None = None
    batches: tuple[RunResult, ...] = ()

    @property
    def prefills(self) -> tuple[RunResult, ...]:
        """The results of the prompt batches, then those of the chunks."""
        return (*self.batches, *self.chunks)


class Runner(Protocol):
    """Executes plans; the engine's view of a device."""

    def run(self, plan: StepPlan) -> StepOutcome:
        """Executes a plan. Reports a failed run in its result; what it raises ends the engine."""


@dataclass(frozen=True)
class DeviceInfo:
    """The execution provider, and the data type and sizes in use."""

    provider: str
    dtype: str
    slots: int
    slot_length: int
    cache_bytes: int
    capture_sizes: tuple[int, ...] = ()  # batch sizes of CUDA graphs, ascending; empty without them
    pads_prompts: bool = False  # whether the model's graph supports PromptBatch
    gives_all_logits: bool = False  # whether it can return the logits of every token of a chunk
    cuda_unavailable: str = ""  # why device `auto` did not choose CUDA

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return "cuda" if self.provider == "CUDAExecutionProvider" else "cpu"
