"""What OpenAI specifies for each field, what Trivium does, and the test that shows it.

docs/compatibility.md is generated from these rows; a test checks that no field is missing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One field. `shown` is the id of a test, relative to tests/."""

    field: str
    openai: str
    ours: str
    shown: str


@dataclass(frozen=True)
class Keyword:
    """JSON Schema keywords, and what becomes of them in strict and in other schemas."""

    keywords: str
    strict: str
    otherwise: str


_V = "rest_facade/test_facade_validation.py::"
_C = "rest_facade/test_facade_completion.py::"
_F = "rest_facade/test_facade_tools.py::"
_T = "rest_facade/test_facade_text.py::"
_K = "rest_facade/test_facade_tokens.py::"
_R = "pipeline/test_pipeline_forms.py::"
_E = "rest_facade/test_facade_errors.py::"
_P = "pipeline/test_pipeline_answers.py::"
_ARRIVES = f"{_C}test_every_field_is_passed_on"
_REFUSED = f"{_V}test_refused_fields"
_FORMS = f"{_F}test_response_formats_are_passed_on"
_TEMPLATE = f"{_F}test_chat_template_fields_are_passed_on"
_NOT_PUBLISHED = "—"
_SAME = "the same"
_IGNORED = "accepted and ignored"
_NO = "400 `unsupported_parameter`"
_NO_VALUE = "400 `unsupported_value`"

