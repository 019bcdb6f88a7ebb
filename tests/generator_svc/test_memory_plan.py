"""How many threads and slots the host allows, and a model's own default sampling parameters."""

import dataclasses
from pathlib import Path

import pytest

from generator_svc.config import GeneratorSettings
from generator_svc.default_sampling import default_sampling
from generator_svc.memory_plan import MemoryPlanError, plan_memory, plan_threads
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


MIB = 2**20


def _free(mib):
    return MemoryLimit(1024 * MIB, mib * MIB, "memory limit in /sys/fs/cgroup")


def _plan(model, free_mib, device="cpu", **settings):
    chosen = GeneratorSettings(model_directory="m", **settings)
    return plan_memory(device, chosen, model, _free(free_mib))


@pytest.fixture(autouse=True)
def no_settings_from_the_shell(monkeypatch):
    for name in GeneratorSettings.model_fields:
        monkeypatch.delenv(f"TRIVIUM_GENERATOR_{name}".upper(), raising=False)


@pytest.fixture
def light(tmp_path):
    """A model whose weights take no memory."""
    return _with_files(_model(), tmp_path, 0)


@pytest.fixture
def heavy(tmp_path):
    """A model with 100 MiB of weights, in a sparse file, and 30 KiB of KV cache per token."""
    return _with_files(_model(context_length=8192), tmp_path, 100, num_layers=20, head_size=64)


def _with_files(model, folder, mib, **fields):
    graph, weights = folder / "model.onnx", folder / "model.onnx.data"
    for file, size in ((graph, 0), (weights, mib * MIB)):
        with file.open("wb") as opened:
            opened.truncate(size)
    return dataclasses.replace(model, graph=graph, weights=(weights,), **fields)


@pytest.mark.parametrize(
    ("slots", "max_length", "cache_bytes", "expected"),
    [
        (4, 4096, 10**8, (4, 96)),  # 100 rounded down to a multiple of 8
        (4, 50, 10**8, (4, 48)),
        (4, 16, 3 * 16 * TOKEN_BYTES, (3, 16)),
        (4, 16, 3 * 16 * TOKEN_BYTES - 1, (2, 16)),
        (4, 16, 16 * TOKEN_BYTES, (1, 16)),
    ],
)
def test_slots_are_what_fits(light, slots, max_length, cache_bytes, expected):
    """As many as requested, if they fit; lengths up to the setting and the context length."""
    settings = {"max_sequence_length": max_length, "kv_cache_bytes": cache_bytes}
    plan = _plan(light, 1000, slots=slots, **settings)

    assert expected == (plan.slots, plan.slot_length)


def test_half_the_element_size_is_twice_the_slots(light):
    """Elements have two bytes on CUDA unless the model is fp32, and four on the CPU."""
    settings = {"slots": 99, "max_sequence_length": 16, "kv_cache_bytes": 2 * 16 * TOKEN_BYTES}
    half = dataclasses.replace(light, precision="int4")

    assert 2 == _plan(half, 1000, "cpu", **settings).slots
    assert 4 == _plan(half, 1000, "cuda", **settings).slots
    assert 2 == _plan(light, 1000, "cuda", **settings).slots


def test_memory_for_less_than_one_slot_is_refused_with_the_numbers(light):
    """The message says what a slot needs, what is available, and what to change."""
    with pytest.raises(MemoryPlanError) as caught:
        _plan(light, 1000, max_sequence_length=16, kv_cache_bytes=16 * TOKEN_BYTES - 1)

    for part in ("16 tokens", "3,072 bytes", "3,071", "kv_cache_bytes", "max_sequence_length"):
        assert part in str(caught.value)


def test_a_context_below_the_granularity_is_refused(light):
    """It does not end in a division by zero."""
    with pytest.raises(MemoryPlanError, match="context"):
        _plan(dataclasses.replace(light, context_length=7), 1000)


@pytest.mark.parametrize(
    ("cores", "weight_mib", "threads"),
    [(1, 139, 1), (8, 139, 8), (64, 139, 16), (64, 2330, 36), (64, 8000, 64), (4, 8000, 4)],
)
def test_small_models_do_not_take_all_cores(cores, weight_mib, threads):
    """Up to 16 threads in any case; beyond that, one for each 64 MiB of weights."""

    assert threads == plan_threads(cores, weight_mib * MIB)


SLOT = 2 * 20 * 3 * 64 * 4 * 4096  # 120 MiB


def test_the_cache_takes_a_share_of_what_weights_leave(heavy):
    """Weights and working memory come first; `needed_bytes` is those and one slot."""
    plan = _plan(heavy, 1000, kv_memory_share=0.5)

    assert 120 * MIB == SLOT == plan.slot_bytes
    assert 2 == plan.slots
    assert 4 == _plan(heavy, 1000, kv_memory_share=0.9).slots
    assert 220 * MIB < plan.needed_bytes < 620 * MIB


def test_plan_shows_weights_cache_and_memory(heavy):
    """In one line, as it is logged and shown before a start."""
    text = str(_plan(heavy, 1000, slots=2))

    for part in ("100 MiB of weights", "240 MiB of KV cache", "2 sequences of 4,096 tokens"):
        assert part in text
    assert "1,000 MiB of 1,024 MiB are free (memory limit in /sys/fs/cgroup)" in text


def test_one_slot_may_take_more_than_the_share(heavy):
    """Where memory is short, one sequence at a time is better than none."""
    plan = _plan(heavy, 500, kv_memory_share=0.1)

    assert (1, 4096) == (plan.slots, plan.slot_length)


