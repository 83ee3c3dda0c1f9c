#include "faults.h"

#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <thread>

#include "log.h"

namespace rkemu {

// Texts as they were reported: "rknn-llm N" is an issue of airockchip/rknn-llm, others are named.
const std::vector<Fault>& fault_table() {
  static const std::vector<Fault> table{
      // rknn-llm 62
      {"alloc-12", Stage::memory, Act::fail, 1427746880,
       "E RKNN: %T failed to allocate handle, ret: -1, errno: 12, errstr: Cannot allocate memory\n"
       "E RKNN: %T failed to malloc npu memory, size: %V, flags: 0x2\n"
       "E RKNN: %T load model file error!"},
      // rknn-llm 437, 232
      {"alloc-14", Stage::memory, Act::fail, 4022272000,
       "E RKNN: %T failed to allocate handle, ret: -1, errno: 14, errstr: Bad address\n"
       "E RKNN: %T failed to malloc npu memory, size: %V, flags: 0x2\n"
       "E RKNN: %T load model file error!"},
      // rockchip-linux/rknn-toolkit2 218: a kernel whose NPU has no IOMMU
      {"alloc-22", Stage::memory, Act::fail, 6421360,
       "E RKNN    : failed to allocate handle, ret: -1, errno: 22, errstr: Invalid argument\n"
       "E RKNN    : failed to malloc npu memory!, size: %V, flags: 0xa"},
      // rknn-llm 17, 26, 47, 62
      {"alloc-24", Stage::memory, Act::fail, 1020,
       "E RKNN: %T failed to convert handle(%V) to fd, ret: -1, errno: 24, errstr: Too many open "
       "files"},
      // a kernel without the vendor's driver
      {"alloc-38", Stage::memory, Act::fail, 6120,
       "E RKNN: %T failed to allocate fd, ret: -1, errno: 38, errstr: Function not implemented\n"
       "E RKNN: %T failed to malloc npu memory, size: %V, flags: 0xa"},
      // rknn-llm 522: a second handle in one process
      {"second-init", Stage::second_init, Act::segv, 0,
       "E RKNN: %T failed to malloc npu memory\nE rkllm: rkllm_init failed"},
      // rk-llama.cpp 15
      {"host-memory", Stage::open, Act::fail, 60480,
       "ggml_aligned_malloc: insufficient memory (attempted to allocate %V.00 MB)"},
      // rknn-llm 334
      {"no-device", Stage::open, Act::fail, 0,
       "E RKNN: %T failed to open rknpu module, need to insmod rknpu dirver!\n"
       "E RKNN: %T failed to open rknn device!\n"
       "E RKNN: %T Device is not available\nGet device properties failed"},
      // rockchip-linux/rknn-toolkit2 534: a link to the wrong device node
      {"wrong-node", Stage::open, Act::segv, 0,
       "E RKNN: %T Meet unsupported target type: 0xffffffff"},
      // rknn-llm 39, 59
      {"platform-query", Stage::open, Act::fail, 0, "Query platform error!"},
      // rknn-llm 416
      {"platform-name", Stage::open, Act::fail, 0,
       "Platform error: must be either RK3588, RK3576, RV1126B, or RK3562.\nYour platform is "
       "lite."},
      {"platform-mismatch", Stage::open, Act::fail, 0,
       "E rkllm: model's target_platform does not match the real platform"},
      // rkllama 55
      {"bad-model", Stage::open, Act::fail, 0, "E rkllm: invalid rkllm model!"},
      // ezrknpu 11
      {"bad-magic", Stage::open, Act::fail, 0,
       "E RKNN: %T invalid rknn llm model magic\nE RKNN: %T load model file error!\n"
       "rknn_init fail! ret=-1"},
      // rk3588_npu_llm_server 2
      {"model-too-old", Stage::open, Act::fail, 0,
       "Warning: The model version is too old, please use the latest toolkit to reconvert the "
       "model!\n"
       "RKLLM: failed to load model '%M'!!!"},
      // rknn-llm 279
      {"tensor-count", Stage::open, Act::fail, 311,
       "E rkllm: wrong number of tensors, expected %V, got 255"},
      // rknn-llm 389
      {"assert", Stage::open, Act::abort, 0,
       ":0: GGML_ASSERT(hparams.rope_scaling_type_train != LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED) "
       "failed"},
      // rkllama 60
      {"context", Stage::open, Act::fail, 8192,
       "E rkllm: max_context[%V] must be less than the model's max_context_limit[4096]"},
      {"few-cpus", Stage::open, Act::fail, 0,
       "E rkllm: The number of enabled CPUs must be greater than or equal to the number of NPU "
       "cores."},
      // rknn-llm 44, 129, 156: 1.1.x returned 0 all the same
      {"false-success", Stage::open, Act::pretend, 0,
       "E RKNN: %T invalid rknn llm model magic\nE RKNN: %T load model file error!\n"
       "rknn_init fail! ret=-1"},
      {"segv-init", Stage::open, Act::segv, 0, ""},
      // rknn-llm 175: a file that was cut
      {"bus-init", Stage::open, Act::bus, 0, ""},
      // rknn-llm 518
      {"ill-init", Stage::open, Act::ill, 0, ""},
      {"exit-init", Stage::open, Act::exit, 0, ""},
      {"hang-init", Stage::open, Act::hang, 0, ""},
      {"slow-init", Stage::open, Act::sleep, 1000, ""},
      // rknn-llm 390, 449: driver 0.8
      {"old-driver", Stage::run, Act::rubbish, 0,
       "E rkllm: matmul(w8a8) run failed\nE rkllm: matmul(w8a8) run failed"},
      // rknn-llm 306, 85
      {"job-timeout", Stage::token, Act::fail, 1,
       "E RKNN: %T failed to submit!, op id: 0, op name: Unknown, flags: 0x5, task start: 972, "
       "task "
       "number: 1, run task counter: 0, int status: 0x200\n"
       "E rkllm: matmul(w8a8) run failed\n"
       "E RKNN: %T failed to sync memory, ret: -1, errno: 22, errstr: Invalid argument"},
      {"error-token", Stage::token, Act::fail, 1, "E rkllm: decode failed"},
      // rknn-llm 509
      {"segv-run", Stage::run, Act::segv, 0, ""},
      {"segv-token", Stage::token, Act::segv, 1, ""},
      {"exit-token", Stage::token, Act::exit, 1, ""},
      {"hang-token", Stage::token, Act::hang, 1, ""},
      {"slow-token", Stage::token, Act::sleep, 1, ""},
      // rknn-llm 320
      {"lost-run", Stage::none, Act::lose_run, 0, ""},
      {"lost-finish", Stage::none, Act::lose_finish, 0, ""},
      // rknn-llm 396
      {"null-text", Stage::none, Act::null_text, 0, ""},
      // rkllm-cli's README
      {"cut-text", Stage::none, Act::cut_text, 0, ""},
  };
  return table;
}

namespace {

std::string filled(const char* lines, int64_t value, const std::string& model_path) {
  std::string text;
  for (const char* at = lines; *at; ++at) {
    if (*at != '%') {
      text += *at;
      continue;
    }
    ++at;
    text += *at == 'T' ? time_of_day() : *at == 'V' ? std::to_string(value) : model_path;
  }
  return text;
}

// A crash as a real one is: no handler of the client's, no unwinding.
[[noreturn]] void die(int signal) {
  std::signal(signal, SIG_DFL);
  std::raise(signal);
  ::_exit(128 + signal);
}

}  // namespace

std::string time_of_day() {
  struct timeval now {};
  ::gettimeofday(&now, nullptr);
  struct tm local {};
  ::localtime_r(&now.tv_sec, &local);
  return format("[%02d:%02d:%02d.%03d]", local.tm_hour, local.tm_min, local.tm_sec,
                static_cast<int>(now.tv_usec / 1000));
}

Faults Faults::from_environment() {
  Faults faults;
  const std::string wanted = env_text("RKEMU_FAULT");
  for (size_t at = 0; at < wanted.size();) {
    const size_t end = std::min(wanted.find(',', at), wanted.size());
    const std::string entry = wanted.substr(at, end - at);
    const size_t equals = std::min(entry.find('='), entry.size());
    const auto& table = fault_table();
    const auto found = std::find_if(table.begin(), table.end(), [&](const Fault& fault) {
      return entry.compare(0, equals, fault.name) == 0;
    });
    if (found == table.end()) throw failure("emulator: there is no RKEMU_FAULT " + entry);
    faults.faults_.push_back(*found);
    if (equals < entry.size()) {
      faults.faults_.back().value = std::strtoll(entry.c_str() + equals + 1, nullptr, 10);
    }
    at = end + 1;
  }
  return faults;
}

bool Faults::has(Act act) const {
  return std::any_of(faults_.begin(), faults_.end(),
                     [act](const Fault& fault) { return fault.act == act; });
}

bool Faults::strike(Stage stage, const std::string& model_path, int64_t token) const {
  bool pretend = false;
  for (const Fault& fault : faults_) {
    if (fault.stage != stage ||
        (stage == Stage::token && fault.act != Act::sleep && fault.value != token)) {
      continue;
    }
    const std::string lines = filled(fault.lines, fault.value, model_path);
    if (fault.act == Act::fail) throw Failure(lines);
    if (!lines.empty()) raw(lines);
    switch (fault.act) {
      case Act::segv:
        die(SIGSEGV);
      case Act::bus:
        die(SIGBUS);
      case Act::ill:
        die(SIGILL);
      case Act::abort:
        die(SIGABRT);
      case Act::exit:
        ::_exit(1);
      case Act::hang:
        while (true) ::pause();
      case Act::sleep:
        std::this_thread::sleep_for(std::chrono::milliseconds(fault.value));
        break;
      case Act::pretend:
        pretend = true;
        break;
      default:
        break;
    }
  }
  return pretend;
}

}  // namespace rkemu