CHAT_REQUEST = (
    Row(
        "model",
        "required",
        "required; 404 `model_not_found` if unknown",
        f"{_P}test_models",
    ),
    Row("messages", "required, at least one", _SAME, f"{_V}test_missing_fields"),
    Row(
        "messages[].role",
        "`developer`, `system`, `user`, `assistant`, `tool`, `function`",
        f"the same without `function`: {_NO_VALUE}",
        f"{_V}test_refused_messages",
    ),
    Row(
        "messages[].content",
        "text, or parts of text, image, audio, file",
        f"text, or parts of text; other parts {_NO_VALUE}",
        f"{_V}test_refused_messages",
    ),
    Row("messages[].name", "the speaker's name", "the same, for templates that show it", _ARRIVES),
    Row(
        "messages[].tool_calls",
        "calls of type `function` or `custom`",
        f"`function`; `custom` {_NO_VALUE}; arguments need not be JSON",
        f"{_F}test_arguments_in_history",
    ),
    Row(
        "messages[].tool_call_id",
        "required for role `tool`; must answer a call",
        "required for role `tool`; whether it answers a call is not checked",
        f"{_V}test_refused_messages",
    ),
    Row(
        "messages[].refusal",
        "an assistant's refusal",
        f"empty or null; text {_NO_VALUE}",
        f"{_V}test_refused_messages",
    ),
    Row("messages[].function_call", "deprecated", _NO, f"{_V}test_refused_messages"),
    Row("messages[].audio", "an earlier audio answer", _NO, f"{_V}test_refused_messages"),
    Row(
        "messages[].reasoning_content",
        _NOT_PUBLISHED,
        "extension: an assistant's reasoning; `reasoning` is an alias",
        f"{_F}test_reasoning_in_history",
    ),
    Row(
        "temperature",
        "0 to 2, default 1",
        "the same; the model's own default comes first",
        f"{_V}test_errors_have_openais_wording",
    ),
    Row(
        "top_p",
        "0 to 1, default 1",
        "the same; the model's own default comes first",
        f"{_V}test_errors_have_openais_wording",
    ),
    Row("presence_penalty", "-2 to 2", _SAME, _ARRIVES),
    Row("frequency_penalty", "-2 to 2", _SAME, _ARRIVES),
    Row(
        "logit_bias",
        "-100 to 100 by token id",
        "the same; unknown ids are 400",
        f"{_P}test_invalid_fields_are_named",
    ),
    Row(
        "max_completion_tokens",
        "maximum length of the answer, default the model's own limit",
        "the same, but no reasoning is hidden; default the end of the context, or "
        "TRIVIUM_TOKENIZER_DEFAULT_MAX_TOKENS",
        "tokenizer_svc/test_chat_service.py::test_default_max_tokens",
    ),
    Row(
        "max_tokens",
        "deprecated name of `max_completion_tokens`",
        "the same; both and different 400",
        f"{_C}test_max_tokens_is_an_alias",
    ),
    Row("stop", "a string or up to 4", _SAME, f"{_P}test_stop_strings_end_the_text_exactly"),
    Row(
        "seed",
        "best effort",
        "exact on the CPU, whatever else runs, under one `system_fingerprint`; -1 is none, as in "
        "vLLM",
        f"{_P}test_a_seed_gives_the_same_tokens_under_any_load",
    ),
    Row(
        "n",
        "1 to 128",
        "the same; the operator may set a lower maximum",
        f"{_P}test_choices_interleave_and_finish_independently",
    ),
    Row("stream", "server-sent events", _SAME, f"{_C}test_stream"),
    Row(
        "stream_options.include_usage",
        "a last chunk with the usage",
        _SAME,
        f"{_C}test_stream_usage",
    ),
    Row("stream_options.include_obfuscation", "default true", f"false; true {_NO_VALUE}", _REFUSED),
    Row(
        "stream_options.continuous_usage_stats",
        _NOT_PUBLISHED,
        "extension: counts in every chunk",
        f"{_C}test_continuous_usage",
    ),
    Row("logprobs", "whether to report them", _SAME, f"{_C}test_logprobs"),
    Row(
        "top_logprobs",
        "0 to 20, needs `logprobs`",
        "the same; 0 without `logprobs` is ignored",
        f"{_C}test_zero_top_logprobs_without_logprobs",
    ),
    Row(
        "response_format",
        "`text`, `json_object`, `json_schema`",
        "the same; a schema without `strict` is enforced too, [as far as possible](#json-schema)",
        f"{_R}test_a_schema_is_enforced",
    ),
    Row(
        "response_format.schema",
        _NOT_PUBLISHED,
        "extension, as in llama.cpp: the schema of `json_object` or `json_schema`, without a name; "
        "`value` is an alias, for TGI's and Hugging Face's clients",
        f"{_F}test_response_formats_are_passed_on",
    ),
    Row(
        "tools",
        "up to 128 of type `function` or `custom`",
        f"up to 128 of type `function`, which is the default, as in vLLM; `custom` {_NO_VALUE}; "
        "names must be unique",
        f"{_V}test_refused_tools",
    ),
    Row(
        "tools[].function.parameters",
        "a JSON Schema; omitted, the function has none",
        "the same; properties it does not list are not generated, unless it has "
        "`additionalProperties`; if it lists none, as `{}` or "
        '`{"type": "object"}`, the arguments are `{}`',
        "tokenizer_svc/test_grammar.py::test_a_function_without_parameters_gets_an_empty_object",
    ),
    Row(
        "tools[].function.strict",
        "arguments keep to the schema exactly",
        "the same for every schema that can be [enforced](#json-schema), else 400; without it the "
        "schema is enforced as far as possible",
        f"{_R}test_a_tool_schema_that_cannot_be_enforced_fails_no_request",
    ),
    Row(
        "tool_choice",
        "`none`, `auto`, `required`, a function, `allowed_tools`, a custom tool",
        f"`none`, `auto`, `required`, a function, `allowed_tools`; else {_NO_VALUE}; a call cut "
        "off by `max_tokens` is returned as far as it goes, and its markup is never content",
        f"{_R}test_forced_calls",
    ),
    Row(
        "tool_choice.allowed_tools",
        "with the modes `auto` and `required` only the tools listed are called",
        "the same, of functions, enforced by the constraint; the prompt has all tools, so that "
        "its cached prefix is reused",
        f"{_R}test_allowed_tools",
    ),
    Row("parallel_tool_calls", "default true", _SAME, f"{_F}test_tools_are_passed_on"),
    Row("functions", "deprecated", _NO, _REFUSED),
    Row("function_call", "deprecated", _NO, _REFUSED),
    Row(
        "reasoning_effort",
        "`none` to `max`",
        "`none` to `high`, if the model's template knows it, and `none` if the model does not "
        f"reason; `xhigh` and `max` {_NO_VALUE}",
        _TEMPLATE,
    ),
    Row("verbosity", "`low`, `medium`, `high`", f"`medium`; else {_NO_VALUE}", _REFUSED),
    Row("modalities", "`text`, `audio`", f"`text`; else {_NO_VALUE}", _REFUSED),
    Row("audio", "format of an audio answer", _NO, _REFUSED),
    Row("prediction", "predicted output", _NO, _REFUSED),
    Row("web_search_options", "web search", _NO, _REFUSED),
    Row("moderation", "moderated answers", _NO, _REFUSED),
    Row("store", "stores the answer", f"false; true {_NO_VALUE}: nothing is stored", _REFUSED),
    Row(
        "service_tier",
        "`auto`, `default`, `flex`, `priority`, …",
        f"`auto`, `default`, and the answer says `default`; else {_NO_VALUE}",
        f"{_F}test_service_tier",
    ),
    Row(
        "prompt_cache_key",
        "helps the cache",
        f"{_IGNORED}: prefixes are matched by their tokens",
        f"{_V}test_harmless_fields",
    ),
    Row(
        "prompt_cache_retention", "`in_memory`, `24h`", f"`in_memory`; `24h` {_NO_VALUE}", _REFUSED
    ),
    Row("prompt_cache_options", "explicit caching", _NO, _REFUSED),
    Row("safety_identifier", "the end user", _IGNORED, f"{_V}test_harmless_fields"),
    Row(
        "user",
        "the end user",
        "the same, up to 512 characters",
        f"{_V}test_errors_have_openais_wording",
    ),
    Row("metadata", "up to 16 key-value pairs", "the same; not used", _ARRIVES),
    Row("top_k", _NOT_PUBLISHED, "extension, as in vLLM: -1 or more", _ARRIVES),
    Row("min_p", _NOT_PUBLISHED, "extension, as in vLLM: 0 to 1", _ARRIVES),
    Row(
        "top_n_sigma",
        _NOT_PUBLISHED,
        "extension, as in llama.cpp: -1 to 100, 0 or less is off",
        "generator_svc/test_generator_sampler.py::test_top_n_sigma_keeps_logits_near_the_maximum",
    ),
    Row("repetition_penalty", _NOT_PUBLISHED, "extension, as in vLLM: above 0 to 10", _ARRIVES),
    Row(
        "min_tokens",
        _NOT_PUBLISHED,
        "extension, as in vLLM; more than the context has left is 400",
        f"{_P}test_token_limits_are_exact",
    ),
    Row("ignore_eos", _NOT_PUBLISHED, "extension, as in vLLM", f"{_P}test_token_limits_are_exact"),
    Row(
        "allowed_token_ids",
        _NOT_PUBLISHED,
        "extension, as in vLLM: 1 to 16,384, without end-of-sequence tokens that are not listed; "
        "log-probabilities are from before it, as with `logit_bias`; a structured output that is "
        "complete still ends where none of them fits; 400 `invalid_parameter_combination` if no "
        "token is left",
        f"{_R}test_only_allowed_tokens_are_generated",
    ),
    Row(
        "bad_words",
        _NOT_PUBLISHED,
        "extension, as in vLLM: up to 128 strings of up to 256 characters, but the form with a "
        "space before it is also excluded where it has another number of tokens; log-probabilities "
        "and the end of structured outputs as with `allowed_token_ids`",
        f"{_R}test_bad_words_are_not_generated",
    ),
    Row("stop_token_ids", _NOT_PUBLISHED, "extension, as in vLLM: up to 64", _TEMPLATE),
    Row("include_stop_str_in_output", _NOT_PUBLISHED, "extension, as in vLLM", _TEMPLATE),
    Row("skip_special_tokens", _NOT_PUBLISHED, "extension, as in vLLM", _TEMPLATE),
    Row(
        "truncate_prompt_tokens",
        _NOT_PUBLISHED,
        "extension, as in vLLM: the last so many tokens of the prompt are kept; -1: as many as fit "
        f"beside `max_tokens`; `truncation_side` `right` {_NO_VALUE}",
        "tokenizer_svc/test_completions.py::test_prompts_may_be_truncated",
    ),
    Row(
        "prompt_logprobs",
        _NOT_PUBLISHED,
        "extension, as in vLLM: 0 to 20, not with `stream`; the prompt is computed without the "
        "prefix cache, and an answer has at most 524,288, alternatives included",
        f"{_R}test_prompt_logprobs_have_ranks",
    ),
    Row(
        "return_token_ids",
        _NOT_PUBLISHED,
        "extension, as in vLLM: `prompt_token_ids` and `token_ids` in the answer",
        f"{_R}test_token_ids_are_returned",
    ),
    Row(
        "structured_outputs",
        _NOT_PUBLISHED,
        "extension, as in vLLM: one of `json`, `regex`, `choice`, `grammar`, `json_object`",
        f"{_R}test_constraints_are_enforced",
    ),
    Row(
        "guided_json",
        _NOT_PUBLISHED,
        "extension: vLLM's old name for `structured_outputs.json`",
        _FORMS,
    ),
    Row("guided_regex", _NOT_PUBLISHED, "extension: likewise for `regex`", _FORMS),
    Row("guided_choice", _NOT_PUBLISHED, "extension: likewise for `choice`", _FORMS),
    Row(
        "guided_grammar",
        _NOT_PUBLISHED,
        "extension: likewise for `grammar`, in llguidance's variant of Lark or GBNF",
        _FORMS,
    ),
    Row(
        "regex",
        _NOT_PUBLISHED,
        "extension: SGLang's name for `structured_outputs.regex`",
        _FORMS,
    ),
    Row(
        "ebnf",
        _NOT_PUBLISHED,
        "extension: SGLang's name for `structured_outputs.grammar`",
        _FORMS,
    ),
    Row(
        "json_schema",
        _NOT_PUBLISHED,
        "extension: SGLang's and llama-server's name for `structured_outputs.json`",
        _FORMS,
    ),
    Row(
        "chat_template_kwargs",
        _NOT_PUBLISHED,
        "extension, as in vLLM: those that the operator allows",
        _TEMPLATE,
    ),
    Row("continue_final_message", _NOT_PUBLISHED, "extension, as in vLLM", _TEMPLATE),
    Row("add_generation_prompt", _NOT_PUBLISHED, "extension, as in vLLM", _TEMPLATE),
    Row(
        "null",
        "the same as absence, where it is allowed",
        "the same for every optional field",
        f"{_C}test_null_is_the_same_as_omitted",
    ),
    Row(
        "unknown fields",
        "400",
        "ignored; known fields of vLLM or llama-server that are not supported are 400",
        f"{_V}test_harmless_fields",
    ),
)

