// A client of layout 6 for machines without Python: loads a model, runs a prompt of token ids, prints the answer's
// ids and the bits of all logits, folded into one number.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "abi.h"

namespace {

uint64_t bits = 14695981039346656037u;

int on_result(RKLLMResult* result, void*, LLMCallState state) {
  if (state == RKLLM_RUN_FINISH) return 0;
  std::printf("%d ", result->token_id);
  const auto count = static_cast<size_t>(result->logits.num_tokens) *
                     static_cast<size_t>(result->logits.vocab_size);
  const auto* bytes = reinterpret_cast<const unsigned char*>(result->logits.logits);
  for (size_t i = 0; i < count * sizeof(float); ++i) bits = (bits ^ bytes[i]) * 1099511628211u;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  RKLLMParam param = rkllm_createDefaultParam();
  param.model_path = argv[1];
  param.top_k = 1;
  param.max_new_tokens = 24;
  param.max_context_len = 256;
  LLMHandle handle = nullptr;
  if (rkllm_init(&handle, &param, on_result) != 0) return 1;
  std::vector<int32_t> ids;
  for (int i = 2; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
  RKLLMInput input{};
  input.role = "user";
  input.input_type = RKLLM_INPUT_TOKEN;
  input.token_input = {ids.data(), ids.size()};
  RKLLMInferParam infer{};
  infer.mode = RKLLM_INFER_GET_LOGITS;
  const int status = rkllm_run(handle, &input, &infer, nullptr);
  std::printf("\n%016" PRIx64 "\n", bits);
  return status == 0 && rkllm_destroy(handle) == 0 ? 0 : 1;
}
