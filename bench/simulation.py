"""The services in virtual time: a trace of requests through M tokenizers to N generators.

A generator is the real engine, with its scheduler, slots and queue; only its runner is replaced by
one that computes nothing and reports what the plan would have cost. A tokenizer is a single-server
queue that takes time for each prompt and each delivered token. The rest of the path, the facade and
the network, is a constant delay.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np

from bench.step_costs import StepCosts, served_engine
from bench.trace import Request
from generator_svc.admission import QueueFull
from generator_svc.plan import StepPlan
from generator_svc.run.outcome import DeviceInfo, RunResult, StepOutcome
from generator_svc.run.runner import capture_sizes
from generator_svc.sequence import EngineRequest, SamplingParams, SequenceUpdate
from tokenizer_svc.generator.load import LoadReport
from tokenizer_svc.generator.picker import Candidate, GeneratorPicker
from tokenizer_svc.generator.prefix_memory import prefixes

MIN_STEP_SECONDS = 1e-6  # so that a free step cannot repeat forever


@dataclass(frozen=True)
class TokenizerCosts:
    """CPU seconds of a tokenizer per request, prompt token and output token.

    `hop` is the time, each way, spent outside tokenizer and generator.
    """

    request: float = 2e-3
    prompt_token: float = 5e-6
    output_token: float = 350e-6
    hop: float = 2e-3


@dataclass(frozen=True)
class Cluster:
    """The simulated replicas. Each generator has `slots` slots of `slot_length` tokens."""

    costs: StepCosts
    tokenizer_costs: TokenizerCosts = TokenizerCosts()
    generators: int = 1
    tokenizers: int = 1
    slots: int = 32
    slot_length: int = 4096


@dataclass
class Answer:
    """An answer. `times` are when its tokens reach the client, in seconds on the trace's clock."""

    request: Request
    generator: int = -1
    cached_tokens: int = 0
    device_seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    is_refused: bool = False

    @property
    def first_token_seconds(self) -> float:
        """Time to first token."""
        return self.times[0] - self.request.arrival

    @property
    def seconds(self) -> float:
        """From the request to its last token."""
        return self.times[-1] - self.request.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in itertools.pairwise(self.times)]


@dataclass(frozen=True)
class Result:
    """Answers in the order of the requests, and the busy seconds of each generator."""

    answers: Sequence[Answer]
    generator_seconds: Sequence[float]

    @property
    def served(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.is_refused]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        first = min(answer.request.arrival for answer in self.answers)
        return max(answer.times[-1] for answer in self.served) - first

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second."""
        return sum(len(answer.times) for answer in self.served) / self.seconds

    @property
    def cached_share(self) -> float:
        """The share of all prompt tokens that was cached."""
        prompts = sum(answer.request.prompt_tokens for answer in self.served)
        return sum(answer.cached_tokens for answer in self.served) / prompts

    @property
    def utilization(self) -> float:
        """Mean share of the time that a generator was in a step."""
        return sum(self.generator_seconds) / len(self.generator_seconds) / self.seconds

    def first_token(self, rank: float) -> float:
        """Percentile of the time to first token, seconds."""
        return float(np.percentile([a.first_token_seconds for a in self.served], rank))

    def between_tokens(self, rank: float) -> float:
        """Percentile of the time between tokens, seconds, over all gaps of all answers."""
        gaps = [gap for answer in self.served for gap in answer.gaps]
        return float(np.percentile(gaps, rank)) if gaps else 0.0


class Replica(Protocol):
    """A replica that can take a request. `load` counts outstanding tokens."""

    load: int


class Router(Protocol):
    """Chooses the generator for a request."""

    def choose(self, prompt: Sequence[int], replicas: Sequence["Generator"]) -> int:
        """The index of the replica for a prompt of these tokens."""


class RoundRobin:
    """Each replica in turn."""

    def __init__(self) -> None:
        self._next = itertools.count()

    def choose(self, prompt: Sequence[int], replicas: Sequence[Replica]) -> int:
        return next(self._next) % len(replicas)


class LeastLoaded:
    """The replica with the fewest outstanding tokens; the first among equals."""

    def choose(self, prompt: Sequence[int], replicas: Sequence[Replica]) -> int:
        return min(range(len(replicas)), key=lambda number: replicas[number].load)


class PrefixAffine:
    """Picks a generator as the tokenizer does, but with load reports that are never late."""

    def __init__(self) -> None:
        self._picker = GeneratorPicker()
        self._candidates: list[Candidate] = []

    def choose(self, prompt: Sequence[int], replicas: Sequence["Generator"]) -> int:
        for number in range(len(self._candidates), len(replicas)):
            self._candidates.append(Candidate(str(number)))
        for candidate, replica in zip(self._candidates, replicas, strict=True):
            candidate.load.update(replica.report())
        keys = prefixes(prompt)
        picked = self._picker.pick(self._candidates, keys)
        picked.memory.add(keys)
        return self._candidates.index(picked)


POLICIES: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-affine": PrefixAffine,
}


class Clock:
    """Virtual time, in seconds: events run in order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Schedules an action; those at the same time run in the order they were scheduled."""
        heapq.heappush(self._events, (when, next(self._count), action))

    def run(self) -> None:
        """Runs until no events are left."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