CHAT_ANSWER = (
    Row(
        "object",
        "`chat.completion`, in chunks `chat.completion.chunk`",
        _SAME,
        f"{_C}test_non_streaming_answer",
    ),
    Row("id, created, model", "always there, the same in all chunks", _SAME, f"{_C}test_stream"),
    Row("system_fingerprint", "optional", "always there", f"{_C}test_non_streaming_answer"),
    Row("service_tier", "if the request named one", _SAME, f"{_F}test_service_tier"),
    Row(
        "choices[].message.content",
        "text or null",
        "null only with tool calls or reasoning",
        f"{_F}test_tool_calls",
    ),
    Row(
        "choices[].message.refusal",
        "text or null, always there",
        "null",
        f"{_C}test_non_streaming_answer",
    ),
    Row(
        "choices[].message.annotations",
        "always there, empty without a web search",
        "always empty; not in chunks, as with OpenAI",
        f"{_C}test_non_streaming_answer",
    ),
    Row("choices[].message.tool_calls", "absent or not empty", _SAME, f"{_F}test_tool_calls"),
    Row(
        "choices[].message.reasoning_content",
        _NOT_PUBLISHED,
        "extension: absent if there was no reasoning",
        f"{_F}test_reasoning",
    ),
    Row("choices[].logprobs", "object or null, always there", _SAME, f"{_C}test_logprobs"),
    Row(
        "choices[].logprobs.content[].bytes",
        "bytes or null",
        "always bytes, also for parts of a character",
        f"{_P}test_logprobs_match_the_text",
    ),
    Row(
        "choices[].finish_reason",
        "`stop`, `length`, `tool_calls`, …",
        "`stop`, `length`, `tool_calls`; `stop` for a call that `tool_choice` names, as OpenAI",
        f"{_R}test_forced_calls",
    ),
    Row(
        "choices[].delta",
        "a role chunk, content chunks, and an empty one with the finish reason",
        _SAME,
        f"{_C}test_stream",
    ),
    Row(
        "choices[].delta.tool_calls",
        "id, type and name in the first piece only, then arguments in pieces",
        _SAME,
        f"{_F}test_streamed_tool_calls",
    ),
    Row("choices[].delta.reasoning_content", _NOT_PUBLISHED, "extension", f"{_F}test_reasoning"),
    Row(
        "prompt_token_ids",
        _NOT_PUBLISHED,
        "extension, as in vLLM, with `return_token_ids`; in a stream in the first chunk",
        f"{_C}test_token_ids",
    ),
    Row(
        "prompt_logprobs",
        _NOT_PUBLISHED,
        "extension, as in vLLM, with the field of that name: null for the first token, then "
        "objects by token id",
        f"{_C}test_prompt_logprobs",
    ),
    Row(
        "choices[].token_ids",
        _NOT_PUBLISHED,
        "extension, as in vLLM, with `return_token_ids`: all tokens generated, also those without "
        "text and the one that ended the choice; in a stream those of each chunk",
        f"{_C}test_token_ids",
    ),
    Row("usage", "three counts and their details", _SAME, f"{_C}test_non_streaming_answer"),
    Row(
        "usage.completion_tokens_details.reasoning_tokens",
        "tokens of reasoning",
        _SAME,
        f"{_F}test_reasoning",
    ),
    Row(
        "usage.prompt_tokens_details.cached_tokens",
        "tokens from the cache",
        _SAME,
        f"{_P}test_a_second_turn_reuses_the_cached_prefix",
    ),
    Row(
        "usage.gpu_seconds",
        _NOT_PUBLISHED,
        "extension: the request's exact share of the device's time",
        f"{_P}test_streaming_and_unary_answers_are_equal",
    ),
    Row(
        "data: [DONE]",
        "ends a stream",
        "the same; a failed stream has none",
        f"{_E}test_error_mid_stream",
    ),
)

