"""rkllm.h as data: every field, enum value, callback and function once, with the range of releases that have it.

Types are written as in the header, fields are in memory order. `since` and `until` are releases, both included.
Source: public headers of airockchip/rknn-llm, releases 1.0.0 to 1.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from rkruntime.abi.releases import OLDEST


class Field(NamedTuple):
    """A member of a struct or union. An empty name is an unnamed union: its members count as the struct's."""

    type: str
    name: str
    since: str = OLDEST
    until: str = ""


class Value(NamedTuple):
    """A value of an enum."""

    name: str
    value: int
    since: str = OLDEST
    until: str = ""


class Param(NamedTuple):
    """A parameter of a function or callback."""

    type: str
    name: str


@dataclass(frozen=True)
class Function:
    """A function that the library exports, or the type of a callback that it accepts."""

    name: str
    returns: str
    params: tuple[Param, ...]
    since: str = OLDEST
    until: str = ""


STRUCTS: Final[dict[str, tuple[Field, ...]]] = {
    "Token": (
        Field("float", "logprob", "1.0.1", "1.0.2b"),
        Field("int", "id", "1.0.1", "1.0.2b"),
    ),
    "RKLLMExtendParam": (
        Field("int32_t", "base_domain_id", "1.1.0"),
        Field("int8_t", "embed_flash", "1.2.0"),
        Field("int8_t", "enabled_cpus_num", "1.2.0"),
        Field("uint32_t", "enabled_cpus_mask", "1.2.0"),
        Field("uint8_t", "n_batch", "1.2.1"),
        Field("int8_t", "use_cross_attn", "1.2.1"),
        Field("uint8_t[112]", "reserved", "1.1.0", "1.1.4"),
        Field("uint8_t[106]", "reserved", "1.2.0", "1.2.1b1"),
        Field("uint8_t[104]", "reserved", "1.2.1"),
    ),
    "RKLLMParam": (
        Field("const char *", "modelPath", "1.0.0", "1.0.0"),
        Field("const char *", "model_path", "1.0.1"),
        Field("const char *", "target_platform", "1.0.0", "1.0.0"),
        Field("int32_t", "num_npu_core", "1.0.0", "1.0.2b"),
        Field("int32_t", "max_context_len"),
        Field("int32_t", "max_new_tokens"),
        Field("int32_t", "top_k"),
        Field("int32_t", "n_keep", "1.2.0"),
        Field("float", "top_p"),
        Field("float", "temperature"),
        Field("float", "repeat_penalty"),
        Field("float", "frequency_penalty"),
        Field("float", "presence_penalty"),
        Field("int32_t", "mirostat"),
        Field("float", "mirostat_tau"),
        Field("float", "mirostat_eta"),
        Field("bool", "logprobs", "1.0.1", "1.0.2b"),
        Field("int32_t", "top_logprobs", "1.0.1", "1.0.2b"),
        Field("bool", "use_gpu", "1.0.1", "1.0.2b"),
        Field("bool", "skip_special_token", "1.1.0"),
        Field("bool", "ignore_eos_token", "1.3.0"),
        Field("bool", "is_async", "1.1.0"),
        Field("const char *", "img_start", "1.1.0", "1.2.3"),
        Field("const char *", "img_end", "1.1.0", "1.2.3"),
        Field("const char *", "img_content", "1.1.0", "1.2.3"),
        Field("RKLLMExtendParam", "extend_param", "1.1.0"),
    ),
    "RKLLMLoraAdapter": (
        Field("const char *", "lora_adapter_path", "1.1.0"),
        Field("const char *", "lora_adapter_name", "1.1.0"),
        Field("float", "scale", "1.1.0"),
    ),
    "RKLLMEmbedInput": (
        Field("float *", "embed", "1.1.0"),
        Field("size_t", "n_tokens", "1.1.0"),
    ),
    "RKLLMTokenInput": (
        Field("int32_t *", "input_ids", "1.1.0"),
        Field("size_t", "n_tokens", "1.1.0"),
    ),
    # The header nests these two without names.
    "RKLLMImageInput": (
        Field("float *", "image_embed", "1.3.0"),
        Field("size_t", "n_image_tokens", "1.3.0"),
        Field("size_t", "n_image", "1.3.0"),
        Field("const char *", "image_start", "1.3.0"),
        Field("const char *", "image_end", "1.3.0"),
        Field("const char *", "image_content", "1.3.0"),
        Field("size_t", "image_width", "1.3.0"),
        Field("size_t", "image_height", "1.3.0"),
    ),
    "RKLLMVideoInput": (
        Field("float *", "video_embed", "1.3.0"),
        Field("size_t", "n_frame_tokens", "1.3.0"),
        Field("size_t", "n_frame_per_video", "1.3.0"),
        Field("size_t", "n_video", "1.3.0"),
        Field("const char *", "video_start", "1.3.0"),
        Field("const char *", "video_end", "1.3.0"),
        Field("const char *", "video_content", "1.3.0"),
        Field("size_t", "frame_width", "1.3.0"),
        Field("size_t", "frame_height", "1.3.0"),
    ),
    "RKLLMMultiModalInput": (
        Field("char *", "prompt", "1.1.0"),
        Field("float *", "image_embed", "1.1.0", "1.2.3"),
        Field("size_t", "n_image_tokens", "1.1.0", "1.2.3"),
        Field("size_t", "n_image", "1.2.1b1", "1.2.3"),
        Field("size_t", "image_width", "1.2.1b1", "1.2.3"),
        Field("size_t", "image_height", "1.2.1b1", "1.2.3"),
        Field("RKLLMImageInput", "image", "1.3.0"),
        Field("RKLLMVideoInput", "video", "1.3.0"),
        # Of this member only the size is known, not its fields; all zeros mean no audio.
        Field("uint64_t[6]", "audio", "1.3.1"),
    ),
    "RKLLMInput": (
        Field("const char *", "role", "1.2.1"),
        Field("bool", "enable_thinking", "1.2.1"),
        Field("RKLLMInputType", "input_type", "1.1.0"),
        Field("RKLLMInputUnion", "", "1.1.0"),
    ),
    "RKLLMLoraParam": (Field("const char *", "lora_adapter_name", "1.1.0"),),
    "RKLLMPromptCacheParam": (
        Field("int", "save_prompt_cache", "1.1.0"),
        Field("const char *", "prompt_cache_path", "1.1.0"),
    ),
    "RKLLMCrossAttnParam": (
        Field("float *", "encoder_k_cache", "1.2.1"),
        Field("float *", "encoder_v_cache", "1.2.1"),
        Field("float *", "encoder_mask", "1.2.1"),
        Field("int32_t *", "encoder_pos", "1.2.1"),
        Field("int", "num_tokens", "1.2.1"),
    ),
    "RKLLMSamplingParam": (
        Field("int32_t", "top_k", "1.3.0"),
        Field("float", "top_p", "1.3.0"),
        Field("float", "temperature", "1.3.0"),
        Field("float", "repeat_penalty", "1.3.0"),
        Field("float", "frequency_penalty", "1.3.0"),
        Field("float", "presence_penalty", "1.3.0"),
        Field("int32_t", "mirostat", "1.3.0"),
        Field("float", "mirostat_tau", "1.3.0"),
        Field("float", "mirostat_eta", "1.3.0"),
    ),
    "RKLLMInferParam": (
        Field("RKLLMInferMode", "mode", "1.1.0"),
        Field("RKLLMLoraParam *", "lora_params", "1.1.0"),
        Field("RKLLMPromptCacheParam *", "prompt_cache_params", "1.1.0"),
        Field("RKLLMSamplingParam *", "sampling_params", "1.3.0"),
        Field("int", "keep_history", "1.2.0"),
        Field("int32_t", "max_new_tokens", "1.3.0"),
    ),
    "RKLLMResultLastHiddenLayer": (
        Field("const float *", "hidden_states", "1.1.0"),
        Field("int", "embd_size", "1.1.0"),
        Field("int", "num_tokens", "1.1.0"),
    ),
    "RKLLMResultLogits": (
        Field("const float *", "logits", "1.2.0"),
        Field("int", "vocab_size", "1.2.0"),
        Field("int", "num_tokens", "1.2.0"),
    ),
    "RKLLMPerfStat": (
        Field("float", "prefill_time_ms", "1.2.1"),
        Field("int", "prefill_tokens", "1.2.1"),
        Field("float", "generate_time_ms", "1.2.1"),
        Field("int", "generate_tokens", "1.2.1"),
        Field("float", "memory_usage_mb", "1.2.1"),
    ),
    "RKLLMResult": (
        Field("const char *", "text", "1.0.1"),
        Field("Token *", "tokens", "1.0.1", "1.0.2b"),
        Field("int", "num", "1.0.1", "1.0.2b"),
        Field("int32_t", "token_id", "1.1.0"),
        Field("RKLLMResultLastHiddenLayer", "last_hidden_layer", "1.1.0"),
        Field("RKLLMResultLogits", "logits", "1.2.0"),
        Field("RKLLMPerfStat", "perf", "1.2.1"),
    ),
    "RKLLMCallback": (
        Field("LLMResultCallback", "result_callback", "1.3.0"),
        Field("void *", "result_userdata", "1.3.0"),
        Field("LLMTokenizerCallback", "tokenizer_callback", "1.3.0"),
        Field("void *", "tokenizer_userdata", "1.3.0"),
        Field("LLMGetEmbedCallback", "embed_callback", "1.3.0"),
        Field("void *", "embed_userdata", "1.3.0"),
    ),
}

