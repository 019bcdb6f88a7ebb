"""A generator's load, from its last report and what it was sent since."""

from dataclasses import dataclass, field

# Prompt tokens whose prefill counts as much as one more sequence in the batch.
TOKENS_PER_SEQUENCE = 128


@dataclass(frozen=True)
class LoadReport:
    """What a generator reports about itself, by WatchLoad."""

    waiting_sequences: int
    running_sequences: int
    free_slots: int
    waiting_prompt_tokens: int


@dataclass(eq=False)
class SentGeneration:
    """A generation sent to a generator; `prompt_tokens` are those to compute, not cached ones."""

    sequences: int
    prompt_tokens: int


@dataclass
class GeneratorLoad:
    """The load of one generator, whose reports are about 100 ms old and count others' work too."""

    report: LoadReport | None = None
    _outstanding: set[SentGeneration] = field(default_factory=set)
    _since_report: set[SentGeneration] = field(default_factory=set)

    def update(self, report: LoadReport | None) -> None:
        """Takes a new report; None means that reports are not available."""
        self.report = report
        self._since_report.clear()

    def add(self, sent: SentGeneration) -> None:
        """Records a generation that is being sent."""
        self._outstanding.add(sent)
        self._since_report.add(sent)

    def remove(self, sent: SentGeneration) -> None:
        """Records that a generation has ended."""
        self._outstanding.discard(sent)
        self._since_report.discard(sent)

    @property
    def busy(self) -> float:
        """The load in sequences; TOKENS_PER_SEQUENCE waiting prompt tokens count as one. At least
        our own sequences, which a report in flight may not include yet."""
        own = sum(sent.sequences for sent in self._outstanding)
        if self.report is None:
            return own
        report = self.report
        new = sum(sent.sequences for sent in self._since_report)
        tokens = report.waiting_prompt_tokens
        tokens += sum(sent.prompt_tokens for sent in self._since_report)
        sequences = max(report.running_sequences + report.waiting_sequences + new, own)
        return sequences + tokens / TOKENS_PER_SEQUENCE

    @property
    def is_full(self) -> bool:
        """Whether a new sequence would have to wait for a slot."""
        if self.report is None:
            return False
        new = sum(sent.sequences for sent in self._since_report)
        return self.report.free_slots <= new + self.report.waiting_sequences
