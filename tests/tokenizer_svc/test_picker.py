"""Which generator a prompt goes to, by what each was sent before and by how busy it is."""

from collections import Counter

import pytest

from tokenizer_svc.generator.common_prefixes import CommonPrefixes
from tokenizer_svc.generator.load import LoadReport, SentGeneration
from tokenizer_svc.generator.picker import Candidate, GeneratorPicker
from tokenizer_svc.generator.prefix_memory import BLOCK_TOKENS, PrefixMemory, prefixes


def picked(picker: GeneratorPicker, candidates: list[Candidate], prompt: list[int]) -> int:
    """Picks a replica for a prompt whose answer ends at once; returns its number."""
    keys = prefixes(prompt)
    chosen = picker.pick(candidates, keys)
    chosen.memory.add(keys)
    return candidates.index(chosen)


def report(running: int = 0, waiting: int = 0, free: int = 8, tokens: int = 0) -> LoadReport:
    return LoadReport(waiting, running, free, tokens)


def candidates_of(count: int) -> list[Candidate]:
    return [Candidate(f"10.0.0.{number}:50052") for number in range(count)]


def prompt(conversation: int, tokens: int) -> list[int]:
    return [conversation] * tokens


def test_idle_replicas_take_turns() -> None:
    """Prompts too short to be cached are spread evenly instead of all going to the first."""
    picker, candidates = GeneratorPicker(), candidates_of(3)
    counts = Counter(picked(picker, candidates, prompt(n, 15)) for n in range(30))

    assert {0: 10, 1: 10, 2: 10} == counts


def test_new_conversations_are_spread_evenly() -> None:
    """Each conversation has a home, chosen by hash."""
    picker, candidates = GeneratorPicker(), candidates_of(3)
    counts = Counter(picked(picker, candidates, prompt(n, 100)) for n in range(300))

    assert 3 == len(counts)
    assert min(counts.values()) >= 70


@pytest.mark.parametrize("system_tokens", [0, 200])
def test_tokenizers_agree_on_a_conversations_home(system_tokens: int) -> None:
    """A conversation's turns that come through another tokenizer go to the same generator, though
    that tokenizer has never seen it, even if all conversations share a system prompt."""
    system = prompt(-1, system_tokens)
    first, second = ((GeneratorPicker(), candidates_of(3)) for _ in range(2))
    for picker, candidates in (first, second):
        for candidate in candidates:
            candidate.memory.add(prefixes(system))
        picked(picker, candidates, prompt(77, 15))  # so that their round-robin positions differ
    homes = [
        (picked(*first, system + prompt(n, 60)), picked(*second, system + prompt(n, 300)))
        for n in range(50)
    ]

    assert [] == [pair for pair in homes if pair[0] != pair[1]]
    assert 3 == len(set(homes))


def test_a_conversation_stays_on_its_replica() -> None:
    """Each turn begins with the previous one's prompt, and goes where that is cached."""
    picker, candidates = GeneratorPicker(), candidates_of(2)
    homes = [
        {picked(picker, candidates, prompt(conversation, 100 * turn)) for turn in range(1, 5)}
        for conversation in range(6)
    ]

    assert [1] * 6 == [len(home) for home in homes]


def test_a_new_replica_gets_conversations_with_a_common_prefix() -> None:
    """A long system prompt shared by all conversations does not keep them from a generator that
    joins: it is computed there once. Later turns stay where they were."""
    picker, candidates = GeneratorPicker(), candidates_of(2)
    system = prompt(-1, 1_000)
    for number in range(100):
        picked(picker, candidates, system + prompt(number, 100))
    candidates.append(Candidate("10.0.0.99:50052"))
    old = {picked(picker, candidates, system + prompt(number, 200)) for number in range(100)}
    new = Counter(picked(picker, candidates, system + prompt(n, 100)) for n in range(100, 160))

    assert {0, 1} == old
    assert new[2] >= 10


def test_a_prefix_of_some_conversations_stays_on_its_replica() -> None:
    """Each of ten system prompts is cached by one of three generators, not by all."""
    picker, candidates = GeneratorPicker(), candidates_of(3)
    numbers = [(number, number % 10) for number in range(300)]
    homes: dict[int, set[int]] = {}
    for number, of in numbers:
        chosen = picked(picker, candidates, prompt(-1 - of, 1_000) + prompt(number, 100))
        homes.setdefault(of, set()).add(chosen)

    assert [1] * 10 == [len(home) for home in homes.values()]
    assert 1 < len(set.union(*homes.values()))


def test_a_long_conversation_is_not_a_common_prefix() -> None:
    """However many turns it has, it counts as one and stays, even where others are less busy."""
    picker, candidates = GeneratorPicker(), candidates_of(2)
    homes = [picked(picker, candidates, prompt(1, 20 * turn)) for turn in range(10, 200)]
    candidates[homes[0]].load.update(report(running=3))
    homes.append(picked(picker, candidates, prompt(1, 20 * 200)))

    assert 1 == len(set(homes))


def test_old_common_prefixes_are_forgotten() -> None:
    """Only the most recent conversations count."""
    common = CommonPrefixes()
    for number in range(100):
        common.add(prefixes(prompt(-1, 320) + prompt(number, 64)))
    before = common.shared_blocks(prefixes(prompt(-1, 320)), 0.5)
    for number in range(100):
        common.add(prefixes(prompt(number, 400)))

    assert 320 == before * BLOCK_TOKENS
    assert 0 == common.shared_blocks(prefixes(prompt(-1, 320)), 0.0)