COMPLETION_REQUEST = (
    Row(
        "prompt",
        "a string, strings, token ids or lists of token ids",
        "the same, up to 128; required; text may contain special tokens, as in vLLM",
        f"{_T}test_all_forms_of_prompts_are_passed_on",
    ),
    Row(
        "max_tokens",
        "default 16, 0 or more",
        "the same, or `min_tokens` if larger; 0 with `echo` and `logprobs` scores the prompt; "
        "`max_completion_tokens` is an alias",
        "pipeline/test_pipeline_forms.py::test_echo_with_logprobs_scores_the_prompt",
    ),
    Row(
        "add_special_tokens",
        _NOT_PUBLISHED,
        "extension, as in vLLM: whether BOS and the like are added to text prompts; default true",
        "tokenizer_svc/test_completions.py::test_prompts_may_contain_control_tokens",
    ),
    Row(
        "echo",
        "the text begins with the prompt",
        "the same; with `logprobs` also those of the prompt's tokens, without the prefix cache: at "
        "most 524,288 in one answer, alternatives included",
        f"{_R}test_echo_with_logprobs_scores_the_prompt",
    ),
    Row("logprobs", "0 to 5", _SAME, f"{_T}test_completion_logprobs"),
    Row(
        "suffix",
        "for one model only",
        f"empty or null; else {_NO_VALUE}",
        f"{_T}test_refused_completion_fields",
    ),
    Row(
        "best_of", "1 to 20", f"1 or null; else {_NO_VALUE}", f"{_T}test_refused_completion_fields"
    ),
    Row(
        "model, temperature, top_p, n, seed, stop, stream, stream_options, user, "
        "presence_penalty, frequency_penalty, logit_bias",
        "as in chat",
        "as in chat",
        f"{_T}test_every_completion_field_is_passed_on",
    ),
    Row(
        "response_format, structured_outputs, top_k, …",
        _NOT_PUBLISHED,
        "extension: as in chat",
        f"{_T}test_every_completion_field_is_passed_on",
    ),
)