class VirtualRunner:
    """Computes nothing, and adds up in `seconds` the time that the plans would have taken.

    Its logits are float32 [rows, 1], so every token is 0.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._costs = cluster.costs
        self._logits = np.zeros((cluster.slots, 1), np.float32)
        is_cuda = cluster.costs.device == "cuda"
        self.info = DeviceInfo(
            provider=f"{cluster.costs.device.upper()}ExecutionProvider",
            dtype="float32",
            slots=cluster.slots,
            slot_length=cluster.slot_length,
            cache_bytes=0,
            capture_sizes=capture_sizes(cluster.slots) if is_cuda else (),
            pads_prompts=is_cuda,
        )
        self.seconds = 0.0

    def run(self, plan: StepPlan) -> StepOutcome:
        moves = sum(self._costs.move_seconds(move) for move in plan.moves)
        batches = []
        for batch in plan.batches:
            rows = len(batch.prompts)
            seconds = self._costs.chunk_seconds(rows * batch.length, 0)
            batches.append(self._result(seconds, rows))
        chunks = []
        for chunk in plan.chunks:
            seconds = self._costs.chunk_seconds(len(chunk.token_ids), chunk.start)
            chunks.append(self._result(seconds, 1 if chunk.wants_logits else 0))
        decoded = None
        if plan.rows:
            context = sum(row.position for row in plan.rows) / len(plan.rows)
            seconds = self._costs.decode_seconds(len(plan.rows), context)
            decoded = self._result(seconds, len(plan.rows))
        self.seconds += moves
        return StepOutcome(round(moves * 1e9), tuple(chunks), decoded, tuple(batches))

    def _result(self, seconds: float, rows: int) -> RunResult:
        self.seconds += seconds
        return RunResult(round(seconds * 1e9), self._logits[:rows] if rows else None)


class Generator:
    """The engine over a runner in virtual time. `load` counts outstanding tokens."""

    def __init__(self, clock: Clock, cluster: Cluster) -> None:
        self._clock = clock
        self._costs = cluster.costs
        self._runner = VirtualRunner(cluster)
        self._updates: list[SequenceUpdate] = []
        self._engine = served_engine(self._runner, self._updates.extend)
        self._is_stepping = False
        self.load = 0
        self.busy_seconds = 0.0

    def report(self) -> LoadReport:
        """The engine's current load report."""
        load = self._engine.load()
        return LoadReport(
            waiting_sequences=load.waiting_sequences,
            running_sequences=load.running_sequences,
            free_slots=load.slots - load.used_slots,
            waiting_prompt_tokens=load.waiting_tokens,
        )

    def submit(self, generation: EngineRequest, receive: Callable[[SequenceUpdate], None]) -> None:
        """Calls `receive` for each token when the step that produced it ends. Raises QueueFull."""
        self._engine.submit(generation, receive)
        if not self._is_stepping:
            self._begin_step()

    def _begin_step(self) -> None:
        """Runs the engine's step at once; its updates are delivered when its virtual time ends."""
        self._is_stepping = True
        before = self._runner.seconds
        self._engine.step()
        around = self._costs.around_seconds(len(self._updates))
        seconds = max(self._runner.seconds - before + around, MIN_STEP_SECONDS)
        self.busy_seconds += seconds
        self._clock.at(self._clock.now + seconds, self._end_step)

    def _end_step(self) -> None:
        for update in self._updates:
            update.group.tag(update)
        self._updates.clear()
        self._is_stepping = False
        load = self._engine.load()
        if load.waiting_requests or load.running_sequences:
            self._begin_step()


