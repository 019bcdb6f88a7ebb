"""The simulator of bench.simulate: queues as in theory, accounting and routing."""

import dataclasses
import itertools
import statistics

import pytest

from bench import step_costs, trace
from bench.planning import Targets, find_replicas, smallest
from bench.replay import STREAMS, on_one_machine
from bench.simulation import (
    POLICIES,
    Clock,
    Cluster,
    Tokenizer,
    TokenizerCosts,
    simulate,
    simulate_clients,
)
from bench.step_costs import StepCosts
from bench.trace import Bursts, Lengths, Request, Workload
from generator_svc.plan import Copy, Swap

# A step takes 10 ms, plus 5 ms per row; a prompt token takes 1 ms.
COSTS = StepCosts(
    rows=(1, 3),
    contexts=(0, 1000),
    decode=((0.015, 0.025), (0.025, 0.055)),
    chunk=(0.01, 0.001, 0.0),
    move=(0.001, 1e-6),
    around_step=0.0,
    around_token=0.0,
)
FREE = TokenizerCosts(0.0, 0.0, 0.0, 0.0)
CLUSTER = Cluster(COSTS, FREE, slots=4, slot_length=512)


def workload(rate: float, **changes: object) -> Workload:
    mixed = Workload(rate, Lengths(40, 0.7, most=300), Lengths(12, 0.7, most=100))
    return dataclasses.replace(mixed, **changes)


def test_one_slot_is_an_md1_queue() -> None:
    """One token per request, so that each is one step of the same length (Pollaczek 1930)."""
    requests = workload(20.0, prompt=Lengths(20), output=Lengths(1)).draw(6000, seed=1)
    service = COSTS.chunk_seconds(20, 0)
    busy = 20.0 * service
    cluster = dataclasses.replace(CLUSTER, slots=1)

    answers = simulate(requests, cluster).served
    waits = [answer.first_token_seconds - service for answer in answers]

    assert len(requests) == len(answers)
    assert min(waits) == pytest.approx(0, abs=1e-6)
    assert service * busy / (2 * (1 - busy)) == pytest.approx(statistics.fmean(waits), rel=0.1)


def test_cuda_costs_use_the_services_cuda_batching() -> None:
    """On CUDA, prompts that wait together share a run even if they have a common prefix, and it
    costs as much as its positions; on the CPU each reuses the prefix and runs on its own."""
    cuda = dataclasses.replace(COSTS, device="cuda")
    requests = [Request(0.0, 30, 1, shared_tokens=20) for _ in range(4)]
    seconds = {
        costs.device: simulate(requests, Cluster(costs, FREE, slots=4, slot_length=512)).seconds
        for costs in (COSTS, cuda)
    }
    alone = COSTS.chunk_seconds(30, 0) + 3 * COSTS.chunk_seconds(10, 20)
    moves = 3 * COSTS.move_seconds(Copy(0, 1, 20))

    assert pytest.approx(COSTS.chunk_seconds(32, 0) + COSTS.chunk_seconds(96, 0)) == seconds["cuda"]
    assert alone <= seconds["cpu"] <= alone + moves


def test_tokenizer_is_an_md1_queue() -> None:
    """Jobs of 20 ms each, 30 per second."""
    clock = Clock()
    tokenizer = Tokenizer(clock)
    waits: list[float] = []

    def arrive() -> None:
        began = clock.now
        tokenizer.work(0.02, lambda: waits.append(clock.now - began - 0.02))

    for request in workload(30.0).draw(10_000, seed=2):
        clock.at(request.arrival, arrive)
    clock.run()

    assert 0.02 * 0.6 / (2 * (1 - 0.6)) == pytest.approx(statistics.fmean(waits), rel=0.1)


def test_a_lone_request_takes_the_sum_of_its_parts() -> None:
    """Hops, tokenizer, prefill, then a decode step at its context for each further token."""
    costs = TokenizerCosts(request=0.5, prompt_token=0.01, output_token=0.1, hop=0.25)
    chunk = COSTS.chunk_seconds(20, 0)
    steps = [COSTS.decode_seconds(1, context) for context in (20, 21)]

    [answer] = simulate(
        [Request(3.0, 20, 3)], dataclasses.replace(CLUSTER, tokenizer_costs=costs)
    ).answers

    first = 3.0 + 0.25 + 0.5 + 0.2 + chunk + 0.1 + 0.25
    # The tokenizer is slower than the steps, so tokens queue in front of it.
    assert [first, first + 0.1, first + 0.2] == pytest.approx(answer.times)
    assert chunk + sum(steps) == pytest.approx(answer.device_seconds)


