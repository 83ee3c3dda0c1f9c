// The choice of the next token, with the steps in llama.cpp's order (the vendor's runtime is said
// to be a fork of it): penalties, then either mirostat or top-k, top-p, temperature and a draw.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

namespace rkemu {

// Values as a client gave them; Sampler replaces those that make no sense.
struct Sampling {
  int32_t top_k = 40;
  float top_p = 0.9f;
  float temperature = 0.8f;
  float repeat_penalty = 1.1f;
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  int32_t mirostat = 0;
  float mirostat_tau = 5.0f;
  float mirostat_eta = 0.1f;
};

class Sampler {
 public:
  explicit Sampler(uint64_t seed) : state_(seed) {}

  // Starts a run: forgets the tokens seen and mirostat's state; the random numbers go on.
  void start(const Sampling& sampling);
  // Notes a token for the penalties.
  void accept(int32_t token);
  // Picks from logits [vocab].
  int32_t pick(const std::vector<float>& logits);

 private:
  struct Candidate {
    float logit;
    int32_t id;
    float p;
  };

  bool greedy() const;
  // Only before the candidates are sorted: their index is their id.
  void penalize(std::vector<Candidate>& candidates) const;
  int32_t draw(const std::vector<Candidate>& candidates);
  int32_t mirostat(std::vector<Candidate>& candidates);
  double random();

  Sampling sampling_;
  std::deque<int32_t> recent_;
  float mu_ = 0;
  uint64_t state_;
};

}  // namespace rkemu
