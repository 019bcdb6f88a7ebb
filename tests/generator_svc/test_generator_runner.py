"""The real model in slots: chunks, batches, moves, errors, compared with itself and the checkpoint.

Bitwise, since the same request has to give the same tokens whatever else is in the batch.
"""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest

from generator_svc.config import GeneratorSettings
from generator_svc.device import DeviceError, choose_device
from generator_svc.metering import WARM_UP, Meter
from generator_svc.plan import Chunk, Copy, PromptBatch, Row, StepPlan, Swap
from generator_svc.run.outcome import DeviceInfo
from generator_svc.run.runner import OrtRunner
from generator_svc.sequence import EngineRequest, SamplingParams
from generator_svc.startup import build_engine, warm_up
from tests.fakes import ScriptedRunner
from tests.generator_svc.engine_harness import Harness
from tests.tiny_models import tiny_checkpoint, tiny_model_directory
from trivium.model_directory import load_model_directory

SLOTS, SLOT_LENGTH = 4, 128
PROMPT = [int(token) for token in np.random.default_rng(7).integers(3, 300, 40)]
OTHERS = [
    [int(token) for token in np.random.default_rng(s).integers(3, 300, 9 + s)] for s in (1, 2)
]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return load_model_directory(tiny_model_directory(family))


@pytest.fixture(scope="module")
def runner(model):
    return OrtRunner(model, "cpu", SLOTS, SLOT_LENGTH, threads=1)


def _prefill(runner, slot, tokens, *lengths):
    """Prefills `tokens` in chunks of `lengths` and one for the rest; returns the last logits."""
    start, chunks = 0, []
    for length in (*lengths, len(tokens) - sum(lengths)):
        chunks.append(Chunk(slot, start, tuple(tokens[start : start + length]), True))
        start += length
    return runner.run(StepPlan(chunks=tuple(chunks))).chunks[-1].logits[0]


def _decode(runner, *rows):
    return runner.run(StepPlan(rows=rows)).rows.logits.copy()


@pytest.mark.parametrize("lengths", [(2,), (8,), (20, 18), (2, 2, 32), (7, 11, 13)])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(runner, lengths):
    """Wherever it is split, as long as no token is alone in an attention tile."""
    whole = _prefill(runner, 0, PROMPT)
    cut = _prefill(runner, 1, PROMPT, *lengths)

    assert whole.tolist() == cut.tolist()


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_chunk_logits_are_those_of_shorter_prompts(family, precision):
    """Bitwise, in the first chunk and later; other runs only return the last token's logits."""
    folder = tiny_model_directory(family, precision)
    runner = OrtRunner(load_model_directory(folder), "cpu", SLOTS, SLOT_LENGTH, threads=1)
    tokens = tuple(PROMPT)
    plain = _prefill(runner, 0, PROMPT)
    chunks = (
        Chunk(1, 0, tokens[:20], False, wants_all_logits=True),
        Chunk(1, 20, tokens[20:], True, wants_all_logits=True),
    )
    first, second = runner.run(StepPlan(chunks=chunks)).chunks
    found = np.concatenate((first.all_logits, second.all_logits))

    assert runner.info.gives_all_logits
    assert first.logits is None
    assert plain.tolist() == second.logits[0].tolist() == _prefill(runner, 1, PROMPT).tolist()
    for length in (2, 8, 20, 22, 32, 40):
        assert _prefill(runner, 2, PROMPT[:length]).tolist() == found[length - 1].tolist()


def test_slots_do_not_matter(runner):
    """The same prompt gives the same logits in any slot."""
    logits = [_prefill(runner, slot, PROMPT).tolist() for slot in range(SLOTS)]

    assert [logits[0]] * SLOTS == logits


