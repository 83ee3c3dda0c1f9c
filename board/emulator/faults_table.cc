// Texts as they were reported: "rknn-llm N" is an issue of airockchip/rknn-llm, others are named.
// "strings" are texts in the vendor's library of 1.2.1b1, as a public analysis lists them.
#include "faults.h"

namespace rkemu {

const std::vector<Fault>& fault_table() {
  static const std::vector<Fault> table{
      // The NPU's memory.
      // rknn-llm 62
      {"alloc-12", Stage::memory, Act::fail, "npu-address-space-exhausted", "bytes", 1427746880,
       "E RKNN: %T failed to allocate handle, ret: -1, errno: 12, errstr: Cannot allocate memory\n"
       "E RKNN: %T failed to malloc npu memory, size: %V, flags: 0x2\n"
       "E RKNN: %T load model file error!",
       "the driver has no memory for a block; `rkllm_init` returns -1"},
      // rknn-llm 437, 195
      {"alloc-14", Stage::memory, Act::fail, "npu-address-space-exhausted", "bytes", 1427746880,
       "E RKNN: %T failed to allocate handle, ret: -1, errno: 14, errstr: Bad address\n"
       "E RKNN: %T failed to malloc npu memory, size: %V, flags: 0x2\n"
       "E RKNN: %T load model file error!",
       "the domain's 4 GiB are taken"},
      // rknn-llm 232
      {"old-driver-memory", Stage::memory, Act::fail, "npu-memory-old-driver", "bytes", 4022272000,
       "E RKNN: %T failed to allocate handle, ret: -1, errno: 14, errstr: Bad address\n"
       "E RKNN: %T failed to malloc npu memory, size: %V, flags: 0x2\n"
       "E RKNN: %T load model file error!",
       "driver 0.9.6: it warns, and refuses the block of weights", "", "0.9.6"},
      // rockchip-linux/rknn-toolkit2 44, 218: a kernel whose NPU has no IOMMU
      {"alloc-22", Stage::memory, Act::fail, "npu-no-iommu", "bytes", 6421360,
       "E RKNN    : failed to allocate handle, ret: -1, errno: 22, errstr: Invalid argument\n"
       "E RKNN    : failed to malloc npu memory!, size: %V, flags: 0xa",
       "the NPU has no IOMMU and needs contiguous memory",
       "RKNPU fdab0000.npu: RKNPU: rknpu iommu is disabled, using non-iommu mode\n"
       "RKNPU fdab0000.npu: swiotlb buffer is full (sz: %V bytes)"},
      // rknn-llm 17, 26, 47, 62
      {"alloc-24", Stage::memory, Act::fail, "fd-limit", "handle", 1020,
       "E RKNN: %T failed to convert handle(%V) to fd, ret: -1, errno: 24, errstr: Too many open "
       "files",
       "more buffers than files may be open"},
      // a kernel without the vendor's driver
      {"alloc-38", Stage::memory, Act::fail, "kernel-without-rknpu", "bytes", 6120,
       "E RKNN: %T failed to allocate fd, ret: -1, errno: 38, errstr: Function not implemented\n"
       "E RKNN: %T failed to malloc npu memory, size: %V, flags: 0xa",
       "the kernel lacks what the driver allocates from"},
      // rockchip-linux/kernel 387
      {"domain-broken", Stage::memory, Act::fail, "npu-domain-state-broken", "bytes", 4022272000,
       "E RKNN: %T failed to allocate handle, ret: -1, errno: 14, errstr: Bad address\n"
       "E RKNN: %T failed to malloc npu memory, size: %V, flags: 0x2\n"
       "E RKNN: %T load model file error!",
       "the driver has lost track of its domains; only a reboot helps",
       "mismatch domain get from iommu_get_domain_for_dev\n"
       "failed to switch iommu domain, id: 1, ret: -22\n"
       "RKNPU fdab0000.npu: RKNPU: rknpu_gem_get_pages: dma map %V fail"},
      // rknn-llm 522
      {"second-init", Stage::second_init, Act::segv, "second-init-or-crash-on-error", "", 0,
       "E RKNN: %T failed to malloc npu memory\nE rkllm: rkllm_init failed",
       "the second handle of a process is refused, and the process crashes"},
      // strings
      {"host-memory", Stage::memory, Act::fail, "host-ram-at-load", "bytes", 1179648000,
       "E rkllm: failed to malloc cpu memory, size: %V", "the board's RAM does not hold the model"},
      {"oom-killed", Stage::memory, Act::kill, "host-ram-at-load", "", 0, "",
       "the kernel ends the process while it loads (SIGKILL)",
       "Out of memory: Killed process 4242 (llm_demo)"},
      // rknn-llm 504
      {"leak", Stage::run, Act::leak, "", "MiB", 16, "",
       "each run keeps memory until the handle is destroyed"},
      // The device and its driver.
      // rknn-llm 334
      {"no-device", Stage::device, Act::fail, "npu-device-not-reachable", "", 0,
       "E RKNN: %T failed to open rknpu module, need to insmod rknpu dirver!\n"
       "E RKNN: %T failed to open rknn device!\n"
       "E RKNN: %T Device is not available\nGet device properties failed",
       "no NPU node may be opened"},
      // airockchip/rknn-toolkit2 534: a link to the wrong device node
      {"wrong-node", Stage::device, Act::segv, "npu-wrong-node", "", 0,
       "E RKNN: %T Meet unsupported target type: 0xffffffff",
       "the node is of another kind; SIGSEGV"},
      // rknn-llm 449, 390
      {"old-driver", Stage::none, Act::rubbish, "driver-too-old-run", "", 0,
       "E rkllm: matmul(w8a8) run failed",
       "driver 0.8.2: a warning, every matrix product fails, answers are exclamation marks", "",
       "0.8.2"},
      // rknn-llm 306, 85
      {"job-timeout", Stage::token, Act::stall, "npu-job-timeout", "token", 1,
       "E RKNN: %T failed to submit!, op id: 0, op name: Unknown, flags: 0x5, task start: 972, "
       "task number: 1, run task counter: 0, int status: 0x200\n"
       "E rkllm: matmul(w8a8) run failed",
       "a job does not end in 6 s (`RKEMU_JOB_LIMIT_MS`): `RKLLM_RUN_ERROR`, -1; so does every "
       "later "
       "run of the handle",
       "RKNPU: failed to wait job, task counter: 0, flags: 0x5, ret = 0, elapsed time: 6252728us\n"
       "RKNPU: job timeout, flags: 0x0:\nRKNPU: soft reset, num: 1"},
      // The SoC.
      // rknn-llm 39, 59
      {"platform-query", Stage::device, Act::fail, "platform-unsupported-or-unknown", "", 0,
       "Query platform error!", "the SoC cannot be asked for"},
      // rknn-llm 416, 530
      {"platform-name", Stage::device, Act::fail, "platform-unsupported-or-unknown", "", 0,
       "Platform error: must be either RK3588, RK3576, RV1126B, or RK3562.\nYour platform is "
       "unknown",
       "the SoC is not supported or not known"},
      // strings
      {"platform-mismatch", Stage::open, Act::fail, "platform-unsupported-or-unknown", "", 0,
       "E rkllm: the model's target_platform does not match the real platform",
       "the model is for another SoC"},
      {"few-cpus", Stage::open, Act::fail, "cpu-cores-below-npu-cores", "", 0,
       "E rkllm: The number of enabled CPUs must be greater than or equal to the number of NPU "
       "cores.",
       "fewer CPUs enabled than NPU cores"},
      // The model file.
      // rkllama 55, strings
      {"bad-model", Stage::open, Act::fail, "model-file-invalid", "", 0,
       "E rkllm: invalid magic number, got 64697270\nE rkllm: invalid rkllm model!",
       "the file is not a .rkllm file"},
      // ezrknpu 11
      {"bad-magic", Stage::open, Act::fail, "model-runtime-version-mismatch", "", 0,
       "E RKNN: %T invalid rknn llm model magic\nE RKNN: %T load model file error!\n"
       "rknn_init fail! ret=-1",
       "the file is of another generation (1.1.x)"},
      // rk3588_npu_llm_server 2
      {"model-too-old", Stage::open, Act::fail, "model-runtime-version-mismatch", "", 0,
       "Warning: The model version is too old, please use the latest toolkit to reconvert the "
       "model!\nRKLLM: failed to load model '%M'!!!",
       "the model is older than the runtime reads"},
      // a public board log
      {"model-too-new", Stage::open, Act::fail, "model-runtime-version-mismatch", "", 0,
       "E rkllm: The rkllm-runtime version is lower than the rkllm-toolkit version.\n"
       "Please update rkllm-runtime to 1.3.1 or higher.",
       "the model is newer than the runtime"},
      // rknn-llm 279
      {"tensor-count", Stage::open, Act::fail, "model-runtime-version-mismatch", "tensors", 311,
       "E rkllm: wrong number of tensors, expected %V, got 255",
       "an architecture that the runtime knows in part"},
      // rknn-llm 389
      {"assert", Stage::open, Act::abort, "model-runtime-version-mismatch", "", 0,
       ":0: GGML_ASSERT(hparams.rope_scaling_type_train != LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED) "
       "failed",
       "an assertion at load; SIGABRT"},
      // documentation of rkllm-rs
      {"no-tokenizer", Stage::run, Act::fail, "model-file-invalid", "", 0,
       "E rkllm: Tokenizer is unavailable: model has no internal tokenizer and no external "
       "tokenizer_callback provided.",
       "the model was exported without its tokenizer"},
      // rknn-llm 534
      {"wrong-eos", Stage::loaded, Act::endless, "model-runtime-version-mismatch", "", 0,
       "EOS token[0]: 11 '<jupyter_start>'",
       "the runtime reads a wrong end token: answers do not end"},
      // rknn-llm 44, 129, 156: 1.1.x returned 0 all the same
      {"false-success", Stage::open, Act::pretend, "model-runtime-version-mismatch", "", 0,
       "E RKNN: %T invalid rknn llm model magic\nE RKNN: %T load model file error!\n"
       "rknn_init fail! ret=-1",
       "the load fails in the log and returns 0; every run reports an error"},
      {"silent-failure", Stage::open, Act::pretend, "silent-or-wrong-status", "", 0,
       "E RKNN: %T load model file error!\nrknn_init fail! ret=-1",
       "the same, and the log names no reason"},
      // Context, cache, template.
      // rkllama 60
      {"context", Stage::open, Act::fail, "context-limit", "tokens", 8192,
       "E rkllm: max_context[%V] must be less than the model's max_context_limit[4096]",
       "`max_context` above the model's limit"},
      // strings
      {"long-prompt", Stage::run, Act::fail, "context-limit", "tokens", 5000,
       "E rkllm: the length of prompt is greater than max context (prompt: %V tokens, max context: "
       "4096)",
       "a prompt that is longer than the context"},
      // rknn-llm 144
      {"unknown-shape", Stage::none, Act::rubbish, "context-limit", "", 0,
       "E RKNN: meet unkown shape, op name: matmul_qkv_rkllm_spilt_1, shape: 64, 4160, 128\n"
       "2features matmul matmul run failed",
       "a context that the runtime has no matrix shapes for; answers are exclamation marks"},
      // rknn-llm 517
      {"no-prompt-cache", Stage::save, Act::skip, "prompt-or-kv-cache", "", 0,
       "W rkllm: The qwen35 model does not support saving prompt cache!",
       "a prompt cache is not saved"},
      // rknn-llm 420
      {"no-template", Stage::loaded, Act::no_template, "chat-template", "", 0,
       "W rkllm: Chat template auto-parsing failed: please configure it via "
       "rkllm_set_chat_template.",
       "the model's chat template is not used"},
      // Without a word.
      {"segv-init", Stage::open, Act::segv, "api-struct-or-library-mismatch", "", 0, "",
       "SIGSEGV in `rkllm_init`"},
      // rknn-llm 175: a file that was cut
      {"bus-init", Stage::open, Act::bus, "model-file-invalid", "", 0, "",
       "SIGBUS in `rkllm_init`, as with a file that was cut"},
      // rknn-llm 518
      {"ill-init", Stage::open, Act::ill, "api-struct-or-library-mismatch", "", 0, "",
       "SIGILL in `rkllm_init`, as with a library for another CPU"},
      {"exit-init", Stage::open, Act::exit, "", "", 0, "", "`exit(1)` in `rkllm_init`"},
      {"hang-init", Stage::open, Act::hang, "", "", 0, "", "`rkllm_init` never returns"},
      {"slow-init", Stage::open, Act::sleep, "", "ms", 1000, "",
       "`rkllm_init` takes that much longer"},
      // rknn-llm 509
      {"segv-run", Stage::run, Act::segv, "api-struct-or-library-mismatch", "", 0, "",
       "SIGSEGV at the beginning of a run, as with structures of another release"},
      {"segv-token", Stage::token, Act::segv, "api-struct-or-library-mismatch", "token", 1, "",
       "SIGSEGV before the N-th token of a run"},
      // rknn-llm 119, 129
      {"assert-token", Stage::token, Act::abort, "model-runtime-version-mismatch", "token", 1,
       ":0: GGML_ASSERT(view_src == NULL || data_size == 0 || data_size + view_offs <= "
       "ggml_nbytes(view_src)) failed",
       "an assertion there; SIGABRT"},
      {"exit-token", Stage::token, Act::exit, "", "token", 1, "", "`exit(1)` there"},
      {"hang-token", Stage::token, Act::hang, "", "token", 1, "",
       "that token is never reported; `rkllm_abort` does not help"},
      {"slow-token", Stage::token, Act::sleep, "", "ms", 1, "",
       "every token takes that much longer"},
      {"error-token", Stage::token, Act::fail, "", "token", 1, "E rkllm: decode failed",
       "`RKLLM_RUN_ERROR` there, -1"},
      // Callbacks and text.
      // rknn-llm 320, 208
      {"lost-run", Stage::none, Act::lose_run, "", "", 0, "",
       "`rkllm_run_async` returns 0 and no callback ever comes"},
      {"lost-finish", Stage::none, Act::lose_finish, "", "", 0, "", "no `RKLLM_RUN_FINISH`"},
      // rknn-llm 396
      {"null-text", Stage::none, Act::null_text, "", "", 0, "", "`text` is NULL in every callback"},
      // rkllm-cli's README
      {"cut-text", Stage::none, Act::cut_text, "utf8-split", "", 0, "",
       "`text` ends inside of characters, with state `RKLLM_RUN_NORMAL`"},
      // rknn-llm 424, 467
      {"padding", Stage::none, Act::padding, "output-quality-quantisation", "", 0, "[PAD151935]",
       "every token is padding, and no answer ends"},
      {"noise-init", Stage::open, Act::noise, "", "", 0, "rkllm debug: init",
       "a line on stdout while the model loads"},
      {"noise", Stage::token, Act::noise, "", "", 0, "rkllm debug: token",
       "a line on stdout for every token"},
  };
  return table;
}

}  // namespace rkemu
