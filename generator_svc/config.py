"""Settings of generator_svc, read once at startup from TRIVIUM_GENERATOR_… variables."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from generator_svc.prompt_batches import MIN_REUSED_TOKENS
from trivium.keys.settings import REFLECTION, STAGE_KEYS_FILE, AccessSettings
from trivium.usage_log import USAGE_LOG, USAGE_LOG_BACKUPS, USAGE_LOG_MAX_BYTES
from trivium.wire.listening import Host
from trivium.wire.serving import MAX_CONNECTION_AGE_SECONDS

# Defaults when the model runs on CUDA. max_sequence_length never exceeds the model's context.
CUDA_DEFAULTS = {
    "slots": 256,
    "max_sequence_length": 8192,
    "kv_memory_share": 0.9,
    "max_num_batched_tokens": 2048,
    "step_timeout_seconds": 300.0,
}


class GeneratorSettings(AccessSettings):
    """Every setting of generator_svc."""

    model_config = SettingsConfigDict(
        env_prefix="TRIVIUM_GENERATOR_",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
    )

    model_directory: Path = Field(description="Model folder. Its name becomes the model id.")
    host: Host = Field("127.0.0.1", description="Address to listen on, for gRPC and metrics.")
    port: int = Field(
        50052, ge=0, le=65535, description="Port of the gRPC server; 0 picks a free one."
    )
    metrics_port: int = Field(
        9052,
        ge=0,
        le=65535,
        description="Port of the HTTP server with /metrics, /healthz and /livez, never over TLS; "
        "0 turns it off.",
    )
    api_keys_file: Path | None = Field(None, description=STAGE_KEYS_FILE)
    reflection: bool = Field(True, description=REFLECTION)
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum level of log lines."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="json: one JSON object per line; text: human-readable."
    )
    log_name: str = Field("generator_svc", description="Name of this process in its log lines.")
    usage_log: str | None = Field(None, description=USAGE_LOG)
    usage_log_max_bytes: int = Field(100 * 2**20, ge=2**20, description=USAGE_LOG_MAX_BYTES)
    usage_log_backups: int = Field(20, ge=1, le=10_000, description=USAGE_LOG_BACKUPS)
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Device that runs the model. auto: CUDA if available, otherwise the CPU; the "
        "log, trivium_engine_info and GetModelInfo give the reason. cuda: fail to start if CUDA "
        "is unavailable.",
    )
    cuda_graphs: bool = Field(
        True,
        description="Capture decode steps as CUDA graphs at startup, for a set of batch sizes; "
        "disabled with a warning if capturing fails. Not supported with precision fp32.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads per run on the CPU. 0: one per physical core in the affinity mask, "
        "limited by the cgroup's CPU quota (rounded down) and to 16, or to one per 64 MiB of "
        "weights if that is more.",
    )
    slots: int = Field(
        32,
        ge=1,
        le=4096,
        description="Maximum number of running sequences (vLLM's max_num_seqs); fewer if memory "
        f"is short. On CUDA the default is {CUDA_DEFAULTS['slots']}.",
    )
    max_sequence_length: int = Field(
        4096,
        ge=16,
        description="Maximum tokens per sequence, prompt plus completion (vLLM's "
        "max_model_len); capped at the model's context length. If neither this nor "
        "kv_cache_bytes is set, it is reduced if memory is short. On CUDA the default is "
        f"{CUDA_DEFAULTS['max_sequence_length']}.",
    )
    kv_cache_bytes: int = Field(
        0,
        ge=0,
        description="Size of the KV cache in bytes. 0: kv_memory_share of the memory that "
        "remains after the weights, but at least one slot.",
    )
    kv_memory_share: float = Field(
        0.5,
        gt=0,
        le=0.95,
        description="Share of free memory for the KV cache. On the CPU: of main memory (within "
        "the lowest cgroup limit), as an upper bound, since slots take memory on first use. On "
        "CUDA: of the device memory that is free once the model has been loaded and run, "
        f"allocated at startup; the default is {CUDA_DEFAULTS['kv_memory_share']}.",
    )
    prefix_cache: bool = Field(
        True,
        description="Reuse the KV cache of common prompt prefixes. Finished answers are "
        "re-prefilled while the engine is idle, so that the next turn hits the cache too. Where "
        "prompts are prefilled together (max_prefill_batch_size), prefixes of fewer than "
        f"{MIN_REUSED_TOKENS} tokens are recomputed, which is faster there.",
    )
    prefill_stall_ms: int = Field(
        100,
        ge=1,
        description="Prefill time budget per step (ms) while sequences are decoding; up to 4x "
        "that if more prompts are pending than sequences are decoding. Higher: lower TTFT, more "
        "tokens per second; lower: shorter inter-token stalls.",
    )
    max_num_batched_tokens: int = Field(
        512,
        ge=8,
        description="Maximum tokens per step: prompt tokens, plus one for each decoding "
        "sequence. Prompts get at least 32 of them. While sequences are decoding, "
        "prefill_stall_ms is usually the tighter bound. On CUDA the default is "
        f"{CUDA_DEFAULTS['max_num_batched_tokens']}.",
    )
    max_prefill_batch_size: int = Field(
        0,
        ge=0,
        le=256,
        description="Maximum prompts prefilled in one run, padded to a common length; prompts "
        "with a cached prefix and chunks of prompts run on their own. 0: 32 on CUDA; 1 on the "
        "CPU, where padding costs as much as batching saves. Requires a model folder with "
        "exporter_version 5 or later in its trivium_export.json.",
    )
    max_n: int = Field(128, ge=1, le=128, description="Maximum n of a request.")
    max_queued_requests: int = Field(
        512,
        ge=1,
        description="Maximum requests waiting for a slot; further ones are rejected with 429.",
    )
    max_queued_tokens: int = Field(
        400_000,
        ge=1,
        description="Maximum prompt tokens waiting for a slot; further requests "
        "are rejected with 429.",
    )
    max_messages_per_second: float = Field(
        600.0,
        gt=0,
        description="Message rate (per second) above which the tokens of a stream are merged, so "
        "that delivery takes a bounded share of a core in each stage. The interval between two "
        "messages of a stream is then the number of streams divided by this rate. First and last "
        "tokens are sent immediately and do not count.",
    )
    max_message_interval_ms: int = Field(
        100,
        ge=0,
        le=5_000,
        description="Maximum of that interval (ms), even if it means more messages per second. "
        "0: every token is sent immediately.",
    )
    constraint_cache_bytes: int = Field(
        16 * 2**20, ge=0, description="Size of the LRU cache of compiled constraints, in bytes."
    )
    step_timeout_seconds: float = Field(
        0.0,
        ge=0,
        description="Seconds after which a step that is still running means that the device hangs: "
        "running calls fail as UNAVAILABLE, and the process exits with status 1, to be restarted. "
        "0: steps never time out, as on the CPU a large model may take minutes. On CUDA the "
        f"default is {CUDA_DEFAULTS['step_timeout_seconds']:g}.",
    )
    max_connection_age_seconds: float = Field(
        MAX_CONNECTION_AGE_SECONDS,
        ge=1,
        le=86_400,
        description="Seconds after which a connection is closed and the client has to reconnect. "
        "gRPC clients then resolve the generators' name again and load balancers pick again, so "
        "that new replicas get their share of calls within this time. The tokenizer does not "
        "depend on it.",
    )
    drain_notice_seconds: float = Field(
        5.0,
        ge=0,
        description="Seconds after a stop signal in which health checks fail, but calls are still "
        "accepted.",
    )
    drain_seconds: float = Field(
        30.0,
        ge=0,
        description="Seconds after that in which calls in flight may finish; the rest are aborted.",
    )

    def on(self, device: str, name: str) -> Any:
        """The value of a setting; its default depends on `device`, `cpu` or `cuda`."""
        if device == "cuda" and name not in self.model_fields_set:
            return CUDA_DEFAULTS[name]
        return getattr(self, name)
