"""Converts between the generator's protobuf and plain values."""

from dataclasses import replace

import grpc

from tokenizer_svc.generator.load import LoadReport
from tokenizer_svc.generator.types import (
    CompletionReport,
    Finished,
    GenerateCommand,
    GeneratorFinishReason,
    GeneratorInfo,
    TokenIdLogprobs,
    TokenUpdate,
)
from trivium.generator.v1 import generator_pb2
from trivium.generator.v1.generator_pb2_grpc import GeneratorServiceStub as GeneratorStub

__all__ = ["GeneratorStub"]

Command = generator_pb2.GenerateRequest
Response = generator_pb2.GenerateResponse
Call = grpc.aio.StreamStreamCall[generator_pb2.GenerateRequest, generator_pb2.GenerateResponse]
GENERATOR_SERVICE = "trivium.generator.v1.GeneratorService"

_FINISH_REASONS = {
    generator_pb2.FINISH_REASON_STOP_TOKEN: GeneratorFinishReason.STOP_TOKEN,
    generator_pb2.FINISH_REASON_LENGTH: GeneratorFinishReason.LENGTH,
    generator_pb2.FINISH_REASON_STOPPED: GeneratorFinishReason.STOPPED,
}


def start_command(start: GenerateCommand) -> generator_pb2.GenerateRequest:
    """The first message to the generator."""
    options, constraint = start.options, start.constraint
    command = generator_pb2.StartGeneration(
        revision=start.revision,
        prompt_token_ids=start.token_ids,
        sampling=options.sampling,
        n=options.n,
        max_new_tokens=start.max_new_tokens,
        min_new_tokens=options.min_tokens,
        stop_token_ids=options.stop_token_ids,
        ignore_eos=options.ignore_eos,
        top_logprobs=options.top_logprobs,
        prompt_logprobs=max(options.prompt_alternatives, default=None),
        bad_words=[generator_pb2.TokenSequence(token_ids=word) for word in start.bad_words],
        # Stop strings have to be searched for as tokens arrive.
        whole=start.whole and not options.stop,
        sends_report=True,
    )
    if constraint is not None:
        kind = {constraint.kind.value: constraint.text}
        command.constraint.CopyFrom(generator_pb2.Constraint(**kind))
    return generator_pb2.GenerateRequest(start=command)


def stop_command(index: int) -> generator_pb2.GenerateRequest:
    """A later message to the generator: stop this sequence, its text is complete."""
    return generator_pb2.GenerateRequest(stop=generator_pb2.StopSequence(index=index))


def report_command(report: CompletionReport) -> generator_pb2.GenerateRequest:
    """The last message to the generator: the completion report."""
    return generator_pb2.GenerateRequest(
        report=generator_pb2.CompletionReport(
            completion_tokens=report.completion_tokens,
            reasoning_tokens=report.reasoning_tokens,
            finish_reasons=report.finish_reasons,
        )
    )


def updates(response: generator_pb2.GenerateResponse) -> list[TokenUpdate]:
    """The updates in a generator message."""
    found = [
        TokenUpdate(
            index=update.index,
            token_ids=tuple(update.token_ids),
            logprobs=tuple(map(_logprobs, update.logprobs)) if update.logprobs else (),
            finished=_finished(update.finished) if update.HasField("finished") else None,
        )
        for update in response.updates
    ]
    if response.prompt_logprobs:
        scores = tuple(map(_logprobs, response.prompt_logprobs))
        found[0] = replace(found[0], prompt_logprobs=scores)
    return found


def _logprobs(entry: generator_pb2.TokenLogprobs) -> TokenIdLogprobs:
    return TokenIdLogprobs(
        entry.logprob, tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True)), entry.rank
    )


def _finished(finished: generator_pb2.Finished) -> Finished:
    return Finished(
        reason=_FINISH_REASONS[finished.reason],
        completion_tokens=finished.completion_tokens,
        cached_prompt_tokens=finished.cached_prompt_tokens,
        device_nanoseconds=finished.device_nanoseconds,
    )


def load_request() -> generator_pb2.WatchLoadRequest:
    """Subscribes to a generator's load reports."""
    return generator_pb2.WatchLoadRequest()


def load_report(response: generator_pb2.WatchLoadResponse) -> LoadReport:
    """A generator's load report."""
    return LoadReport(
        waiting_sequences=response.waiting_sequences,
        running_sequences=response.running_sequences,
        free_slots=response.free_slots,
        waiting_prompt_tokens=response.waiting_prompt_tokens,
    )


def generator_info_request() -> generator_pb2.GetModelInfoRequest:
    """Asks what a generator serves."""
    return generator_pb2.GetModelInfoRequest()


def generator_info(response: generator_pb2.GetModelInfoResponse) -> GeneratorInfo:
    """What a generator serves."""
    return GeneratorInfo(response.revision, response.context_length, response.instance_id)