COMPLETION_ANSWER = (
    Row("object", "`text_completion`, in chunks too", _SAME, f"{_T}test_non_streaming_completion"),
    Row(
        "choices[].finish_reason",
        "`stop`, `length`, `content_filter`; null before the last chunk, which is not published",
        "`stop`, `length`; null before the last chunk",
        f"{_T}test_streaming_completion",
    ),
    Row(
        "choices[].logprobs",
        "parallel arrays; the sampled token is always in `top_logprobs`",
        _SAME,
        f"{_T}test_completion_logprobs",
    ),
    Row(
        "choices[].logprobs.token_logprobs[]",
        "numbers; null for an echoed prompt's first token, which is not published",
        _SAME,
        f"{_T}test_completion_logprobs",
    ),
    Row(
        "choices[].logprobs.top_logprobs[]",
        "objects; null likewise",
        _SAME,
        f"{_T}test_completion_logprobs",
    ),
    Row(
        "choices[].prompt_token_ids",
        _NOT_PUBLISHED,
        "extension, as in vLLM, with `return_token_ids`; in a stream in the choice's first chunk",
        f"{_T}test_token_ids_of_completions",
    ),
    Row(
        "choices[].token_ids",
        _NOT_PUBLISHED,
        "extension, as in chat",
        f"{_T}test_token_ids_of_completions",
    ),
    Row(
        "choices[].prompt_logprobs",
        _NOT_PUBLISHED,
        "extension, as in vLLM, with the field of that name",
        f"{_T}test_prompt_logprobs_of_completions",
    ),
    Row(
        "usage",
        "as in chat, over all prompts",
        "as in chat, `gpu_seconds` too",
        f"{_T}test_non_streaming_completion",
    ),
)