@pytest.mark.parametrize("length", [40, 64, SLOT_LENGTH])
def test_batched_prefill_gives_each_prompts_logits(runner, length):
    """The prompts' logits, those of the tokens after them, and what a neighbouring slot holds."""
    prompts = [PROMPT, OTHERS[0], PROMPT[:2]]
    alone = [_prefill(runner, slot, prompt) for slot, prompt in enumerate(prompts)]
    _prefill(runner, 3, OTHERS[1])
    rows = [Row(17, len(prompt)) for prompt in (*prompts, OTHERS[1])]
    following = _decode(runner, *rows)
    for slot in range(3):
        _prefill(runner, slot, OTHERS[1])
    batch = PromptBatch(0, tuple(map(tuple, prompts)), length, (1.0,) * len(prompts))
    together = runner.run(StepPlan(batches=(batch,))).batches[0]

    assert np.array(alone).tolist() == together.logits.tolist()
    assert following.tolist() == _decode(runner, *rows).tolist()
    assert together.nanoseconds > 0


def test_batched_decode_gives_each_rows_logits(runner):
    """Batched decoding at different lengths, with idle rows in between."""
    prompts = [PROMPT, OTHERS[0], OTHERS[1], PROMPT[:15]]
    for slot, prompt in enumerate(prompts):
        _prefill(runner, slot, prompt)
    idle = [Row(0, len(prompt), is_idle=True) for prompt in prompts]
    alone = []
    for slot, prompt in enumerate(prompts):
        rows = (*idle[:slot], Row(17, len(prompt)))
        alone.append(_decode(runner, *rows)[slot].tolist())
    together = _decode(runner, *(Row(17, len(prompt)) for prompt in prompts))

    assert alone == together.tolist()


def test_batch_of_one_gives_the_same_logits(runner):
    """Batch size one is no special case."""
    _prefill(runner, 0, PROMPT)
    single = _decode(runner, Row(17, len(PROMPT)))[0]
    _prefill(runner, 1, OTHERS[0])
    pair = _decode(runner, Row(17, len(PROMPT)), Row(5, len(OTHERS[0])))[0]

    assert single.tolist() == pair.tolist()


def test_idle_rows_do_not_affect_other_slots(runner):
    """What they write after a slot's content is overwritten before it is read."""
    _prefill(runner, 0, PROMPT)
    _prefill(runner, 1, OTHERS[0])
    expected = _decode(runner, Row(4, len(PROMPT)), Row(5, len(OTHERS[0])))
    for token_id in (9, 99):
        idle = Row(token_id, len(PROMPT), is_idle=True)
        _decode(runner, idle, Row(5, len(OTHERS[0])))
    again = _decode(runner, Row(4, len(PROMPT)), Row(5, len(OTHERS[0])))

    assert expected.tolist() == again.tolist()


def test_copies_and_swaps_keep_answers(runner):
    """Keys and values of all layers and heads move, as far as they are filled."""
    _prefill(runner, 0, PROMPT)
    _prefill(runner, 1, OTHERS[0])
    expected = _decode(runner, Row(4, len(PROMPT)), Row(5, len(OTHERS[0])))
    moves = (Copy(0, 3, len(PROMPT)), Swap(1, 2, len(OTHERS[0])), Swap(0, 2, len(PROMPT)))
    filler = _prefill(runner, 1, OTHERS[1]) is not None
    _prefill(runner, 1, OTHERS[0])
    runner.run(StepPlan(moves=moves))
    rows = (
        Row(5, len(OTHERS[0])),
        Row(0, 0, is_idle=True),
        Row(4, len(PROMPT)),
        Row(4, len(PROMPT)),
    )
    got = _decode(runner, *rows)

    assert filler
    assert expected[1].tolist() == got[0].tolist()
    assert expected[0].tolist() == got[2].tolist() == got[3].tolist()


def test_a_prefix_that_was_copied_can_be_continued(runner):
    """A copied prefix and the rest of the prompt give the logits of the whole prompt."""
    whole = _prefill(runner, 0, PROMPT)
    runner.run(StepPlan(moves=(Copy(0, 2, 21),)))
    rest = Chunk(2, 21, tuple(PROMPT[21:]), True)
    continued = runner.run(StepPlan(chunks=(rest,))).chunks[0].logits[0]

    assert whole.tolist() == continued.tolist()