UNIONS: Final[dict[str, tuple[Field, ...]]] = {
    "RKLLMInputUnion": (
        Field("const char *", "prompt_input", "1.1.0"),
        Field("RKLLMEmbedInput", "embed_input", "1.1.0"),
        Field("RKLLMTokenInput", "token_input", "1.1.0"),
        Field("RKLLMMultiModalInput", "multimodal_input", "1.1.0"),
    ),
}

UNNAMED: Final = frozenset({"RKLLMImageInput", "RKLLMVideoInput", "RKLLMInputUnion"})
"""Types that have a name only here, not in the header."""

FORMER_NAMES: Final = {"RKLLMMultiModalInput": ("RKLLMMultiModelInput", "1.2.2")}
"""A type's name in older headers, and the last release with it."""

ENUMS: Final[dict[str, tuple[Value, ...]]] = {
    "LLMCallState": (
        Value("LLM_RUN_NORMAL", 0, "1.0.0", "1.0.2b"),
        Value("LLM_RUN_FINISH", 1, "1.0.0", "1.0.2b"),
        Value("LLM_RUN_ERROR", 2, "1.0.0", "1.0.2b"),
        Value("RKLLM_RUN_NORMAL", 0, "1.1.0"),
        Value("RKLLM_RUN_WAITING", 1, "1.1.0"),
        Value("RKLLM_RUN_FINISH", 2, "1.1.0"),
        Value("RKLLM_RUN_ERROR", 3, "1.1.0"),
        Value("RKLLM_RUN_GET_LAST_HIDDEN_LAYER", 4, "1.1.0", "1.1.4"),
    ),
    "RKLLMInputType": (
        Value("RKLLM_INPUT_PROMPT", 0, "1.1.0"),
        Value("RKLLM_INPUT_TOKEN", 1, "1.1.0"),
        Value("RKLLM_INPUT_EMBED", 2, "1.1.0"),
        Value("RKLLM_INPUT_MULTIMODAL", 3, "1.1.0"),
    ),
    "RKLLMInferMode": (
        Value("RKLLM_INFER_GENERATE", 0, "1.1.0"),
        Value("RKLLM_INFER_GET_LAST_HIDDEN_LAYER", 1, "1.1.0"),
        Value("RKLLM_INFER_GET_LOGITS", 2, "1.2.0"),
    ),
}

