// Conversion between the structures of this build's layout and the session's own. Everything that a
// client passes is checked here.
#pragma once

#include "abi.h"
#include "handles.h"
#include "session.h"

namespace rkemu {

const Rules& rules();
RKLLMParam default_param();
// Failure: a value that cannot be clamped to a usable one.
Settings settings_of(const RKLLMParam& param);
Request request_of(const RKLLMInput* input, const RKLLMInferParam* infer, const Session& session);

// A client's callbacks, in whatever form rkllm_init takes them in this layout.
struct Client {
  Deliver deliver;
  void* userdata = nullptr;
};
// Failure: there is no result callback. Adds the tokenizer and embedding callbacks to the settings.
Client client_of(RKLLMInitCallback callback, Settings& settings);

}  // namespace rkemu
