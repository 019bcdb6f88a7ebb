"""Three generators, two tokenizers, two facades: `python -m bench.replicas`.

    split     1,000 requests of mixed length, distributed by the tokenizers, and by an oracle that
              knows all lengths; each compared with a perfect split of the generators' busy time
    join      a third generator appears in DNS under load: when it is first called, and its share
    freeze    a generator is stopped (SIGSTOP) under load: what is lost, and when the last call ends
    kill      the same with kill -9

The generators are bench.paced_generator, so that three of them on few cores are as fast as three
machines; everything else is as deployed. `split` exits with 1 if the bound is exceeded.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.paced_generator import step_seconds
from bench.trace import Lengths
from tests.rollout.fleet import FACADE, GENERATOR, TOKENIZER, Fleet
from tests.tiny_models import tiny_model_directory
from trivium.cli.answer import AnswerFailed
from trivium.cli.http_stream import read_answer
from trivium.cli.load import Client, Target

GENERATORS = ("127.0.0.32", "127.0.0.33", "127.0.0.34")
STAGE_HOSTS = ("127.0.0.32", "127.0.0.33")  # of tokenizers and of facades
# Each a facade, a tokenizer and a generator that know about no others.
LANES = tuple(zip(("127.0.0.42", "127.0.0.43", "127.0.0.44"), GENERATORS, strict=True))
SLOTS = 16
BOUND = 1.1  # for `split`, relative to a perfect split
WORDS = ("the", "of", "a", "river", "house", "man", "told", "stories", "ships", "kings", "clouds")
LOOK_SECONDS = 0.02
ON_THE_WAY_SECONDS = (
    0.5  # for what a generator sent before it was lost to arrive, on a busy machine
)


@dataclass(frozen=True)
class Work:
    """A request: its number of words, some of which take several tokens, and of output tokens."""

    words: int
    output_tokens: int

    @property
    def seconds(self) -> float:
        """About how much time it adds on a generator whose slots are all in use."""
        a_row = step_seconds(SLOTS, 0) / SLOTS
        return a_row * self.output_tokens + step_seconds(0, self.words) - step_seconds(0, 0)


@dataclass(frozen=True)
class Done:
    """The outcome of a request; times are in seconds on one clock, `first` is that of the first
    text, and `fault` is empty on success."""

    began: float
    ended: float
    first: float | None
    fault: str


@dataclass
class Clients:
    """Clients that each send one request after the other; `done` has those that have ended."""

    targets: Sequence[Target]
    done: list[Done] = field(default_factory=list)

    async def one(self, number: int, works: Iterator[Work]) -> None:
        """Runs one client until `works` is exhausted."""
        target = self.targets[number % len(self.targets)]
        client, words = Client(target), random.Random(number)
        for work in works:
            prompt = " ".join(words.choices(WORDS, k=work.words))
            body = target.body([{"role": "user", "content": prompt}], work.output_tokens)
            began = time.perf_counter()
            pieces = await client.send(target.request(body))
            fault = ""
            try:
                read_answer(began, pieces)
            except AnswerFailed as failed:
                fault = str(failed)
            first = next((when for when, piece in pieces if b'"content"' in piece), None)
            self.done.append(Done(began, time.perf_counter(), first, fault))
        client.close()

    async def play(self, clients: int, works: Iterator[Work]) -> None:
        """Runs all clients until the work is done."""
        await asyncio.gather(*(self.one(number, works) for number in range(clients)))


@dataclass(frozen=True)
class Split:
    """Seconds that all requests took together, and that each generator was busy."""

    seconds: float
    busy: Sequence[float]
    faults: int

    @property
    def ratio(self) -> float:
        """The time relative to a perfect split, with all generators always busy."""
        return self.seconds / statistics.fmean(self.busy)


class Cluster:
    """The fleet, with what the scenarios need."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.targets = [self._target(host) for host in STAGE_HOSTS]
        self.lanes = [self._target(host) for host, _ in LANES]

    def _target(self, host: str) -> Target:
        return Target(f"{self.fleet.url(host)}/v1", self.fleet.model.name)

    async def start(self) -> None:
        fleet = self.fleet
        fleet.publish(TOKENIZER, *STAGE_HOSTS)
        fleet.publish(GENERATOR, *GENERATORS)
        await fleet.start(GENERATOR, *GENERATORS, TRIVIUM_GENERATOR_SLOTS=SLOTS)
        await fleet.start(TOKENIZER, *STAGE_HOSTS)
        await fleet.start(FACADE, *STAGE_HOSTS)
        for host, generator in LANES:
            target = f"{generator}:{fleet.ports.generator}"
            await fleet.start(TOKENIZER, host, TRIVIUM_TOKENIZER_GENERATOR_TARGET=target)
            target = f"{host}:{fleet.ports.tokenizer}"
            await fleet.start(FACADE, host, TRIVIUM_FACADE_TOKENIZER_TARGET=target)
        await self.until_known(GENERATORS)

    async def until_known(self, generators: Sequence[str]) -> None:
        """Returns when all tokenizers know exactly these generators."""

        async def known() -> bool:
            found = [await self.fleet.callees(TOKENIZER, host) for host in STAGE_HOSTS]
            return found == [set(generators)] * len(found)

        await until(known)

    async def metric(self, name: str, host: str) -> float:
        """A metric of a generator, summed over its labels."""
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"http://{host}:{self.fleet.ports.generator_metrics}/metrics"
            text = (await client.get(url)).text
        return sum(map(float, re.findall(rf"^{name}\{{.*\}} ([0-9.e+]+)$", text, re.M)))

    async def busy(self) -> list[float]:
        """Seconds that each generator has been busy so far."""
        name = "trivium_device_busy_nanoseconds_total"
        return [await self.metric(name, host) / 1e9 for host in GENERATORS]

    async def tokens(self) -> list[float]:
        """Output tokens of each generator so far."""
        return [await self.fleet.tokens(GENERATOR, host) for host in GENERATORS]

    @contextlib.asynccontextmanager
    async def loaded(self, clients: int) -> AsyncIterator[Clients]:
        """Clients that send requests of mixed length while the block runs."""
        load = Clients(self.targets)
        is_over = False

        def works() -> Iterator[Work]:
            for work in draw(10**6):
                if is_over:
                    return
                yield work

        playing = asyncio.create_task(load.play(clients, works()))
        try:
            await asyncio.sleep(3)
            yield load
        finally:
            is_over = True
            await playing


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Returns when `holds` does; raises TimeoutError after a minute."""
    async with asyncio.timeout(60):
        while True:
            if await holds():
                return
            await asyncio.sleep(LOOK_SECONDS)


def draw(count: int, seed: int = 0) -> Iterator[Work]:
    """Requests of lognormal lengths: most are short, some five times as long."""
    generator = random.Random(seed)
    prompt, output = Lengths(40, 0.8, most=200), Lengths(24, 0.8, most=150)
    for _ in range(count):
        yield Work(prompt.draw(generator), output.draw(generator))


def lanes(works: Sequence[Work], count: int) -> list[list[Work]]:
    """Divides the requests into equal shares: longest first, each to the smallest share so far
    (Graham 1969)."""
    shares: list[list[Work]] = [[] for _ in range(count)]
    sums = [0.0] * count
    for work in sorted(works, key=lambda work: -work.seconds):
        least = sums.index(min(sums))
        shares[least].append(work)
        sums[least] += work.seconds
    return shares


async def split(cluster: Cluster, requests: int, clients: int) -> tuple[Split, Split]:
    """The results with the tokenizers' split, and with the oracle's."""

    async def timed(plays: Sequence[tuple[Clients, int, list[Work]]]) -> Split:
        before, began = await cluster.busy(), time.perf_counter()
        await asyncio.gather(*(one.play(count, iter(works)) for one, count, works in plays))
        seconds = time.perf_counter() - began
        after = await cluster.busy()
        busy = [now - then for now, then in zip(after, before, strict=True)]
        faults = sum(bool(done.fault) for one, _, _ in plays for done in one.done)
        return Split(seconds, busy, faults)

    works = list(draw(requests))
    ours = await timed([(Clients(cluster.targets), clients, works)])
    pairs = zip(cluster.lanes, lanes(works, len(LANES)), strict=True)
    oracle = await timed([(Clients([lane]), clients // 3, share) for lane, share in pairs])
    return ours, oracle


@dataclass(frozen=True)
class Join:
    """Seconds from the new generator's address being in DNS to its first token, and its share of
    all tokens in the five seconds that begin two seconds after that."""

    seconds: float
    share: float
    faults: int


async def join(cluster: Cluster, clients: int) -> Join:
    """Adds the third generator, which is already running, to DNS."""
    *old, new = GENERATORS
    cluster.fleet.publish(GENERATOR, *old)
    await cluster.until_known(old)
    async with cluster.loaded(clients) as load:
        before = await cluster.fleet.tokens(GENERATOR, new)

        async def called() -> bool:
            return await cluster.fleet.tokens(GENERATOR, new) > before

        cluster.fleet.publish(GENERATOR, *GENERATORS)
        published = time.perf_counter()
        await until(called)
        seconds = time.perf_counter() - published
        await asyncio.sleep(max(published + 2 - time.perf_counter(), 0))
        then = await cluster.tokens()
        await asyncio.sleep(5)
        tokens = [now - was for now, was in zip(await cluster.tokens(), then, strict=True)]
    return Join(seconds, tokens[-1] / sum(tokens), sum(bool(done.fault) for done in load.done))


@dataclass(frozen=True)
class Loss:
    """`held` calls were on the generator just before it was lost. Of the requests that failed,
    `failed` had first text by then and `others` had not; the last failed `seconds` after the loss.
    `slowest` is the longest TTFT, in seconds, of the successful ones without text by then."""

    held: int
    failed: int
    others: int
    seconds: float
    slowest: float
    requests: int


async def lose(cluster: Cluster, clients: int, number: signal.Signals) -> Loss:
    """The last generator stops silently, and stays so for 12 s."""
    host = GENERATORS[-1]
    async with cluster.loaded(clients) as load:
        held = await cluster.metric("vllm:num_requests_(?:running|waiting)", host)
        lost = time.perf_counter()
        cluster.fleet.signal(GENERATOR, host, number)
        await asyncio.sleep(12)
    await cluster.fleet.kill(GENERATOR, host)
    await cluster.fleet.start(GENERATOR, host, TRIVIUM_GENERATOR_SLOTS=SLOTS)
    await cluster.until_known(GENERATORS)

    def had_begun(done: Done) -> bool:
        return done.first is not None and done.first < lost + ON_THE_WAY_SECONDS

    later = [done for done in load.done if done.ended > lost]
    faults = [done for done in later if done.fault]
    return Loss(
        held=round(held),
        failed=sum(map(had_begun, faults)),
        others=sum(not had_begun(done) for done in faults),
        seconds=max((done.ended for done in faults), default=lost) - lost,
        slowest=max(
            done.first - done.began
            for done in later
            if not done.fault and done.first is not None and not had_begun(done)
        ),
        requests=len(later),
    )


async def measure(options: argparse.Namespace) -> int:
    """Prints results as they are ready; returns the exit status."""
    status = 0
    with (
        tempfile.TemporaryDirectory() as logs,
        Fleet(tiny_model_directory(), Path(logs), {GENERATOR: "bench.paced_generator"}) as fleet,
    ):
        cluster = Cluster(fleet)
        await cluster.start()
        scenarios = options.scenarios.split(",")
        if "split" in scenarios:
            for name, found in zip(
                ("tokenizers", "oracle"),
                await split(cluster, options.requests, options.clients),
                strict=True,
            ):
                busy = ", ".join(f"{seconds:.1f}" for seconds in found.busy)
                print(
                    f"split by {name}: {found.seconds:.1f} s, generators busy {busy} s: "
                    f"{found.ratio:.3f} times a perfect split; {found.faults} faults",
                    flush=True,
                )
                if name == "tokenizers":
                    status = int(found.ratio > BOUND or found.faults > 0)
        if "join" in scenarios:
            joined = await join(cluster, options.clients)
            print(
                f"join: first token after {joined.seconds:.2f} s, then {joined.share:.0%} of all "
                f"tokens; {joined.faults} faults",
                flush=True,
            )
        for name, number in (("freeze", signal.SIGSTOP), ("kill", signal.SIGKILL)):
            if name in scenarios:
                loss = await lose(cluster, options.clients, number)
                print(
                    f"{name}: it had {loss.held} calls in flight; of {loss.requests} requests, "
                    f"{loss.failed} that had started and {loss.others} that had not failed, the "
                    f"last after {loss.seconds:.1f} s; the others had their first text within "
                    f"{loss.slowest:.1f} s",
                    flush=True,
                )
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenarios", default="split,join,freeze,kill")
    parser.add_argument("--requests", type=int, default=1000, help="number of requests in `split`")
    parser.add_argument(
        "--clients", type=int, default=36, help="number of concurrent clients; a multiple of 6"
    )
    sys.exit(asyncio.run(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
