"""The generator's service over real gRPC, with an engine on a scripted runner."""

import asyncio
import contextlib
import time
from pathlib import Path

import numpy as np
import prometheus_client
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from generator_svc.admission import Admission
from generator_svc.constraint.compiler import ConstraintCompiler
from generator_svc.convert import Limits
from generator_svc.delivery import UpdateDispatcher
from generator_svc.engine import Engine
from generator_svc.kv_cache import SlotCache
from generator_svc.metering import Meter
from generator_svc.metrics import EngineCollector, RequestMetrics
from generator_svc.scheduler import Scheduler
from generator_svc.sequence import SamplingParams
from generator_svc.service import GeneratorService
from generator_svc.usage import UsageMetrics, UsageRecorder
from tests.fakes import EOS, VOCABULARY, FixedPrefillCost, ScriptedRunner, scripted_logits
from trivium.generator.v1 import generator_pb2 as pb
from trivium.generator.v1 import generator_pb2_grpc as pb_grpc
from trivium.usage_log import UsageLog
from trivium.wire.channel import open_channel
from trivium.wire.in_flight import InFlight
from trivium.wire.serving import GrpcServer

SERVICE = "trivium.generator.v1.GeneratorService"
REVISION = "r1"
PATIENCE_SECONDS = 30


class SlowRunner(ScriptedRunner):
    """Waits `delay` seconds before each step, so that tests can act on calls in flight."""

    delay = 0.0

    def run(self, plan):
        time.sleep(self.delay)
        return super().run(plan)


class Stage:
    """A generator stage and a client for it."""

    def __init__(
        self,
        slots=4,
        slot_length=64,
        logits=scripted_logits,
        tokenizer=None,
        cost=None,
        max_messages_per_second=600,
        max_interval_seconds=0.1,
        usage_log=None,
        **queue,
    ):
        vocabulary = len(logits([2]))
        eos = tokenizer.eos if tokenizer else EOS
        self.tokenizer = tokenizer
        self.constraints = ConstraintCompiler(
            tokenizer.file if tokenizer else Path("none"), vocabulary, (eos,), 2**20
        )
        self.runner = SlowRunner(slots, slot_length, logits)
        self.meter = Meter()
        self.registry = CollectorRegistry()
        cache = SlotCache(slots, slot_length)
        self.engine = Engine(
            Scheduler(cache, cost or FixedPrefillCost(8), 1, 16, self.meter.settle),
            self.runner,
            self.meter,
            Admission(queue.get("requests", 100), queue.get("tokens", 100_000)),
            UpdateDispatcher(
                asyncio.get_running_loop(), max_messages_per_second, max_interval_seconds
            ).deliver,
            lambda fault: None,
        )
        engine = self.engine
        self.registry.register(EngineCollector(engine.load, engine.cache_usage, self.meter, "m"))
        self.in_flight = InFlight()
        self.usage = UsageRecorder(
            UsageLog(usage_log and str(usage_log), "generator", 2**20, 2),
            UsageMetrics(self.registry, "m"),
            "m",
        )
        self.service = GeneratorService(
            self.engine,
            Limits(
                REVISION, vocabulary, slot_length, 8, (eos,), SamplingParams(temperature=0), True
            ),
            pb.GetModelInfoResponse(id="m", revision=REVISION, slots=slots),
            RequestMetrics(self.registry, "m"),
            self.constraints,
            self.in_flight.draining,
            self.usage,
        )

    @contextlib.asynccontextmanager
    async def running(self):
        """Serves, then checks that nothing is still held."""
        add = pb_grpc.add_GeneratorServiceServicer_to_server
        server = GrpcServer(
            [(add, self.service)],
            [SERVICE],
            in_flight=self.in_flight,
            refused=self.service.refused,
        )
        self.port = await server.start("127.0.0.1:0")
        self.engine.start()
        server.set_serving(True)
        async with (
            self.constraints if self.tokenizer else contextlib.nullcontext(),
            open_channel(f"127.0.0.1:{self.port}") as channel,
        ):
            self.channel = channel
            self.stub = pb_grpc.GeneratorServiceStub(channel)
            try:
                yield self
                await self.until_free()
            finally:
                self.runner.delay = 0.0
                await server.drain(0, 0)
                self.engine.close()
                self.usage.close()
        self.engine.check_integrity()

    async def call(self, prompt, half_close=True, seconds=None, **fields):
        """Starts a call and sends its first message."""
        call = self.stub.Generate(timeout=seconds)
        start = pb.StartGeneration(revision=REVISION, prompt_token_ids=prompt)
        start.MergeFrom(pb.StartGeneration(**fields))
        await call.write(pb.GenerateRequest(start=start))
        if half_close:
            await call.done_writing()
        return call

    async def generate(self, prompt, **fields):
        """Runs a call to its end; tokens by index, and finishes by index."""
        return collected([message async for message in await self.call(prompt, **fields)])

    async def until(self, condition):
        """Waits until the load satisfies `condition`."""
        await until_load(self.stub, condition)

    async def until_free(self):
        """Waits until nothing is running or waiting and every slot is free."""
        free = pb.WatchLoadResponse(free_slots=len(self.runner.memory))
        await self.until(lambda load: load == free)

    def metric(self, name, **labels):
        """A metric's value as /metrics shows it, summed over the labels not in `labels`."""
        text = prometheus_client.generate_latest(self.registry).decode()
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        values = [
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert values, f"there is no metric {name} with {labels}"
        return sum(values)


async def until_load(stub, condition=lambda load: True):
    """The first reported load that satisfies `condition`."""
    watch = stub.WatchLoad(pb.WatchLoadRequest(min_interval_milliseconds=10))
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for load in watch:
                if condition(load):
                    return load
    finally:
        watch.cancel()
    raise AssertionError("the reports ended")


def collected(messages):
    """The tokens by index and finishes by index in a call's messages."""
    tokens, finished = {}, {}
    for message in messages:
        for update in message.updates:
            assert update.index not in finished, "an update after the final one"
            tokens.setdefault(update.index, []).extend(update.token_ids)
            if update.HasField("finished"):
                finished[update.index] = update.finished
    return tokens, finished


def by_last_token(context):
    """Cheap logits for long answers; token 1, the EOS, is never chosen."""
    logits = np.zeros(VOCABULARY, np.float32)
    logits[2 + (context[-1] * 5 + 3) % (VOCABULARY - 2)] = 9.0
    return logits


def long_answer(first, count):
    """The answer that `by_last_token` gives to a prompt that ends with `first`."""
    tokens = [first]
    for _ in range(count):
        tokens.append(2 + (tokens[-1] * 5 + 3) % (VOCABULARY - 2))
    return tokens[1:]
