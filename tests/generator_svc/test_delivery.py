"""When tokens leave the generator: the dispatcher in virtual time, then over real gRPC."""

import asyncio
import itertools
import selectors
from dataclasses import dataclass, field

import pytest
from prometheus_client.registry import CollectorRegistry

from generator_svc.admission import Admission
from generator_svc.delivery import UpdateDispatcher, UpdateQueue
from generator_svc.metrics import RequestMetrics
from generator_svc.sequence import EngineRequest, SampledToken, SequenceGroup, SequenceUpdate
from tests.generator_svc.generator_stage import Stage, by_last_token, collected, long_answer

RATE, MAX_INTERVAL = 1000, 0.1


class _Jump(selectors.DefaultSelector):
    """Advances the clock instead of waiting."""

    now = 0.0

    def select(self, timeout=None):
        self.now += timeout or 0.0
        return super().select(0 if timeout is not None else None)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop in virtual time: waiting takes no real time, and nothing else takes virtual time."""

    def __init__(self):
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self):
        return self._jump.now


@dataclass
class Message:
    time: float
    tokens: list[int]
    is_last: bool


@dataclass
class Call:
    """A call with one sequence; records its messages and when each token was sampled."""

    metrics: RequestMetrics
    messages: list[Message] = field(default_factory=list)
    arose: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.queue = UpdateQueue(self.metrics)
        request = EngineRequest(prompt=(1,), max_new_tokens=10**6)
        self.group = SequenceGroup(request, Admission(10, 10).enter(1), self.queue)

    async def read(self):
        while not self.messages or not self.messages[-1].is_last:
            updates = await self.queue.take()
            tokens = [update.token.token_id for update in updates]
            now = asyncio.get_running_loop().time()
            self.messages.append(Message(now, tokens, updates[-1].is_finished))

    def next(self, is_last):
        self.arose.append(asyncio.get_running_loop().time())
        count = len(self.arose)
        token = SampledToken(count - 1)
        [sequence] = self.group.sequences
        return SequenceUpdate(self.group, sequence, token, is_last, is_urgent=is_last or count == 1)

    def check(self):
        """Every token arrived once and in order, the first and the last one at once."""
        assert list(range(len(self.arose))) == [t for m in self.messages for t in m.tokens]
        assert [0] == self.messages[0].tokens
        assert (self.arose[0], self.arose[-1]) == (self.messages[0].time, self.messages[-1].time)

    @property
    def waits(self):
        """How long each token waited."""
        return [m.time - self.arose[token] for m in self.messages for token in m.tokens]

    @property
    def intervals(self):
        times = [message.time for message in self.messages[1:-1]]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


def play(streams, steps, step_seconds, rate=RATE, max_interval=MAX_INTERVAL, whole=False):
    """Runs this many calls, each of which gets a token in every step."""

    async def run():
        metrics = RequestMetrics(CollectorRegistry(), "m")
        dispatcher = UpdateDispatcher(asyncio.get_running_loop(), rate, max_interval)
        calls = [Call(metrics) for _ in range(streams)]
        for call in calls:
            call.queue.is_whole = whole
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(call.read())
            for step in range(steps):
                dispatcher.deliver([call.next(step == steps - 1) for call in calls])
                await asyncio.sleep(step_seconds)
        return calls

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        calls = runner.run(run())
    for call in calls:
        call.check()
    return calls


@pytest.mark.parametrize(("streams", "step_ms"), [(1, 2), (8, 15), (32, 45), (64, 70)])
def test_few_messages_are_sent_immediately(streams, step_ms):
    """Below the rate every token is a message of its own, and none of them waits."""
    for call in play(streams, 50, step_ms / 1000):
        assert 50 == len(call.messages)
        assert {0.0} == set(call.waits)


@pytest.mark.parametrize("streams", [8, 32, 64])
def test_the_interval_grows_with_the_number_of_streams(streams):
    """Above the rate a stream's tokens are merged, so that the process sends about that many."""
    calls = play(streams, 2000, 0.001)
    seconds = calls[0].arose[-1] - calls[0].arose[0]
    messages = sum(len(call.messages) for call in calls)

    assert messages / seconds == pytest.approx(RATE, rel=0.1)
    for call in calls:
        assert call.intervals == pytest.approx([streams / RATE] * len(call.intervals), abs=0.0011)
        assert max(call.waits) <= streams / RATE + 1e-9


@pytest.mark.parametrize("step_ms", [1, 30])
def test_the_interval_never_exceeds_its_bound(step_ms):
    """No token waits longer, however many streams there are."""
    for call in play(500, 40, step_ms / 1000):
        assert max(call.waits) <= MAX_INTERVAL + 1e-9
        assert max(call.intervals, default=0) <= MAX_INTERVAL + step_ms / 1000 + 1e-9


