"""How many threads and slots the host allows, and what a model says about its own sampling."""

import dataclasses
from pathlib import Path

import pytest

from generator_svc.default_sampling import default_sampling
from generator_svc.memory_plan import (
    MemoryPlan,
    MemoryPlanError,
    host_cache_bytes,
    plan_memory,
    plan_threads,
)
from generator_svc.sequence import SamplingParams
from trivium.host_limits import MemoryLimit
from trivium.model_directory import GraphNames, ModelDirectory, ModelDirectoryError

# 2 · 2 layers · 3 heads · 4 · 4 bytes
TOKEN_BYTES = 192


def _model(context_length=100, **generation_config):
    return ModelDirectory(
        path=Path("/models/m"),
        id="m",
        revision="0" * 32,
        graph=Path("/models/m/model.onnx"),
        weights=(),
        num_layers=2,
        num_kv_heads=3,
        head_size=4,
        context_length=context_length,
        vocab_size=50,
        eos_token_ids=(1,),
        family="llama",
        precision="fp32",
        names=GraphNames(),
        generation_config=generation_config,
        manifest={},
    )


@pytest.mark.parametrize(
    ("slots", "max_length", "cache_bytes", "expected"),
    [
        (4, 4096, 10**9, MemoryPlan(4, 96)),  # 100 rounded down to eights
        (4, 50, 10**9, MemoryPlan(4, 48)),
        (4, 16, 3 * 16 * TOKEN_BYTES, MemoryPlan(3, 16)),
        (4, 16, 3 * 16 * TOKEN_BYTES - 1, MemoryPlan(2, 16)),
        (4, 16, 16 * TOKEN_BYTES, MemoryPlan(1, 16)),
    ],
)
def test_slots_are_what_fits(slots, max_length, cache_bytes, expected):
    """As many as asked for if memory holds them; lengths up to setting and context."""

    assert expected == plan_memory(_model(), slots, max_length, cache_bytes, 4)


def test_half_the_element_size_is_twice_the_slots():
    """The bytes of an element count."""

    assert 4 == plan_memory(_model(), 99, 16, 2 * 16 * TOKEN_BYTES, 2).slots


def test_memory_for_less_than_one_slot_is_refused_with_the_numbers():
    """The message says what a slot takes, what there is, and what to change."""
    with pytest.raises(MemoryPlanError) as caught:
        plan_memory(_model(), 4, 16, 16 * TOKEN_BYTES - 1, 4)

    for part in ("16 tokens", "3072 bytes", "3071", "kv_cache_bytes", "max_sequence_length"):
        assert part in str(caught.value)


def test_a_context_below_the_granularity_is_refused():
    """Not a division by zero."""
    with pytest.raises(MemoryPlanError, match="context"):
        plan_memory(_model(context_length=7), 4, 16, 10**9, 4)


MIB = 2**20


@pytest.mark.parametrize(
    ("cores", "weight_mib", "threads"),
    [(1, 139, 1), (8, 139, 8), (64, 139, 16), (64, 2330, 36), (64, 8000, 64), (4, 8000, 4)],
)
def test_small_models_do_not_take_all_cores(cores, weight_mib, threads):
    """Up to 16 always; beyond, a thread for each 64 MiB of weights."""

    assert threads == plan_threads(cores, weight_mib * MIB)


@pytest.fixture
def heavy(tmp_path):
    """A model with 100 MiB of weights, all of them holes."""
    graph, weights = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    for file, size in ((graph, 0), (weights, 100 * MIB)):
        with file.open("wb") as opened:
            opened.truncate(size)
    return dataclasses.replace(
        _model(context_length=8192), graph=graph, weights=(weights,), num_layers=20, head_size=64
    )


SLOT = 2 * 20 * 3 * 64 * 4 * 4096  # 120 MiB


def _free(mib):
    return MemoryLimit(512 * MIB, mib * MIB, "memory limit in /sys/fs/cgroup")