def test_a_step_does_moves_then_chunks_then_rows(runner):
    """A plan with all three gives the same as the three one after the other."""
    _prefill(runner, 0, PROMPT)
    expected = _decode(runner, Row(4, len(PROMPT)))[0]
    rows = (Row(4, len(PROMPT)), Row(4, len(PROMPT)))
    chunk = Chunk(1, 21, tuple(PROMPT[21:]), False)
    outcome = runner.run(StepPlan((Copy(0, 1, 21),), (chunk,), rows))

    assert [expected.tolist()] * 2 == outcome.rows.logits.tolist()
    assert outcome.chunks[0].logits is None
    assert min(outcome.move_nanoseconds, outcome.chunks[0].nanoseconds) > 0


def test_a_token_outside_the_vocabulary_is_reported_and_the_runner_goes_on(runner, model):
    """As the error of its chunk or of the rows, and of nothing else."""
    expected = _prefill(runner, 0, PROMPT)
    bad = Chunk(1, 0, (3, model.vocab_size + 5), True)
    good = Chunk(0, 0, tuple(PROMPT), True)
    outcome = runner.run(StepPlan(chunks=(bad, good)))
    rows = runner.run(StepPlan(rows=(Row(model.vocab_size + 5, 3),))).rows

    assert outcome.chunks[0].error is not None
    assert outcome.chunks[0].logits is None
    assert outcome.chunks[1].error is None
    assert expected.tolist() == outcome.chunks[1].logits[0].tolist()
    assert rows.error is not None
    assert expected.tolist() == _prefill(runner, 2, PROMPT).tolist()


def test_provider_dtype_and_cache_size_are_reported(runner, model):
    """Provider, dtype, and the bytes of the KV cache."""
    info = runner.info
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_size * 4

    assert ("CPUExecutionProvider", "float32") == (info.provider, info.dtype)
    assert SLOTS * SLOT_LENGTH * token_bytes == info.cache_bytes


