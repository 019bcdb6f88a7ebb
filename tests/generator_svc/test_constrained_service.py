"""Constraints over real gRPC: hostile ones are answered soon, disturb no one, leave nothing."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from generator_svc.constraint.compiler import (
    CompileCache,
    CompilerBusy,
    CompileResult,
    ConstraintCompiler,
)
from generator_svc.constraint.llguidance import CompiledConstraint
from generator_svc.sequence import ConstraintError
from tests.generator_svc.generator_stage import Stage
from tests.generator_svc.text_tokens import text_tokens
from trivium.generator.v1 import generator_pb2 as pb
from trivium.sampling.v1.sampling_pb2 import SamplingParams

# The sandbox kills what takes too long, and runs at a lower priority than other programs.
pytestmark = pytest.mark.slow

ANSWER_SECONDS = 5

MULTIPLE = json.dumps({"type": "integer", "multipleOf": 1_000_003})
CHAIN = "start: r0\n" + "".join(f'r{i}: r{i + 1} | "x{i}"\n' for i in range(5_000)) + 'r5000: "z"'


def _deep(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return json.dumps(schema)


# Error code, kind, text; no code if the constraint can be enforced.
HOSTILE = {
    "an automaton of a million states": ("json_schema_too_complex", "json_schema", MULTIPLE),
    "a chain of rules": ("json_schema_too_complex", "lark", CHAIN),
    "deep": ("json_schema_too_complex", "json_schema", _deep(100)),
    "a wide object": (
        "json_schema_too_complex",
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(3_000)}}),
    ),
    "a wide enum": (None, "json_schema", json.dumps({"enum": [f"v{i}" for i in range(20_000)]})),
    "a huge enum": (
        "json_schema_too_complex",
        "json_schema",
        json.dumps({"enum": [f"v{i}" for i in range(10**5)]}),
    ),
    "itself": ("invalid_json_schema", "json_schema", '{"$ref": "#"}'),
    "itself within": (
        None,
        "json_schema",
        '{"properties": {"a": {"$ref": "#"}}, "type": "object", "additionalProperties": false}',
    ),
    "products of unions": (
        "json_schema_too_complex",
        "json_schema",
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"{i}{j}": {"const": 1}}} for j in range(4)]}
                    for i in range(12)
                ]
            }
        ),
    ),
    "many items": (None, "json_schema", '{"type": "array", "minItems": 1000000000}'),
    "patterns of names": (
        "invalid_json_schema",
        "json_schema",
        json.dumps({"patternProperties": {f"^.{{{i}}}a.*(b|c){{{i}}}$": {} for i in range(1, 40)}}),
    ),
    "backtracking": (None, "regex", "(a+)+$"),
    "long repetition": (None, "regex", ".{1,100000}"),
    "nested repetition": (
        "json_schema_too_complex",
        "regex",
        "((((a{1,100}){1,100}){1,100}){1,100})" * 3,
    ),
    "exponential automata": (None, "regex", "(.*a.{30}|.*b.{29})c"),
    "ambiguity": ("json_schema_too_complex", "lark", 'start: e\ne: e e | "a" | e e e | '),
    "parentheses": ("invalid_value", "regex", "(" * 30_000 + ")" * 30_000),
}


@pytest.fixture(scope="module")
def tokens():
    return text_tokens()


@pytest.fixture
async def stage(tokens):
    async with Stage(
        slots=6, slot_length=512, logits=tokens.random_logits, tokenizer=tokens
    ).running() as stage:
        yield stage


async def _outcome(call):
    """None, or the status, reason and field of the error, for a call that may fail."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        details = {}
        for packed in rpc_status.from_call(error).details:
            for kind in ("ErrorInfo", "BadRequest"):
                message = getattr(error_details_pb2, kind)()
                if packed.Unpack(message):
                    details[kind] = message
        field = details["BadRequest"].field_violations[0].field
        return error.code(), details["ErrorInfo"].reason.lower(), field
    return None


async def test_each_choice_fits_the_schema(stage, tokens):
    """With n, each choice fits and is different."""
    constraint = pb.Constraint(regex="[ab]{40}")
    sampling = SamplingParams(temperature=1.0, seed=3)
    answers, finished = await stage.generate([5], constraint=constraint, n=4, sampling=sampling)

    texts = [tokens.decode(ids) for ids in answers.values()]
    assert {40} == {len(text) for text in texts}
    assert 4 == len(set(texts))
    assert {pb.FINISH_REASON_STOP_TOKEN} == {last.reason for last in finished.values()}