def test_a_bound_of_zero_merges_nothing():
    """Every token is a message, whatever the rate."""
    for call in play(64, 30, 0.001, max_interval=0):
        assert 30 == len(call.messages)


@pytest.mark.parametrize("streams", [1, 8])
def test_unstreamed_answers_come_in_large_messages(streams):
    """The first token, then 256 at a time, and the rest at the end."""
    for call in play(streams, 600, 0.015, whole=True):
        assert [1, 256, 256, 87] == [len(message.tokens) for message in call.messages]


def test_a_held_token_does_not_wait_for_another():
    """If a stream gets no more tokens for a while, those held back are sent."""

    async def run():
        metrics = RequestMetrics(CollectorRegistry(), "m")
        loop = asyncio.get_running_loop()
        dispatcher = UpdateDispatcher(loop, RATE, MAX_INTERVAL)
        calls = [Call(metrics) for _ in range(50)]
        readers = [asyncio.create_task(call.read()) for call in calls]
        for _ in range(3):
            dispatcher.deliver([call.next(is_last=False) for call in calls])
            await asyncio.sleep(0.001)
        await asyncio.sleep(60)
        assert {(0, 1, 2)} == {tuple(t for m in c.messages for t in m.tokens) for c in calls}
        assert 0.05 >= max(wait for call in calls for wait in call.waits)
        for reader in readers:
            reader.cancel()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())


async def test_eight_streams_get_one_message_per_token():
    """Over real gRPC: no two tokens share a message. A busy machine may stall the loop for longer
    than a step, so this only has to hold in one of several attempts."""
    stage = Stage(slots=8, slot_length=256, logits=by_last_token)
    async with stage.running():
        stage.runner.delay = 0.015
        for _ in range(200):
            calls = [
                await stage.call([4, 5 + i], max_new_tokens=6, ignore_eos=True) for i in range(8)
            ]
            messages = await asyncio.gather(*(_read(call) for call in calls))
            if {6} == set(map(len, messages)):
                return
    raise AssertionError("tokens were merged in every attempt")


async def _read(call):
    return [message async for message in call]


async def test_first_and_last_tokens_never_wait():
    """At a rate of almost zero there are two messages: the first token, and the rest at the end."""
    stage = Stage(
        slot_length=512,
        logits=by_last_token,
        max_messages_per_second=1e-9,
        max_interval_seconds=1e9,
    )
    async with stage.running():
        # Uses up the one message that is due at once, unless it ends while the loop is stalled.
        await stage.generate([3], max_new_tokens=200)
        calls = [await stage.call([4, 5 + i], max_new_tokens=200) for i in range(4)]
        answers = await asyncio.gather(*(_read(call) for call in calls))

    for number, messages in enumerate(answers):
        assert 2 == len(messages)
        tokens, finished = collected(messages)
        assert {0: long_answer(5 + number, 200)} == tokens
        assert {0} == finished.keys()


async def test_unstreamed_answer_comes_in_few_messages():
    """Over real gRPC: nothing is lost, and almost nothing is sent before the end."""
    stage = Stage(slot_length=512, logits=by_last_token)
    async with stage.running():
        messages = await _read(await stage.call([4, 5], max_new_tokens=300, whole=True))

    assert len(messages) <= 3
    tokens, finished = collected(messages)
    assert {0: long_answer(5, 300)} == tokens
    assert {0} == finished.keys()


async def test_messages_are_counted_by_their_tokens():
    """The metrics say how many messages there were, and how many tokens were in them."""
    stage = Stage(slot_length=512, logits=by_last_token, max_messages_per_second=1e-9)
    async with stage.running():
        messages = await _read(await stage.call([4, 5], max_new_tokens=200))

    assert len(messages) == stage.metric("trivium_engine_message_tokens_count")
    assert 200 == stage.metric("trivium_engine_message_tokens_sum")


async def test_inter_token_latencies_are_those_of_the_steps():
    """Tokens that are sent together were not sampled together: each took at least a step."""
    stage = Stage(slot_length=64, logits=by_last_token, max_messages_per_second=1e-9)
    async with stage.running():
        stage.runner.delay = 0.003
        messages = await _read(await stage.call([4, 5], max_new_tokens=40))

    name = "trivium_engine_inter_token_latency_seconds"
    assert len(messages) < 39
    assert 39 == stage.metric(f"{name}_count")
    assert 0 == stage.metric(f"{name}_bucket", le="0.002")