def test_the_longest_prefix_wins() -> None:
    """All replicas have the system prompt, but only one has the conversation."""
    picker, candidates = GeneratorPicker(), candidates_of(3)
    system = prompt(1, 320)
    for candidate in candidates:
        candidate.memory.add(prefixes(system))
    candidates[1].memory.add(prefixes(system + prompt(2, 64)))

    assert 1 == picked(picker, candidates, system + prompt(2, 90))


@pytest.mark.parametrize(
    ("cached_tokens", "busier", "stays"),
    [
        (128 * 2, 1, True),
        (128 * 2, 3, False),
        (128 * 100, 3, True),
        (128 * 100, 5, False),  # however long the prefix
        (16, 1, False),
    ],
)
def test_a_cached_prefix_outweighs_limited_load(
    cached_tokens: int, busier: int, stays: bool
) -> None:
    """Each 128 cached tokens are worth one more sequence, up to four."""
    candidates = candidates_of(2)
    candidates[0].memory.add(prefixes(prompt(1, cached_tokens)))
    candidates[0].load.update(report(running=3 + busier, free=8))
    candidates[1].load.update(report(running=3))

    assert (0 if stays else 1) == picked(GeneratorPicker(), candidates, prompt(1, cached_tokens))


def test_a_prefix_is_not_worth_waiting_for_a_slot() -> None:
    """If one replica has no free slot and another has one, the other takes the prompt."""
    candidates = candidates_of(2)
    candidates[0].memory.add(prefixes(prompt(1, 5_000)))
    candidates[0].load.update(report(running=4, free=0))
    candidates[1].load.update(report(running=6, free=2))

    assert 1 == picked(GeneratorPicker(), candidates, prompt(1, 5_000))


@pytest.mark.parametrize(
    ("busy", "idle"),
    [
        (report(running=5, free=3), report(running=4, free=4)),
        (report(waiting=1, running=8, free=0), report(running=8, free=0)),
        (report(running=1, tokens=1_000), report(running=4, free=4)),
        (report(running=2, free=0), report(running=20, free=1)),
    ],
    ids=["sequences", "queue", "waiting prompts", "no slot"],
)
def test_new_prompts_go_to_the_least_loaded_replica(busy: LoadReport, idle: LoadReport) -> None:
    """Reports count running and waiting sequences, tokens of waiting prompts, and free slots."""
    candidates = candidates_of(2)
    candidates[0].load.update(busy)
    candidates[1].load.update(idle)

    assert 1 == picked(GeneratorPicker(), candidates, prompt(1, 15))


def test_calls_since_the_last_report_count() -> None:
    """A burst between two reports is spread as if each call had been reported."""
    picker, candidates = GeneratorPicker(), candidates_of(2)
    for candidate, running in zip(candidates, (0, 4), strict=True):
        candidate.load.update(report(running=running, free=100))
    counts: Counter[int] = Counter()
    for number in range(16):
        chosen = picker.pick(candidates, prefixes(prompt(number, 15)))
        chosen.load.add(SentGeneration(1, 40))
        counts[candidates.index(chosen)] += 1
    for candidate, running in zip(candidates, (10, 11), strict=True):
        candidate.load.update(report(running=running, free=90))  # which has them all

    assert {0: 10, 1: 6} == counts
    assert 0 == picked(picker, candidates, prompt(16, 15))


def test_each_choice_counts() -> None:
    """Eight choices count as eight sequences until they end."""
    candidates = candidates_of(2)
    sent = SentGeneration(8, 10)
    candidates[0].load.add(sent)
    candidates[1].load.add(SentGeneration(1, 10))
    before = picked(GeneratorPicker(), candidates, prompt(1, 10))
    candidates[0].load.remove(sent)
    after = picked(GeneratorPicker(), candidates, prompt(1, 10))

    assert (1, 0) == (before, after)


def test_a_stale_report_hides_no_calls() -> None:
    """Calls count even if a later report, made before they arrived, says that it is idle."""
    candidates = candidates_of(2)
    for candidate, calls in zip(candidates, (3, 2), strict=True):
        for _ in range(calls):
            candidate.load.add(SentGeneration(1, 10))
        candidate.load.update(report())

    assert 1 == picked(GeneratorPicker(), candidates, prompt(1, 10))


def test_replicas_without_load_reports() -> None:
    """Replicas that do not report their load are picked by our own calls."""
    candidates = candidates_of(2)
    candidates[0].load.update(report(running=9, free=0))
    candidates[0].load.update(None)
    candidates[1].load.add(SentGeneration(1, 10))

    assert 0 == picked(GeneratorPicker(), candidates, prompt(1, 10))


def test_known_blocks_are_the_common_whole_blocks() -> None:
    """The number of known blocks is that of a plain comparison of the prompts."""
    sent, memory = list(range(1000)), PrefixMemory()
    memory.add(prefixes(sent))
    for common in (0, 1, 15, 16, 17, 500, 999, 1000):
        asked = sent[:common] + [-1] * 40

        assert common // BLOCK_TOKENS == memory.known_blocks(prefixes(asked))
    assert 0 == memory.known_blocks(prefixes(sent[BLOCK_TOKENS:]))


def test_memory_is_bounded() -> None:
    """The least recently used prompts are forgotten, their ends before their beginnings."""
    memory = PrefixMemory(max_tokens=1600)
    system = prompt(0, 160)
    for number in range(1, 50):
        memory.add(prefixes(system + prompt(number, 640)))
    known = [
        memory.known_blocks(prefixes(system + prompt(number, 640))) for number in (49, 48, 47, 46)
    ]

    assert [800, 800, 320, 160] == [blocks * BLOCK_TOKENS for blocks in known]