async def test_complete_text_ends_despite_ignore_eos(stage, tokens):
    """A complete text ends, and the model's EOS is its last token."""
    constraint = pb.Constraint(json_schema='{"const": "x"}')
    fields = {"constraint": constraint, "ignore_eos": True, "min_new_tokens": 50}
    answers, finished = await stage.generate([5], **fields)

    assert tokens.eos == answers[0][-1]
    assert '"x"' == tokens.decode(answers[0])
    assert pb.FINISH_REASON_STOP_TOKEN == finished[0].reason


@pytest.mark.parametrize(
    ("constraint", "code"),
    [
        (pb.Constraint(), "missing_required_parameter"),
        (pb.Constraint(json_schema="{"), "invalid_json_schema"),
        (pb.Constraint(json_schema=" " * 300_000), "json_schema_too_complex"),
        (pb.Constraint(regex="("), "invalid_value"),
        (pb.Constraint(regex="a" * 70_000), "string_above_max_length"),
        (pb.Constraint(lark="begin: X"), "invalid_value"),
        (pb.Constraint(lark=" " * 1_100_000), "string_above_max_length"),
    ],
)
async def test_refusals_name_the_constraint(stage, constraint, code):
    """INVALID_ARGUMENT with the reason, and nothing is generated."""
    outcome = await _outcome(await stage.call([5], constraint=constraint))

    assert (grpc.StatusCode.INVALID_ARGUMENT, code, "constraint") == outcome
    assert not stage.runner.plans


async def test_constraint_too_complex_during_decoding_has_its_own_error(stage, tokens):
    """It is noticed during decoding, as the dry run took another path."""
    [a] = tokens.encode("a")
    lark = 'start: /b/ /(.|\\n)*/ | e\ne: e e | "a" | e e e'
    sampling = SamplingParams(temperature=0, logit_bias={a: 100.0})
    call = await stage.call([5], constraint=pb.Constraint(lark=lark), sampling=sampling)
    outcome = await _outcome(call)

    assert (grpc.StatusCode.INVALID_ARGUMENT, "json_schema_too_complex", "constraint") == outcome


async def test_a_model_without_constraints_still_answers(tmp_path, tokens, caplog):
    """With an unsupported tokenizer, only constrained requests are refused."""
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}}}')
    other = type(tokens)(tokens.tokenizer, file)
    stage = Stage(logits=tokens.random_logits, tokenizer=other)
    async with stage.running():
        constrained = await stage.call([5], constraint=pb.Constraint(regex="a"))
        outcome = await _outcome(constrained)
        answers, _ = await stage.generate([5], max_new_tokens=3)

    assert (grpc.StatusCode.INVALID_ARGUMENT, "unsupported_parameter", "constraint") == outcome
    assert answers[0]
    assert "rejected" in caplog.text


@contextlib.asynccontextmanager
async def _compiler(tokens, cache_bytes=2**20):
    async with ConstraintCompiler(tokens.file, tokens.size, (tokens.eos,), cache_bytes) as compiler:
        await compiler.compile("regex", "a")
        yield compiler


async def test_hostile_constraints_do_not_delay_streams(stage, tokens):
    """Each before its deadline; the stream keeps decoding and gets the tokens it gets alone."""
    bias = SamplingParams(temperature=0, logit_bias={tokens.eos: -100.0})
    long = {"max_new_tokens": 400, "sampling": bias}
    wanted, _ = await stage.generate([5, 6], **long)
    await _outcome(await stage.call([5], constraint=pb.Constraint(regex="a")))
    stage.runner.delay = 0.01
    stream = asyncio.create_task(stage.generate([5, 6], **long))
    codes, steps = {}, {}
    for name, (_, kind, text) in HOSTILE.items():
        fields = {"seconds": ANSWER_SECONDS, "max_new_tokens": 2}
        call = await stage.call([7], constraint=pb.Constraint(**{kind: text}), **fields)
        before = len(stage.runner.plans)
        outcome = await _outcome(call)
        codes[name] = outcome and outcome[1]
        steps[name] = len(stage.runner.plans) - before
    stage.runner.delay = 0.0
    answers, _ = await stream

    assert {name: code for name, (code, _, _) in HOSTILE.items()} == codes
    assert steps["an automaton of a million states"] > 20
    assert wanted == answers


