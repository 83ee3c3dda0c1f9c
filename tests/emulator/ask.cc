// A program of another project: asks a model every line of stdin and prints the
// answers, like the vendor's demo. Built against abi.h for the layout of the
// library that it will find.
#include <cstdio>
#include <iostream>
#include <string>

#include "abi.h"

namespace {

decltype(LLMResultCallback()(nullptr, nullptr, RKLLM_RUN_NORMAL))
on_result(RKLLMResult *result, void *, LLMCallState state) {
  if (state == RKLLM_RUN_NORMAL)
    std::printf("%s", result->text);
  if (state == RKLLM_RUN_FINISH)
    std::printf("\n");
  if (state == RKLLM_RUN_ERROR)
    std::printf("run error\n");
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  return 0;
#endif
}

int init(LLMHandle *handle, RKLLMParam *param) {
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  RKLLMCallback callback{};
  callback.result_callback = on_result;
  return rkllm_init(handle, param, &callback);
#else
  return rkllm_init(handle, param, on_result);
#endif
}

} // namespace

int main(int, char **argv) {
  RKLLMParam param = rkllm_createDefaultParam();
  param.model_path = argv[1];
  param.max_context_len = 512;
  param.max_new_tokens = 128;
  param.top_k = 1;
  param.skip_special_token = 1;
  LLMHandle handle = nullptr;
  if (init(&handle, &param) != 0) {
    std::printf("rkllm init failed\n");
    return 1;
  }
  RKLLMInferParam infer{};
  for (std::string line; std::printf("\nuser: "),
                         std::getline(std::cin, line) && line != "exit";) {
    RKLLMInput input{};
    input.input_type = RKLLM_INPUT_PROMPT;
    input.prompt_input = line.c_str();
    std::printf("robot: ");
    rkllm_run(handle, &input, &infer, nullptr);
  }
  return rkllm_destroy(handle);
}