@pytest.mark.parametrize("clients", [1, 3, 50])
def test_clients_send_their_next_request_after_each_answer(clients: int) -> None:
    """At once, until all requests are sent; each client has at most one in flight."""
    costs = TokenizerCosts(request=0.01, prompt_token=0.0, output_token=0.001, hop=0.005)
    cluster = dataclasses.replace(CLUSTER, tokenizer_costs=costs)
    requests = workload(1.0).draw(40, seed=4)

    answers = simulate_clients(requests, clients, cluster).answers
    began = sorted(answer.request.arrival for answer in answers)
    ended = sorted(answer.times[-1] for answer in answers)

    assert [r.output_tokens for r in requests] == [len(answer.times) for answer in answers]
    assert [0.0] * min(clients, 40) == began[:clients]
    assert ended[: max(0, 40 - clients)] == began[clients:]


def test_refused_clients_retry() -> None:
    """Every request is sent, and either served or refused."""
    requests = [Request(0.0, 300, 1) for _ in range(700)]
    result = simulate_clients(requests, 600, dataclasses.replace(CLUSTER, slots=1))

    assert 0 < len(result.served) < len(requests)
    assert [len(answer.times) for answer in result.answers] == [
        0 if answer.is_refused else 1 for answer in result.answers
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_gets_exactly_its_tokens(policy: str) -> None:
    """And the device time charged is at most the time that the generators were busy."""
    requests = workload(12.0, conversations=5, shared_tokens=16, bursts=Bursts()).draw(150, seed=3)
    cluster = dataclasses.replace(CLUSTER, generators=3, tokenizers=2)

    result = simulate(requests, cluster, policy)

    assert [r.output_tokens for r in requests] == [len(a.times) for a in result.answers]
    assert all(before < after for a in result.answers for before, after in _pairs(a.times))
    paid = sum(answer.device_seconds for answer in result.answers)
    assert paid <= sum(result.generator_seconds) + 1e-6
    assert {0, 1, 2} == {answer.generator for answer in result.answers}


def test_a_full_queue_refuses() -> None:
    """As the service's admission control does; the rest is served."""
    requests = [Request(0.0, 300, 1) for _ in range(600)]
    cluster = dataclasses.replace(CLUSTER, slots=1)

    result = simulate(requests, cluster)

    assert 0 < len(result.served) < len(requests)
    assert not Targets(1e9, 1e9, 95).are_met(result)


def test_affinity_has_more_cache_hits_than_round_robin() -> None:
    """With more conversations than a replica has slots, each keeps those routed back to it."""
    requests = workload(4.0, conversations=8, shared_tokens=64).draw(200, seed=4)
    cluster = dataclasses.replace(CLUSTER, generators=3)

    round_robin, affine = (simulate(requests, cluster, p) for p in ("round-robin", "prefix-affine"))

    assert affine.cached_share > 1.2 * round_robin.cached_share > 0


def test_a_thousand_requests_are_split_almost_perfectly() -> None:
    """Though output lengths are unknown, three generators finish within 1.1 times their mean busy
    time; round-robin takes longer."""
    lengths = Lengths(40, 1.2, most=400), Lengths(24, 1.2, most=300)
    requests = Workload(35.0, *lengths).draw(1000, seed=0)
    costs = dataclasses.replace(
        COSTS,
        rows=(1, 16),
        decode=((0.031, 0.046), (0.031, 0.046)),
        chunk=(0.0, 0.0005, 0.0),
    )
    cluster = Cluster(costs, generators=3, tokenizers=2, slots=16, slot_length=1024)

    affine, round_robin = (simulate(requests, cluster, p) for p in ("prefix-affine", "round-robin"))

    assert 1000 == len(affine.served)
    assert affine.seconds <= 1.1 * statistics.fmean(affine.generator_seconds)
    assert affine.seconds < 0.95 * round_robin.seconds


@pytest.mark.parametrize("policy", ["round-robin", "least-loaded"])
def test_more_replicas_are_never_slower(policy: str) -> None:
    """On one trace, at the 95th percentile of the time to first token."""
    requests = workload(10.0).draw(150, seed=5)

    times = [
        simulate(requests, dataclasses.replace(CLUSTER, generators=n), policy).first_token(95)
        for n in (1, 2, 4, 8)
    ]

    assert sorted(times, reverse=True) == times


def test_the_plan_is_the_smallest_that_meets_the_targets() -> None:
    """One generator less, or one tokenizer less, does not meet them."""
    requests = workload(10.0).draw(150, seed=6)
    targets = Targets(first_token=0.5, between_tokens=0.2, rank=95)
    costs = TokenizerCosts(output_token=0.012)
    cluster = dataclasses.replace(CLUSTER, tokenizer_costs=costs)

    found = find_replicas(requests, cluster, "least-loaded", targets, most=8)
    assert found.found is not None
    generators, tokenizers = found.found

    assert generators > 1
    assert tokenizers > 1
    assert targets.are_met(found.tried[found.found])
    for fewer in ((generators - 1, 8), (generators, tokenizers - 1)):
        assert not targets.are_met(found.tried[fewer])


def test_smallest_finds_every_number() -> None:
    """By doubling, then bisection; None if it is above the maximum."""
    for most in range(1, 20):
        for wanted in range(1, most + 3):
            found = smallest(most, lambda count, wanted=wanted: count >= wanted)
            assert (wanted if wanted <= most else None) == found


def test_traces_round_trip_through_a_file(tmp_path) -> None:
    """A trace saved as JSON lines loads unchanged."""
    requests = workload(5.0, conversations=3, shared_tokens=8).draw(20, seed=7)

    trace.save(tmp_path / "trace.jsonl", requests)

    assert requests == trace.load(tmp_path / "trace.jsonl")


def test_costs_round_trip_through_a_file(tmp_path) -> None:
    """Costs saved as JSON load unchanged."""
    COSTS.save(tmp_path / "costs.json")

    assert COSTS == step_costs.load(tmp_path / "costs.json")


@pytest.mark.parametrize("bursts", [None, Bursts(peak=4.0, share=0.2, seconds=1.0)])
def test_arrivals_keep_their_mean_rate(bursts: Bursts | None) -> None:
    """The standard deviation of Poisson gaps equals their mean; with bursts it is larger."""
    requests = workload(20.0, bursts=bursts).draw(30_000, seed=8)
    gaps = [after.arrival - before.arrival for before, after in _pairs(requests)]
    variation = statistics.stdev(gaps) / statistics.fmean(gaps)

    assert 1 / 20 == pytest.approx(statistics.fmean(gaps), rel=0.1)
    assert (bursts is None) == (variation == pytest.approx(1.0, rel=0.05))
    assert bursts is None or variation > 1.2


def test_lengths_keep_their_mean_and_spread() -> None:
    """The mean is of tokens, not of their logarithms; the same seed draws the same lengths."""
    load = workload(1.0, prompt=Lengths(100, 0.5), output=Lengths(30))
    requests = load.draw(20_000, seed=9)

    assert 100 == pytest.approx(statistics.fmean(r.prompt_tokens for r in requests), rel=0.02)
    assert {30} == {request.output_tokens for request in requests}
    assert requests[:50] == load.draw(50, seed=9)
    assert requests[:50] != load.draw(50, seed=10)


def test_costs_are_interpolated_linearly() -> None:
    """They are linear between the measured points and beyond them."""
    assert 0.020 == pytest.approx(COSTS.decode_seconds(2, 0))
    assert 0.040 == pytest.approx(COSTS.decode_seconds(3, 500))
    assert 0.030 == pytest.approx(COSTS.decode_seconds(4, 0))
    assert 0.042 == pytest.approx(COSTS.chunk_seconds(32, 100))
    assert 0.0015 == pytest.approx(COSTS.move_seconds(Copy(0, 1, 500)))
    assert 0.0045 == pytest.approx(COSTS.move_seconds(Swap(0, 1, 500)))


def test_costs_are_averaged() -> None:
    """Each time is averaged; the grid stays the same."""
    slow = dataclasses.replace(COSTS, decode=((0.03, 0.05), (0.05, 0.11)), chunk=(0.03, 0.0, 0.0))

    mean = step_costs.mean([COSTS, slow])

    assert 0.03 == pytest.approx(mean.decode_seconds(2, 0))
    assert (0.02, 0.0005, 0.0) == pytest.approx(mean.chunk)
    assert COSTS.rows == mean.rows


def test_costs_on_one_machine_match_observed_streams() -> None:
    """Exact at the observed context, and higher by the same amount at any other."""
    alone = dataclasses.replace(COSTS, around_step=0.001, around_token=0.0001)
    seen = {streams: 0.05 + 0.01 * streams for streams in STREAMS}

    shared = on_one_machine(alone, [seen, {streams: gap + 0.02 for streams, gap in seen.items()}])

    for rows in (*STREAMS, 5):
        more = [
            shared.decode_seconds(rows, at) - alone.decode_seconds(rows, at) for at in (120, 900)
        ]
        assert more[0] == pytest.approx(more[1])
        step = shared.decode_seconds(rows, 120) + shared.around_seconds(rows)
        assert 0.06 + 0.01 * rows == pytest.approx(step)


def _pairs(values: list) -> list[tuple]:
    return list(itertools.pairwise(values))