MODELS = (
    Row("GET /v1/models", "a list", _SAME, f"{_C}test_models"),
    Row("id, object, created, owned_by", "always there", _SAME, f"{_C}test_models"),
    Row("context_length", _NOT_PUBLISHED, "extension, as in OpenRouter", f"{_C}test_models"),
    Row(
        "max_model_len",
        _NOT_PUBLISHED,
        "extension, as in vLLM: the same number",
        f"{_C}test_models",
    ),
)

ERRORS = (
    Row(
        "error.message, error.type, error.param, error.code",
        "all four always there; `param` and `code` text or null",
        _SAME,
        f"{_E}test_errors_of_the_next_stage",
    ),
    Row(
        "wording",
        "names the field, the bound and the value",
        _SAME,
        f"{_V}test_errors_have_openais_wording",
    ),
    Row(
        "an error in a stream",
        '`data: {"error": …}`, and no `[DONE]`',
        _SAME,
        f"{_E}test_error_mid_stream",
    ),
    Row(
        "429",
        "with `Retry-After`",
        "the same, 1 to 60 seconds; 503 too",
        f"{_E}test_retry_after_is_from_1_to_60_seconds",
    ),
    Row(
        "unknown paths and methods",
        "404 and 405 with an error object",
        _SAME,
        f"{_E}test_unknown_paths_and_methods",
    ),
    Row(
        "x-request-id",
        "in every answer",
        "the same; a valid one sent by the client is kept",
        f"{_C}test_request_ids",
    ),
)

TOKENS = (
    Row(
        "POST /tokenize",
        _NOT_PUBLISHED,
        "as in vLLM, for a prompt or messages",
        f"{_K}test_tokenize_a_text",
    ),
    Row(
        "POST /tokenize: `return_token_strs`",
        _NOT_PUBLISHED,
        "as in vLLM: `token_strs` are the tokens as the vocabulary spells them",
        f"{_K}test_token_strings",
    ),
    Row("POST /detokenize", _NOT_PUBLISHED, "as in vLLM", f"{_K}test_detokenize"),
    Row(
        "GET, POST /tokenizer_info",
        _NOT_PUBLISHED,
        "as in vLLM: fields of tokenizer_config.json",
        f"{_K}test_tokenizer_info",
    ),
)