@pytest.mark.parametrize("settings", [{}, {"kv_cache_bytes": 0}])
def test_sequences_are_shorter_where_memory_is_short(heavy, settings, caplog):
    """As long as fits, with a warning, if no length was requested."""
    plan = _plan(heavy, 420, **settings)

    assert 1 == plan.slots
    assert 256 <= plan.slot_length < 4096
    assert plan.needed_bytes <= 420 * MIB < plan.needed_bytes + 8 * 30 * 1024
    assert f"reduced to {plan.slot_length:,} tokens instead of 4,096" in caplog.text


@pytest.mark.parametrize("wanted", [{"max_sequence_length": 4096}, {"kv_cache_bytes": 10**9}])
def test_too_little_memory_for_one_slot_is_refused(heavy, wanted):
    """One line says what is needed, what is free, where the limit comes from and what to do."""
    with pytest.raises(MemoryPlanError) as caught:
        _plan(heavy, 420, **wanted)

    text = str(caught.value)
    for part in ("1,024 MiB (memory limit in /sys/fs/cgroup)", "420 MiB are free", "100 MiB for w"):
        assert part in text
    assert "needs 492 MiB of memory" in text
    assert "120 MiB for one sequence of 4,096 tokens, 272 MiB for the rest" in text
    assert "\n" not in text
    fitting = int(text.rpartition("MAX_SEQUENCE_LENGTH to ")[2].split()[0])
    shorter = {**wanted, "max_sequence_length": fitting}
    assert fitting == _plan(heavy, 420, **shorter).slot_length
    with pytest.raises(MemoryPlanError):
        _plan(heavy, 420, **{**wanted, "max_sequence_length": fitting + 8})


def test_shorter_sequences_are_not_suggested_if_weights_do_not_fit(heavy):
    """If the weights alone are too large, only more memory or smaller weights help."""
    with pytest.raises(MemoryPlanError) as caught:
        _plan(dataclasses.replace(heavy, precision="int4"), 120)

    assert str(caught.value).endswith(" MiB more")


@pytest.mark.parametrize(
    ("precision", "free_mib", "advice"),
    [
        ("fp32", 425, "export it in int8 (about 29 MiB of weights)"),
        ("fp32", 410, "export it in int4 (about 16 MiB of weights)"),
        ("fp16", 390, "export it in int8 (about 57 MiB of weights)"),
        ("fp16", 370, "export it in int4 (about 32 MiB of weights)"),
        ("int8", 450, "export it in int4 (about 56 MiB of weights)"),
    ],
)
def test_lower_precision_is_suggested_if_it_fits(heavy, precision, free_mib, advice):
    """The largest precision that fits, with its size."""
    model = dataclasses.replace(heavy, precision=precision)
    with pytest.raises(MemoryPlanError) as caught:
        _plan(model, free_mib, max_sequence_length=4096)

    assert str(caught.value).endswith(f", or {advice}")


@pytest.mark.parametrize(("precision", "grows"), [("int4", 20), ("int8", 12), ("fp32", 0)])
def test_tight_fit_is_warned_about(heavy, precision, grows, caplog):
    """Quantised weights may take more memory than their file, and none is left."""
    model = dataclasses.replace(heavy, precision=precision)
    needed = _plan(model, 900).needed_bytes // MIB + 1
    _plan(model, needed + grows + 1)
    assert [] == caplog.messages

    _plan(model, needed)
    warning = f"m barely fits into memory: it may take up to {needed - 1 + grows} MiB"
    assert bool(grows) == any(warning in line for line in caplog.messages)


def test_cuda_slots_take_a_share_of_what_weights_leave(heavy):
    """Of the device's free memory, weights come first, then slots get a share of the rest."""
    length = {"max_sequence_length": 4096}
    plan = _plan(heavy, 580, "cuda", kv_memory_share=0.5, **length)
    half = dataclasses.replace(heavy, precision="fp16")

    assert (2, 120 * MIB) == (plan.slots, plan.slot_bytes)
    assert 3 == _plan(half, 500, "cuda", kv_memory_share=0.5, **length).slots
    assert 8192 == _plan(half, 500, "cuda").slot_length
    with pytest.raises(MemoryPlanError) as caught:
        _plan(heavy, 580, "cuda", kv_memory_share=0.1, max_sequence_length=4096)

    assert "1,300 MiB of memory: 100 MiB for weights, 120 MiB for one" in str(caught.value)
    assert "580 MiB are free: provide 720 MiB more" in str(caught.value)


def test_cache_larger_than_memory_is_warned_about(heavy, caplog):
    """The operator's setting is applied; the log says what the consequences may be."""
    small = _plan(heavy, 1000, kv_cache_bytes=250 * MIB).slots
    assert (2, []) == (small, caplog.messages)

    assert 7 == _plan(heavy, 1000, kv_cache_bytes=900 * MIB).slots
    assert "TRIVIUM_GENERATOR_KV_CACHE_BYTES is 900 MiB" in caplog.text
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
def test_defaults_come_from_the_model_then_openai(config, expected):
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
def test_invalid_model_defaults_are_refused(name, value):
    """One line that names folder, file, field and value."""
    with pytest.raises(ModelDirectoryError) as caught:
        default_sampling(_model(**{name: value}))

    for part in ("/models/m", "generation_config.json", name, repr(value)):
        assert part in str(caught.value)


def test_integer_written_as_a_decimal_is_accepted():
    """Some files say top_k 50.0."""

    assert isinstance(default_sampling(_model(top_k=50.0)).top_k, int)