class Tokenizer:
    """A single-server FIFO queue. `load` counts outstanding tokens."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free_at = 0.0
        self.load = 0

    def work(self, seconds: float, done: Callable[[], None]) -> None:
        """Queues work that takes `seconds`; `done` is called when it ends."""
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self._clock.at(self._free_at, done)


class _Simulation:
    """One run: the replicas, and a request's path through them.

    `ended` is called when an answer has reached its last token or was refused.
    """

    def __init__(self, cluster: Cluster, policy: str) -> None:
        self.clock = Clock()
        self.ended: Callable[[], None] = lambda: None
        self._costs = cluster.tokenizer_costs
        self._count = itertools.count()
        self.generators = [Generator(self.clock, cluster) for _ in range(cluster.generators)]
        self._tokenizers = [Tokenizer(self.clock) for _ in range(cluster.tokenizers)]
        # Tokenizers keep no state of a conversation, so affinity is pointless for them.
        self._to_tokenizer = RoundRobin() if policy == "round-robin" else LeastLoaded()
        self._to_generator = POLICIES[policy]()

    def send(self, answer: Answer) -> None:
        """Schedules the answer's request at its arrival time in the trace."""
        when = answer.request.arrival + self._costs.hop
        self.clock.at(when, partial(self._arrive, answer))

    def _arrive(self, answer: Answer) -> None:
        request, costs = answer.request, self._costs
        number = self._to_tokenizer.choose((), self._tokenizers)
        tokenizer = self._tokenizers[number]
        tokenizer.load += request.output_tokens
        seconds = costs.request + costs.prompt_token * request.prompt_tokens
        tokenizer.work(seconds, lambda: self._generate(answer, tokenizer))

    def _generate(self, answer: Answer, tokenizer: Tokenizer) -> None:
        request = answer.request
        generation = _generation(request, next(self._count))
        answer.generator = self._to_generator.choose(generation.prompt, self.generators)
        generator = self.generators[answer.generator]
        try:
            generator.submit(
                generation, lambda update: self._receive(answer, tokenizer, generator, update)
            )
        except QueueFull:
            answer.is_refused = True
            tokenizer.load -= request.output_tokens
            self.ended()
        else:
            generator.load += request.prompt_tokens + request.output_tokens

    def _receive(
        self, answer: Answer, tokenizer: Tokenizer, generator: Generator, update: SequenceUpdate
    ) -> None:
        sequence = update.sequence
        if sequence.generated == 1:
            generator.load -= answer.request.prompt_tokens
            answer.cached_tokens = sequence.cached_prompt_tokens
        generator.load -= 1
        answer.device_seconds = sequence.device_nanoseconds / 1e9
        tokenizer.work(self._costs.output_token, lambda: self._deliver(answer, tokenizer))

    def _deliver(self, answer: Answer, tokenizer: Tokenizer) -> None:
        tokenizer.load -= 1
        answer.times.append(self.clock.now + self._costs.hop)
        if len(answer.times) == answer.request.output_tokens:
            self.clock.at(answer.times[-1], self.ended)


def _generation(request: Request, own: int) -> EngineRequest:
    """A request whose prompt has only its conversation's shared tokens in common with others."""
    rest = request.prompt_tokens - request.shared_tokens
    prompt = (-1 - request.conversation,) * request.shared_tokens + (own,) * rest
    return EngineRequest(prompt, request.output_tokens, SamplingParams(temperature=0))


def simulate(requests: Sequence[Request], cluster: Cluster, policy: str = "round-robin") -> Result:
    """Replays a trace. `policy` is one of POLICIES."""
    simulation = _Simulation(cluster, policy)
    answers = [Answer(request) for request in requests]
    for answer in answers:
        simulation.send(answer)
    return _result(simulation, answers)


def simulate_clients(requests: Sequence[Request], clients: int, cluster: Cluster) -> Result:
    """A closed loop: each client sends the next request when its last one is answered, ignoring the
    arrival times in the trace."""
    simulation = _Simulation(cluster, "prefix-affine")
    answers = [Answer(request) for request in requests]
    unsent = iter(answers)

    def send_next() -> None:
        for answer in itertools.islice(unsent, 1):
            answer.request = replace(answer.request, arrival=simulation.clock.now)
            simulation.send(answer)

    simulation.ended = send_next
    for _ in range(clients):
        send_next()
    return _result(simulation, answers)


def _result(simulation: _Simulation, answers: Sequence[Answer]) -> Result:
    simulation.clock.run()
    return Result(answers, [generator.busy_seconds for generator in simulation.generators])