_RESULT = (Param("RKLLMResult *", "result"), Param("void *", "userdata"), Param("LLMCallState", "state"))

CALLBACKS: Final[tuple[Function, ...]] = (
    Function(
        "LLMResultCallback",
        "void",
        (Param("const char *", "result"), Param("void *", "userdata"), Param("LLMCallState", "state")),
        until="1.0.0",
    ),
    Function("LLMResultCallback", "void", _RESULT, since="1.0.1", until="1.2.1b1"),
    Function("LLMResultCallback", "int", _RESULT, since="1.2.1"),
    Function(
        "LLMTokenizerCallback",
        "int",
        (
            Param("void *", "userdata"),
            Param("const char *", "text"),
            Param("int32_t", "text_len"),
            Param("int32_t *", "tokens"),
            Param("int32_t", "n_tokens_max"),
        ),
        since="1.3.0",
    ),
    Function(
        "LLMGetEmbedCallback",
        "int",
        (
            Param("void *", "userdata"),
            Param("int32_t *", "tokens"),
            Param("uint64_t", "num_tokens"),
            Param("void *", "embed"),
            Param("uint64_t", "len"),
        ),
        since="1.3.0",
    ),
)

_HANDLE = Param("LLMHandle", "handle")
_RUN = (
    _HANDLE,
    Param("RKLLMInput *", "rkllm_input"),
    Param("RKLLMInferParam *", "rkllm_infer_params"),
    Param("void *", "userdata"),
)
_INIT = (Param("LLMHandle *", "handle"), Param("RKLLMParam *", "param"))