def test_the_cache_takes_a_share_of_what_weights_leave(heavy):
    """Weights and working memory come first."""
    share = host_cache_bytes(heavy, _free(1000), 4096, 4, 0.5)

    assert 120 * MIB == SLOT
    assert (1000 - 100) * MIB / 2 > share > (1000 - 100 - 400) * MIB / 2


def test_one_slot_may_take_more_than_the_share(heavy):
    """Where memory is short, one sequence at a time is better than none."""

    assert SLOT == host_cache_bytes(heavy, _free(500), 4096, 4, 0.5)


@pytest.mark.parametrize("wanted", [0, 10**9])
def test_too_little_memory_for_one_slot_is_refused(heavy, wanted):
    """With what is needed, what there is, who says so, and what one can do; in one line."""
    with pytest.raises(MemoryPlanError) as caught:
        host_cache_bytes(heavy, _free(420), 4096, 4, 0.5, wanted)

    told = str(caught.value)
    for part in ("512 MiB (memory limit in /sys/fs/cgroup)", "420 MiB are free", "100 MiB for we"):
        assert part in told
    assert "\n" not in told
    fitting = int(told.rpartition("MAX_SEQUENCE_LENGTH to ")[2].split()[0])
    assert SLOT > host_cache_bytes(heavy, _free(420), fitting, 4, 1.0) > 0
    with pytest.raises(MemoryPlanError):
        host_cache_bytes(heavy, _free(420), fitting + 8, 4, 1.0)


def test_shorter_sequences_are_no_advice_where_nothing_fits(heavy):
    """The weights alone are too much: only memory helps."""
    with pytest.raises(MemoryPlanError, match=r"allow \d+ MiB more$"):
        host_cache_bytes(heavy, _free(120), 4096, 4, 0.5)


def test_a_cache_beyond_the_memory_is_warned_of(heavy, caplog):
    """It is the operator's own word, and counts; the log says what may come of it."""
    small = host_cache_bytes(heavy, _free(1000), 4096, 4, 0.5, 200 * MIB)
    assert (200 * MIB, []) == (small, caplog.messages)

    assert 900 * MIB == host_cache_bytes(heavy, _free(1000), 4096, 4, 0.5, 900 * MIB)
    assert "TRIVIUM_GENERATOR_KV_CACHE_BYTES allows 900 MiB" in caplog.text
    assert "memory limit in /sys/fs/cgroup" in caplog.text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams()),
        ({"do_sample": True}, SamplingParams()),
        ({"do_sample": False}, SamplingParams(temperature=0.0)),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0.0)),
        ({"temperature": 0.6, "top_k": 20}, SamplingParams(temperature=0.6, top_k=20)),
        ({"top_p": 0.8, "min_p": 0.05}, SamplingParams(top_p=0.8, min_p=0.05)),
        ({"repetition_penalty": 1.05, "top_p": None}, SamplingParams(repetition_penalty=1.05)),
        ({"top_k": 50, "temperature": 1}, SamplingParams(top_k=50)),
        ({"eos_token_id": 2, "frequency_penalty": 9}, SamplingParams()),
    ],
)
def test_defaults_are_the_models_own_and_then_openais(config, expected):
    """generation_config.json fills in what a request leaves open."""

    assert expected == default_sampling(_model(**config))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "0.7"),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 50.5),
        ("top_k", float("inf")),
        ("min_p", [0.1]),
        ("repetition_penalty", 0),
        ("repetition_penalty", 11),
    ],
)
def test_defaults_that_no_request_could_have_are_refused(name, value):
    """One line that names folder, file, field and value."""
    with pytest.raises(ModelDirectoryError) as caught:
        default_sampling(_model(**{name: value}))

    for part in ("/models/m", "generation_config.json", name, repr(value)):
        assert part in str(caught.value)


def test_a_whole_number_written_as_a_decimal_is_whole():
    """Some files say top_k 50.0."""

    assert isinstance(default_sampling(_model(top_k=50.0)).top_k, int)