async def test_hostile_lenient_schemas_are_answered_in_time(tokens):
    """Relaxed, or refused as too complex; the result may be larger than a pipe's buffer."""
    lenient = {"x-guidance": {"lenient": True}}
    outcomes = {}
    async with _compiler(tokens) as compiler:
        for name, (_, kind, text) in HOSTILE.items():
            if kind != "json_schema":
                continue
            try:
                await asyncio.wait_for(
                    compiler.compile(kind, json.dumps(json.loads(text) | lenient)), ANSWER_SECONDS
                )
                outcomes[name] = None
            except ConstraintError as error:
                outcomes[name] = error.code
        schema = {"type": "string", "pattern": "(", "description": "é" * 80_000} | lenient
        await compiler.compile("json_schema", json.dumps(schema, ensure_ascii=False))

    assert {None, "json_schema_too_complex"} >= set(outcomes.values())
    assert outcomes["an automaton of a million states"] is None
    assert outcomes["patterns of names"] is None


async def test_lenient_schema_is_enforced_as_far_as_possible(stage, tokens):
    """Over gRPC; without `lenient` the same schema is refused."""
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "minProperties": 1}
    schema |= {"additionalProperties": {"type": "null"}, "maxProperties": 1}
    exact = await _outcome(
        await stage.call([5], constraint=pb.Constraint(json_schema=json.dumps(schema)))
    )
    lenient = json.dumps(schema | {"x-guidance": {"lenient": True}})
    answers, _ = await stage.generate([5], constraint=pb.Constraint(json_schema=lenient), n=4)

    assert "invalid_json_schema" == exact[1]
    for ids in answers.values():
        answer = json.loads(tokens.decode(ids))
        assert all(value == (1 if name == "a" else None) for name, value in answer.items())


async def test_remote_references_are_not_fetched(tokens):
    """References to URLs and files are refused, and no connection is made."""
    connections = []
    server = await asyncio.start_server(lambda *pair: connections.append(pair), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, _compiler(tokens) as compiler:
        for reference in (f"http://127.0.0.1:{port}/x.json", f"file://{tokens.file}"):
            with pytest.raises(ConstraintError) as caught:
                await compiler.compile("json_schema", json.dumps({"$ref": reference}))
            assert "invalid_json_schema" == caught.value.code

    assert [] == connections


def sandboxes():
    """Process ids of this process's running sandboxes."""
    return children(os.getpid())


def children(parent):
    """Process ids of the running sandboxes, or forks of one, that `parent` has started."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,stat=,args=", "--ppid", str(parent)],
        capture_output=True,
        text=True,
    )
    lines = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return [int(pid) for pid, state, command in lines if "sandbox" in command and state[0] != "Z"]


def kill_sandbox():
    """Kills the running sandbox and waits until it has ended."""
    [pid] = sandboxes()
    os.kill(pid, signal.SIGKILL)
    while pid in sandboxes():
        time.sleep(0.01)


async def test_compile_results_are_cached(tokens):
    """The second request with the same constraint, valid or not, needs no sandbox."""
    async with _compiler(tokens) as compiler:
        for kind, text in [("regex", "[ab]+"), ("json_schema", MULTIPLE)]:
            with contextlib.suppress(ConstraintError):
                await compiler.compile(kind, text)
        [sandbox] = sandboxes()
        os.kill(sandbox, signal.SIGSTOP)
        await compiler.compile("regex", "[ab]+")
        with pytest.raises(ConstraintError, match="too much time or memory"):
            await compiler.compile("json_schema", MULTIPLE)
        with pytest.raises(CompilerBusy):
            await compiler.compile("regex", "[cd]+")


async def test_too_many_waiting_compilations_are_refused(tokens):
    """Waiting requests hold memory, so only a bounded number may wait for the compiler."""
    async with _compiler(tokens) as compiler:
        calls = [compiler.compile("regex", "a") for _ in range(1_000)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [result for result in results if isinstance(result, CompilerBusy)]

        assert await compiler.compile("regex", "a")
    assert 1_000 - 512 == len(refused)
    assert 512 == sum(isinstance(result, CompiledConstraint) for result in results)


async def test_identical_constraints_share_one_compilation(tokens, monkeypatch):
    """And a request that is cancelled does not cancel it for the others."""
    async with _compiler(tokens) as compiler:
        put, results = compiler.cache.put, []

        def counted(digest, result):
            results.append(result)
            put(digest, result)

        monkeypatch.setattr(compiler.cache, "put", counted)
        calls = [asyncio.create_task(compiler.compile("regex", "x+")) for _ in range(9)]
        await asyncio.sleep(0)
        calls[0].cancel()
        constraints = await asyncio.gather(*calls, return_exceptions=True)

    assert 1 == len(results)
    assert isinstance(constraints[0], asyncio.CancelledError)
    assert 8 == len(set(constraints[1:]))  # each has its own object


_LOW_STACK = "resource.setrlimit(resource.RLIMIT_STACK, (2**19, 2**19))"
_NO_PROC = """
import builtins, io
real = open
def opened(file, *args, **options):
    if str(file).startswith("/proc/"):
        raise FileNotFoundError(file)
    return real(file, *args, **options)
builtins.open = io.open = opened
"""


@pytest.mark.parametrize("confine", [_LOW_STACK, _NO_PROC])
def test_constraints_compile_in_a_confined_process(tokens, confine):
    """Where the stack is limited already, or there is no /proc."""
    code = (
        f"import resource, runpy\n{confine}\n"
        "runpy.run_module('generator_svc.constraint.sandbox', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tokens.file), str(tokens.size), str(tokens.eos)],
        input='{"kind": "regex", "text": "a"}\n',
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    ready, response = done.stdout.splitlines()
    assert ("ready", "a") == (ready, json.loads(response)["text"])


async def test_killed_sandbox_is_restarted(tokens, caplog):
    """Requests succeed as before; only the log shows it."""
    async with _compiler(tokens) as compiler:
        assert await compiler.compile("regex", "[ab]")
        kill_sandbox()

        assert await compiler.compile("regex", "[xy]")
    assert ["restarting the constraint sandbox process: exited with status -9"] == (caplog.messages)


async def test_sandbox_killed_at_startup_is_restarted(tokens, caplog):
    """As when memory is briefly short; the model's constraints remain available."""
    async with ConstraintCompiler(tokens.file, tokens.size, (tokens.eos,), 2**20) as compiler:
        while not sandboxes():  # noqa: ASYNC110 - a new process has no event
            await asyncio.sleep(0)
        kill_sandbox()
        with contextlib.suppress(CompilerBusy):  # if it was waiting for the killed one
            await compiler.compile("regex", "[ab]")

        assert await compiler.compile("regex", "[ab]")
    assert "failed to start: exited with status -9" in caplog.text


async def test_sandbox_that_hits_a_process_limit_is_started_later(tokens, monkeypatch):
    """As at a process limit: the caller is told to retry, and succeeds once it can be started."""

    async def refused(*command, **options):
        raise BlockingIOError("no process is left")

    async with ConstraintCompiler(tokens.file, tokens.size, (tokens.eos,), 2**20) as compiler:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "create_subprocess_exec", refused)
            with pytest.raises(CompilerBusy):
                await compiler.compile("regex", "[ab]")

        assert await compiler.compile("regex", "[ab]")