@pytest.fixture(scope="module")
def checkpoint_answers(family):
    """What transformers generates greedily from the checkpoint, in PyTorch."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
    answers = []
    for prompt in (PROMPT, *OTHERS):
        ids = torch.tensor([prompt])
        generated = network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24
        )
        answers.append(generated[0, len(prompt) :].tolist())
    return answers


class Reporting(Harness):
    """Keeps the logprobs of the last updates."""

    def deliver(self, updates):
        super().deliver(updates)
        self.logprobs = [update.token.logprobs for update in updates]


def _harness(runner, **fields):
    return Harness(slots=SLOTS, slot_length=SLOT_LENGTH, runner=runner, **fields)


def test_greedy_answers_equal_the_checkpoints(runner, model, checkpoint_answers):
    """Batched, in chunks, through slots: the same tokens as the original in PyTorch."""
    harness = _harness(runner)
    stops = frozenset(model.eos_token_ids)
    groups = [harness.submit(p, 24, stop_token_ids=stops) for p in (PROMPT, *OTHERS)]
    harness.finish()

    assert checkpoint_answers == [harness.tokens[group][0] for group in groups]


@pytest.mark.parametrize("length", [*range(30, 37), *range(63, 69), 97])
def test_chunking_does_not_change_logprobs(runner, length):
    """The scheduler never leaves a token alone in a tile, so chunking does not change logprobs."""
    prompt = [int(token) for token in np.random.default_rng(length).integers(3, 300, length)]
    logprobs = []
    for max_num_batched_tokens in (8, 11, 33, 40, 128):
        harness = Reporting(
            SLOTS,
            SLOT_LENGTH,
            reuse=False,
            max_num_batched_tokens=max_num_batched_tokens,
            runner=runner,
        )
        harness.submit(prompt, 1, top_logprobs=20)
        harness.finish()
        logprobs.append(harness.logprobs)

    assert [logprobs[0]] * 5 == logprobs


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_batched_tokens_equal_one_at_a_time(runner, temperature):
    """Greedy and sampled with a seed, for more requests than slots, arriving one by one."""
    requests = [
        ([*PROMPT[: 5 + 3 * seed], seed + 3], SamplingParams(temperature=temperature, seed=seed))
        for seed in range(9)
    ]
    alone = []
    for prompt, sampling in requests:
        harness = _harness(runner, reuse=False)
        group = harness.submit(prompt, 12, sampling=sampling, n=2)
        harness.finish()
        alone.append(dict(harness.tokens[group]))
    harness, groups = _harness(runner), []
    for prompt, sampling in requests:
        groups.append(harness.submit(prompt, 12, sampling=sampling, n=2))
        harness.step()
    harness.finish()

    assert alone == [dict(harness.tokens[group]) for group in groups]


class Recorder:
    """A runner that records its plans."""

    def __init__(self, runner):
        self._runner = runner
        self.info = runner.info
        self.plans = []

    def run(self, plan):
        self.plans.append(plan)
        return self._runner.run(plan)

    def capture(self, seconds):
        return self._runner.capture(seconds)


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_batched_prefill_tokens_equal_one_at_a_time(runner, temperature):
    """More requests than slots, some with a cached prefix: the same tokens."""
    sampling = SamplingParams(temperature=temperature, seed=3)
    prompts = [PROMPT[:20], *OTHERS, PROMPT[:25], PROMPT, [*PROMPT[:30], 7, 8], [5], PROMPT[:33]]
    tokens, sizes = [], set()
    for size in (0, 1, 4):
        recorder = Recorder(runner)
        harness = _harness(
            recorder, max_num_batched_tokens=256, max_prefill_batch_size=size, prefill_tokens=96
        )
        groups = [harness.submit(p, 6, sampling=sampling, n=1 + len(p) % 2) for p in prompts]
        harness.finish()
        tokens.append([dict(harness.tokens[group]) for group in groups])
        sizes |= {len(batch.prompts) for plan in recorder.plans for batch in plan.batches}

    assert tokens[0] == tokens[1] == tokens[2]
    assert {1, 4} <= sizes


@pytest.mark.parametrize(("size", "is_new", "batches"), [(0, True, 0), (4, True, 1), (4, False, 0)])
def test_which_runners_batch_prefill(model, tmp_path, size, is_new, batches):
    """The CPU if configured, but no graph that takes the last position for each row's last token.

    Graphs of other exporters, and of earlier versions of this one, do that.
    """
    if not is_new:
        graph = onnx.load(model.graph, load_external_data=False)
        del graph.metadata_props[:]
        onnx.save(graph, tmp_path / "model.onnx")
        shutil.copy(model.graph.with_name("model.onnx.data"), tmp_path)
        model = dataclasses.replace(model, graph=tmp_path / "model.onnx")
    recorder = Recorder(OrtRunner(model, "cpu", SLOTS, SLOT_LENGTH, threads=1))
    settings = GeneratorSettings(model_directory=model.path, max_prefill_batch_size=size)
    engine = build_engine(settings, recorder, Meter(), lambda updates: None, lambda fault: None)
    for length in (20, 30):
        engine.submit(EngineRequest(tuple(PROMPT[:length]), 1))
    engine.step()

    assert not engine.load().running_sequences
    assert batches == len(recorder.plans[0].batches)


@pytest.mark.parametrize(
    ("provider", "batches", "cached"),
    [("CUDAExecutionProvider", [1, 16], 0), ("CPUExecutionProvider", [], 40)],
)
def test_cuda_prefills_larger_batches(provider, batches, cached):
    """Up to 2,048 tokens per step, of prompts that share a run rather than a short prefix."""
    runner = ScriptedRunner(32, 256)
    runner.info = DeviceInfo(provider, "float16", 32, 256, 0, pads_prompts=True)
    settings = GeneratorSettings(model_directory="model")
    engine = build_engine(settings, runner, Meter(), lambda updates: None, lambda fault: None)
    groups = []
    for number in range(17):
        prompt = (*range(40), *[number] * 60)
        groups.append(engine.submit(EngineRequest(prompt, 1)))
        if number == 0:
            engine.step()
    while not groups[-1].is_finished:
        engine.step()

    assert batches == [len(batch.prompts) for plan in runner.plans for batch in plan.batches]
    assert {cached} == {group.sequences[0].cached_prompt_tokens for group in groups[1:]}


def test_cuda_warm_up_runs_every_padded_length(model):
    """The warm-up runs every length that prompts are padded to; on the CPU it runs none."""
    settings = GeneratorSettings(model_directory=model.path, max_prefill_batch_size=4)
    warmed = {}
    for provider in ("CUDAExecutionProvider", "CPUExecutionProvider"):
        recorder = Recorder(OrtRunner(model, "cpu", SLOTS, SLOT_LENGTH, threads=1))
        recorder.info = dataclasses.replace(recorder.info, provider=provider)
        meter = Meter()
        warm_up(settings, recorder, meter)
        warmed[provider] = {batch.length for plan in recorder.plans for batch in plan.batches}
        assert 0 < meter.overhead[WARM_UP] == meter.busy
    recorder.plans.clear()
    engine = build_engine(settings, recorder, meter, lambda updates: None, lambda fault: None)
    for length in range(2, SLOT_LENGTH):
        engine.submit(EngineRequest((length,) * length, 1))
    while engine.load().waiting_sequences or engine.load().running_sequences or not recorder.plans:
        engine.step()
    used = {batch.length for plan in recorder.plans for batch in plan.batches}

    assert used == warmed["CUDAExecutionProvider"]
    assert set() == warmed["CPUExecutionProvider"]


def test_a_batch_with_a_token_outside_the_vocabulary_fails_as_a_whole(runner, model):
    """Its prompts get the error, running requests go on, and what it wrote is not reused."""
    harness = _harness(
        runner, prefill_tokens=64, max_num_batched_tokens=256, max_prefill_batch_size=4
    )
    running = harness.submit(PROMPT, 12, stop_token_ids=frozenset())
    harness.step()
    failed = [harness.submit([*OTHERS[0], token, 4], 5) for token in (model.vocab_size + 1, 4)]
    harness.finish()
    again = harness.submit([*OTHERS[0], 4, 4], 5)
    harness.finish()

    assert set(failed) == set(harness.errors)
    assert 12 == len(harness.tokens[running][0])
    assert 0 == again.sequences[0].cached_prompt_tokens


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_prefix_cache_does_not_change_tokens(runner, temperature):
    """Conversations that continue, and prompts with a common prefix: the same tokens, less work.

    Still less with pauses, in which answers are re-prefilled for the next prompt.
    """
    sampling = SamplingParams(temperature=temperature, seed=4)
    answers, cached = {}, {}
    for reuse, pauses in ((True, True), (True, False), (False, True)):
        harness = _harness(runner, reuse=reuse)
        key = reuse, pauses
        answers[key], cached[key] = [], 0
        conversation = PROMPT[:20]
        for turn in range(4):
            group = harness.submit(conversation, 8, sampling=sampling, stop_token_ids=frozenset())
            other = harness.submit([*PROMPT[:12], 50 + turn, 3], 5, sampling=sampling)
            harness.finish()
            conversation = [*conversation, *harness.tokens[group][0], 9, 10 + turn, 11]
            answers[key] += [harness.tokens[group][0], harness.tokens[other][0]]
            cached[key] += group.sequences[0].cached_prompt_tokens
            for _ in range(9 if pauses else 0):
                harness.engine.reprefill()

    assert answers[False, True] == answers[True, False] == answers[True, True]
    assert cached[True, True] >= cached[True, False] + 3 * 8
    assert cached[True, False] > 40 > 0 == cached[False, True]


def test_failed_run_fails_only_its_own_request(runner, model):
    """A token id that got past the checks fails its own request only."""
    harness = _harness(runner)
    bad = harness.submit([3, model.vocab_size + 1, 4], 5)
    good = harness.submit(PROMPT, 5)
    harness.finish()
    alone = _harness(runner)
    same = alone.submit(PROMPT, 5)
    alone.finish()

    assert bad in harness.errors
    assert alone.tokens[same][0] == harness.tokens[good][0]


def test_slots_can_be_reallocated(model, checkpoint_answers):
    """As many as the device has room for; they are empty, and the tokens are the same."""
    runner = OrtRunner(model, "cpu", 1, SLOT_LENGTH, 1)
    first = _harness(runner)
    first.slots = 1
    group = first.submit(PROMPT, 24)
    first.finish()
    runner.reallocate(SLOTS)
    harness = _harness(runner)
    again = [harness.submit(PROMPT, 24) for _ in range(SLOTS)]
    harness.finish()

    assert SLOTS == runner.info.slots
    assert [first.tokens[group][0]] * SLOTS == [harness.tokens[one][0] for one in again]


def test_a_device_that_is_absent_is_refused_or_used():
    """`cuda` is a requirement, `auto` a preference, `cpu` is always available."""
    assert "cpu" == choose_device("cpu")
    if choose_device("auto") == "cuda":
        assert "cuda" == choose_device("cuda")
    else:
        with pytest.raises(DeviceError, match="cuda"):
            choose_device("cuda")


def test_invalid_graph_file_is_refused(model, tmp_path):
    """In one line that names the file."""
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"nothing of the kind")
    with pytest.raises(DeviceError) as caught:
        OrtRunner(dataclasses.replace(model, graph=graph), "cpu", 1, 16)

    assert str(graph) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_graph_with_other_names_is_refused(model):
    """The message lists the names that it has."""
    names = dataclasses.replace(model.names, past_key="memory.%d.k")
    with pytest.raises(DeviceError, match=r"memory\.0\.k.*past_key_values\.0\.key"):
        OrtRunner(dataclasses.replace(model, names=names), "cpu", 1, 16)


@pytest.mark.parametrize("name", ["past_key_values.0.key", "logits"])
def test_a_graph_with_an_unsupported_type_is_refused(model, tmp_path, name):
    """For example one in bfloat16, which CUDA has kernels for."""
    types = dict.fromkeys(("past_key_values.0.key", "logits"), onnx.TensorProto.FLOAT)
    types[name] = onnx.TensorProto.BFLOAT16
    past, logits = (onnx.helper.make_tensor_value_info(n, t, ["size"]) for n, t in types.items())
    node = onnx.helper.make_node("Cast", [past.name], [logits.name], to=types["logits"])
    graph = onnx.helper.make_graph([node], "g", [past], [logits])
    opset = onnx.helper.make_opsetid("", 17)
    file = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[opset]), file)

    with pytest.raises(DeviceError, match=rf"'{name}' .*tensor\(bfloat16\); supported"):
        OrtRunner(dataclasses.replace(model, graph=file), "cpu", 1, 16)


def test_scripted_runner_overwrites_slots_like_the_real_one():
    """The fake runner of other tests overwrites in place too, so that mistakes show."""
    runner = ScriptedRunner(2, 8)
    runner.run(StepPlan(chunks=(Chunk(0, 0, (5, 6, 7), True),)))
    runner.run(StepPlan(moves=(Copy(0, 1, 2),), rows=(Row(9, 1),)))

    assert [5, 9, 7] == runner.memory[0][:3]
    assert [5, 6, -1] == runner.memory[1][:3]
