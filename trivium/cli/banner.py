"""What `trivium up` prints once everything is ready. Only formats text; makes no calls."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from trivium.cli.pipeline import Pipeline
from trivium.cli.stage_tls import StageTls
from trivium.generator.v1 import generator_pb2
from trivium.host_limits import CpuLimit, MemoryLimit

QUESTION = "What is the capital of France?"
BEGINNING = "The capital of France is"  # for base models
MEBIBYTE = 2**20
# Stream events a second that a tokenizer handles; a facade handles a third more.
EVENTS_PER_CORE = 4_500


def banner(
    infos: Sequence[generator_pb2.GetModelInfoResponse],
    weights: Sequence[int],
    pipeline: Pipeline,
    keys: bool,
    limits: tuple[CpuLimit, MemoryLimit],
    disabled: Collection[str] = (),
    has_chat_template: bool = True,
) -> str:
    """Facts, addresses, and two snippets that work when pasted.

    `weights` are the bytes of each model's weights. `keys`: whether an API key is required.
    `disabled`: which of chat, docs, metrics and reflection are turned off. `has_chat_template`:
    whether the first model has one.
    """
    models = zip(infos, weights, pipeline.aliases or [None] * len(infos), strict=True)
    facts = [fact for info, size, alias in models for fact in _model(info, size, alias)]
    metrics = ", ".join(pipeline.facade_metrics_urls)
    facts += [
        ("host", "; ".join(map(str, limits))),
        ("services", _services(pipeline)),
        ("REST", f"{pipeline.url}/v1"),
        (
            "gRPC",
            f"{pipeline.chat_target}  (trivium.chat.v1.ChatService, {_grpc(pipeline, disabled)})",
        ),
        ("chat", f"{pipeline.url}/  (in a browser)"),
        ("docs", f"{pipeline.url}/docs"),
        ("metrics", metrics),
        *_tls(pipeline.tls),
        ("health", f"{pipeline.url}/health"),
    ]
    facts = [(name, value) for name, value in facts if name not in disabled]
    lines = ["", "Trivium is ready. Ctrl-C drains and stops it.", ""]
    lines += [f"  {name:<9}{value}" for name, value in facts]
    model, url = infos[0].id, pipeline.url
    lines += [
        "",
        curl(model, url, keys, has_chat_template),
        "",
        openai_python(model, url, keys, has_chat_template),
    ]
    return "\n".join(lines) + "\n"


def _model(
    info: generator_pb2.GetModelInfoResponse, weight_bytes: int, alias: str | None
) -> list[tuple[str, str]]:
    names = f"{info.id} or {alias}" if alias else info.id
    return [
        ("model", f"{names}  (revision {info.revision}, {info.precision or 'unknown'} weights)"),
        ("runs on", f"{info.execution_provider}, {info.dtype}" + _why(info.cuda_unavailable)),
        ("context", f"{info.context_length:,} tokens"),
        ("slots", f"{info.slots} concurrent sequences"),
        (
            "memory",
            f"{weight_bytes / MEBIBYTE:,.0f} MiB of weights, "
            f"up to {info.kv_cache_bytes / MEBIBYTE:,.0f} MiB of KV cache",
        ),
        (
            "limits",
            f"n up to {info.max_n}; {info.max_queued_requests:,} requests or "
            f"{info.max_queued_tokens:,} prompt tokens in the queue",
        ),
    ]


def _grpc(pipeline: Pipeline, disabled: Collection[str]) -> str:
    over = "plaintext" if pipeline.tls.chat is None else "TLS"
    return over if "reflection" in disabled else f"{over}, reflection on"


def _tls(tls: StageTls) -> list[tuple[str, str]]:
    """What clients need to know about TLS besides https:// in the address."""
    if tls.certificate is None:
        return []
    clients = "clients need certificates too; " if tls.is_mutual else ""
    return [
        (
            "TLS",
            f"certificate {tls.certificate}; {clients}set SSL_CERT_FILE for curl and Python if "
            "they do not trust its CA",
        )
    ]


def _why(cuda_unavailable: str) -> str:
    return f"  (CUDA is unavailable: {cuda_unavailable})" if cuda_unavailable else ""


def _services(pipeline: Pipeline) -> str:
    """The running services, and when more would help (CPU time per event: bench/README.md)."""
    counts = (
        (pipeline.facades, "facade"),
        (pipeline.tokenizers, "tokenizer"),
        (len(pipeline.models), "generator"),
    )
    running = ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts)
    return (
        f"{running}; start more with --facades and --tokenizers if one of these saturates a core "
        f"(about {EVENTS_PER_CORE:,} events/s) and other cores are idle"
    )


def curl(model: str, url: str, keys: bool, has_chat_template: bool) -> str:
    """A shell command that asks a question."""
    path = "chat/completions" if has_chat_template else "completions"
    prompt = (
        {"messages": [{"role": "user", "content": QUESTION}]}
        if has_chat_template
        else {"prompt": BEGINNING}
    )
    body = {"model": model, **prompt}
    authorisation = ' -H "Authorization: Bearer $OPENAI_API_KEY"' if keys else ""
    return (
        f"curl {url}/v1/{path} -H 'Content-Type: application/json'{authorisation} "
        f"-d '{json.dumps(body)}'"
    )


def openai_python(model: str, url: str, keys: bool, has_chat_template: bool) -> str:
    """The same as Python code for the `openai` package."""
    key = "" if keys else ', api_key="none"'
    lines = ["from openai import OpenAI", f'client = OpenAI(base_url="{url}/v1"{key})']
    if has_chat_template:
        lines += [
            f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
            f'answer = client.chat.completions.create(model="{model}", messages=messages)',
            "print(answer.choices[0].message.content)",
        ]
    else:
        lines += [
            f'answer = client.completions.create(model="{model}", prompt="{BEGINNING}")',
            "print(answer.choices[0].text)",
        ]
    return "\n".join(lines)