async def test_a_sandbox_that_hangs_is_replaced(tokens, caplog):
    """Callers waiting for it are told to retry, and then succeed."""
    async with _compiler(tokens) as compiler:
        assert await compiler.compile("regex", "[ab]")
        [sandbox] = sandboxes()
        os.kill(sandbox, signal.SIGSTOP)
        with pytest.raises(CompilerBusy):
            await compiler.compile("regex", "[xy]")

        assert await compiler.compile("regex", "[xy]")
    assert "no response within" in caplog.text


async def test_compilation_timeout_on_a_busy_machine_is_retryable(tokens):
    """The caller is told to retry, and a timeout on a busy machine is not cached."""
    async with _compiler(tokens) as compiler:
        [sandbox] = sandboxes()
        asked = asyncio.create_task(compiler.compile("json_schema", MULTIPLE))
        while True:
            await asyncio.sleep(0.01)
            if forks := children(sandbox):
                break
        os.kill(forks[0], signal.SIGSTOP)
        with pytest.raises(CompilerBusy):
            await asked
        with pytest.raises(ConstraintError, match="too much time or memory"):
            await compiler.compile("json_schema", MULTIPLE)


async def test_busy_sandbox_ends_with_the_service(tokens):
    """No process is left behind."""
    async with _compiler(tokens) as compiler:
        await compiler.compile("regex", "[ab]")
        [sandbox] = sandboxes()
        grinding = asyncio.create_task(compiler.compile("json_schema", MULTIPLE))
        await asyncio.sleep(0.1)
    with pytest.raises(asyncio.CancelledError):
        await grinding

    assert sandbox not in sandboxes()


def test_cache_size_is_bounded():
    """The least recently used result is evicted first."""
    cache = CompileCache(10_000)
    for number in range(20):
        cache.put(bytes([number]), CompileResult("g" * 1_000))
        assert cache.get(b"\0") is not None

        assert cache.size_in_bytes <= 10_000
    kept = [number for number in range(20) if cache.get(bytes([number]))]

    assert [0, 15, 16, 17, 18, 19] == kept
    cache.put(b"huge", CompileResult("g" * 20_000))
    assert 0 == cache.size_in_bytes
