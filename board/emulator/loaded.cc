#include "loaded.h"

#include <algorithm>
#include <limits>
#include <thread>

#include "log.h"

namespace rkemu {

namespace {

constexpr long kMaxPause = 10'000'000;

// Leaves out parts of Gemma 2's attention and head that a runtime may lack, as the guesses say.
void guess(const Guesses& guesses, Config& config) {
  if (guesses.window_ignored) config.sliding_window = std::numeric_limits<int>::max();
  if (guesses.attention_uncapped) config.attn_softcap = 0;
  if (guesses.logits_uncapped) config.final_softcap = 0;
}

int threads_for(int cpus) {
  const auto hardware = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return std::clamp(cpus, 1, hardware);
}

}  // namespace

Engine::Engine(const File& file, const Config& config, int threads)
    : model(file, config),
      tokenizer(file, static_cast<size_t>(config.vocab_size)),
      pool(threads),
      forward(model, pool, choose_kernels()) {}

Loaded::Loaded(const Rules& release_rules, const Settings& given, Faults wanted, bool pretend)
    : rules(release_rules),
      settings(given),
      faults(std::move(wanted)),
      token_us(env_number("RKEMU_TOKEN_US", 0, 0, kMaxPause)),
      prompt_token_us(env_number("RKEMU_PROMPT_TOKEN_US", 0, 0, kMaxPause)) {
  if (!pretend) {
    file = File::open(settings.model_path);
    card = read_card(file);
    guess(settings.guesses, card.config);
    chat_template = card.chat_template;
    report();
    check();
    faults.strike(Stage::memory, settings.model_path);
    memory = Reservation(blocks_of(file, card, settings.max_context, settings.n_batch),
                         settings.domain, settings.device, rules.release);
    if (!file.sizes_only()) {
      weights = std::make_unique<Engine>(file, card.config, threads_for(settings.cpus));
    }
  }
  if (!settings.device.runs_jobs()) rubbish = "E rkllm: matmul(w8a8) run failed";
  if (const Fault* fault = faults.with(Act::rubbish)) rubbish = fault->lines;
  if (faults.with(Act::no_template)) chat_template = {};
}

void Loaded::report() const {
  std::string line =
      "rkllm-toolkit version: " + card.toolkit_version +
      format(", max_context_limit: %d, npu_core_num: %d", card.max_context, card.npu_cores);
  if (rules.names_platform) line += ", target_platform: " + card.target_platform;
  if (rules.names_dtype) line += ", model_dtype: " + card.dtype;
  info(line);
  info(format("emulator: no NPU is used, %s kernels, %d threads", choose_kernels().name,
              threads_for(settings.cpus)));
}

void Loaded::check() {
  if (settings.max_context <= 0) settings.max_context = std::min(512, card.max_context);
  if (settings.max_context > card.max_context) {
    throw failure(format("max_context[%d] must be less than the model's max_context_limit[%d]",
                         settings.max_context, card.max_context));
  }
  if (card.target_platform != settings.device.platform) {
    throw failure("model's target_platform does not match the real platform (" +
                  card.target_platform + ", " + settings.device.platform + ")");
  }
  if (version_number(card.toolkit_version) > version_number(rules.release)) {
    warn("runtime version is lower than the toolkit version, update to " + card.toolkit_version);
  }
  if (settings.cpus < card.npu_cores) {
    throw failure(
        "The number of enabled CPUs must be greater than or equal to the number of NPU cores.");
  }
}

Engine& Loaded::engine() const {
  if (!weights) throw failure("there are no weights to compute with");
  return *weights;
}

}  // namespace rkemu