_ENFORCED = "enforced"
SCHEMA_KEYWORDS = (
    Keyword("`type`, `anyOf`, `allOf`", _ENFORCED, _ENFORCED),
    Keyword(
        "`enum`, `const`",
        "enforced; 400 with control characters except `\\b`, `\\f`, `\\n`, `\\r` and `\\t`, and "
        "with numbers of more than 15 digits that would be rounded",
        "enforced; dropped in these cases",
    ),
    Keyword(
        "`$ref`, `$defs`, `definitions`, `$anchor`",
        "enforced within the schema; else 400",
        "enforced within the schema; else dropped",
    ),
    Keyword(
        "`properties`, `required`, `additionalProperties`",
        "enforced, in the schema's order; if an object lists `properties` and has no keyword that "
        "allows others, such as `additionalProperties`, there are no others, as in vLLM",
        "the same",
    ),
    Keyword(
        "`patternProperties`",
        "enforced if no name can match two patterns; else 400",
        "the same; else every name may have any of their schemas",
    ),
    Keyword(
        "`minProperties`, `maxProperties`",
        "enforced if all of `properties` are required; else 400; `minProperties` greater than the "
        "number of `required` names plus one is 400 too, as additional names may repeat",
        "the same; else dropped; repeated names may count",
    ),
    Keyword(
        "`items`, `prefixItems`, `additionalItems`, `minItems`, `maxItems`", _ENFORCED, _ENFORCED
    ),
    Keyword("`minLength`, `maxLength`", _ENFORCED, _ENFORCED),
    Keyword(
        "`pattern`",
        "enforced, by ECMA-262; 400 with lookarounds, `\\b` or backreferences",
        "the same, without these",
    ),
    Keyword(
        "`format`",
        "`date-time`, `date`, `time`, `duration`, `email`, `hostname`, `ipv4`, `ipv6`, `uuid`, "
        "`uri` enforced; others 400",
        "the same; others dropped",
    ),
    Keyword(
        "`minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`",
        "enforced; bounds of more than 15 digits may be rounded inwards, to at most 2^63 - 1024",
        "the same; dropped beyond that",
    ),
    Keyword(
        "`multipleOf`",
        _ENFORCED,
        "enforced up to 10,000, not counting trailing zeros; else dropped",
    ),
    Keyword(
        "`oneOf`",
        "enforced if its schemas are clearly disjoint, such as by a required property that is a "
        "`const` or `enum` of strings; else 400",
        "as `anyOf`",
    ),
    Keyword(
        "`not`, `if`, `then`, `else`, `dependentRequired`, `dependentSchemas`, `dependencies`, "
        "`propertyNames`, `unevaluatedProperties`, `uniqueItems`, `contains`, `minContains`, "
        "`maxContains`, `unevaluatedItems`, `$dynamicRef`, `$dynamicAnchor`, "
        "`$recursiveRef`",
        "400, unless the value forbids nothing, such as `uniqueItems: false`",
        "dropped",
    ),
    Keyword("all others", "ignored", "ignored"),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "compatibility-chat-request": CHAT_REQUEST,
    "compatibility-chat-answer": CHAT_ANSWER,
    "compatibility-completion-request": COMPLETION_REQUEST,
    "compatibility-completion-answer": COMPLETION_ANSWER,
    "compatibility-models": MODELS,
    "compatibility-errors": ERRORS,
    "compatibility-tokens": TOKENS,
}


def markdown(rows: tuple[Row, ...]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| | OpenAI | Trivium | shown by |", "| --- | --- | --- | --- |"]
    for row in rows:
        file, _, test = row.shown.partition("::")
        name = f"`{row.field}`" if " " not in row.field else row.field
        lines.append(f"| {name} | {row.openai} | {row.ours} | [{test}](../tests/{file}) |")
    return "\n".join(lines) + "\n"


def keywords_markdown() -> str:
    """The treatment of JSON Schema keywords as a table in Markdown."""
    lines = ["| keyword | `strict` | otherwise |", "| --- | --- | --- |"]
    lines += [f"| {row.keywords} | {row.strict} | {row.otherwise} |" for row in SCHEMA_KEYWORDS]
    return "\n".join(lines) + "\n"