FUNCTIONS: Final[tuple[Function, ...]] = (
    Function("rkllm_createDefaultParam", "RKLLMParam", ()),
    Function(
        "rkllm_init",
        "int",
        (Param("LLMHandle *", "handle"), Param("RKLLMParam", "param"), Param("LLMResultCallback", "callback")),
        until="1.0.2b",
    ),
    Function("rkllm_init", "int", (*_INIT, Param("LLMResultCallback", "callback")), since="1.1.0", until="1.2.3"),
    Function("rkllm_init", "int", (*_INIT, Param("RKLLMCallback *", "callback")), since="1.3.0"),
    Function("rkllm_load_lora", "int", (_HANDLE, Param("RKLLMLoraAdapter *", "lora_adapter")), since="1.1.0"),
    Function("rkllm_load_prompt_cache", "int", (_HANDLE, Param("const char *", "prompt_cache_path")), since="1.1.0"),
    Function("rkllm_release_prompt_cache", "int", (_HANDLE,), since="1.1.0"),
    Function("rkllm_destroy", "int", (_HANDLE,)),
    Function(
        "rkllm_run",
        "int",
        (_HANDLE, Param("const char *", "prompt"), Param("void *", "userdata")),
        until="1.0.2b",
    ),
    Function("rkllm_run", "int", _RUN, since="1.1.0"),
    Function("rkllm_run_async", "int", _RUN, since="1.1.0"),
    Function("rkllm_abort", "int", (_HANDLE,), since="1.0.1"),
    Function("rkllm_is_running", "int", (_HANDLE,), since="1.1.0"),
    Function(
        "rkllm_clear_kv_cache",
        "int",
        (_HANDLE, Param("int", "keep_system_prompt")),
        since="1.2.0",
        until="1.2.1b1",
    ),
    Function(
        "rkllm_clear_kv_cache",
        "int",
        (_HANDLE, Param("int", "keep_system_prompt"), Param("int *", "start_pos"), Param("int *", "end_pos")),
        since="1.2.1",
    ),
    Function("rkllm_get_kv_cache_size", "int", (_HANDLE, Param("int *", "cache_sizes")), since="1.2.1"),
    Function(
        "rkllm_set_chat_template",
        "int",
        (
            _HANDLE,
            Param("const char *", "system_prompt"),
            Param("const char *", "prompt_prefix"),
            Param("const char *", "prompt_postfix"),
        ),
        since="1.2.0",
    ),
    Function(
        "rkllm_set_function_tools",
        "int",
        (
            _HANDLE,
            Param("const char *", "system_prompt"),
            Param("const char *", "tools"),
            Param("const char *", "tool_response_str"),
        ),
        since="1.2.1",
    ),
    Function(
        "rkllm_set_cross_attn_params",
        "int",
        (_HANDLE, Param("RKLLMCrossAttnParam *", "cross_attn_params")),
        since="1.2.1",
    ),
)
