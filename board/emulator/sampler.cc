#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "kernels.h"

namespace rkemu {

namespace {

constexpr size_t kPenaltyWindow = 64;
constexpr int kMirostatSamples = 100;

float finite_or(float value, float low, float high, float fallback) {
  return std::isfinite(value) ? std::clamp(value, low, high) : fallback;
}

// Replaces NaN and minus infinity by the least float.
float ordered(float logit) {
  constexpr float kLeast = std::numeric_limits<float>::lowest();
  return logit >= kLeast ? logit : kLeast;
}

}  // namespace

void Sampler::start(const Sampling& given) {
  const Sampling usual;
  sampling_ = given;
  sampling_.top_p = finite_or(given.top_p, 0.0f, 1.0f, usual.top_p);
  sampling_.temperature = finite_or(given.temperature, 0.0f, 100.0f, usual.temperature);
  sampling_.repeat_penalty = finite_or(given.repeat_penalty, 0.01f, 100.0f, usual.repeat_penalty);
  sampling_.frequency_penalty = finite_or(given.frequency_penalty, -2.0f, 2.0f, 0.0f);
  sampling_.presence_penalty = finite_or(given.presence_penalty, -2.0f, 2.0f, 0.0f);
  sampling_.mirostat_tau = finite_or(given.mirostat_tau, 0.0f, 100.0f, usual.mirostat_tau);
  sampling_.mirostat_eta = finite_or(given.mirostat_eta, 0.0f, 1.0f, usual.mirostat_eta);
  mu_ = 2 * sampling_.mirostat_tau;
  recent_.clear();
}

void Sampler::accept(int32_t token) {
  recent_.push_back(token);
  if (recent_.size() > kPenaltyWindow) recent_.pop_front();
}

bool Sampler::greedy() const {
  return sampling_.temperature <= 0 || sampling_.top_k == 1;
}

void Sampler::penalize(std::vector<Candidate>& candidates) const {
  std::map<int32_t, int> counts;
  for (const int32_t token : recent_) ++counts[token];
  for (const auto& [token, count] : counts) {
    float& logit = candidates[static_cast<size_t>(token)].logit;
    logit = logit > 0 ? logit / sampling_.repeat_penalty : logit * sampling_.repeat_penalty;
    logit -= static_cast<float>(count) * sampling_.frequency_penalty + sampling_.presence_penalty;
  }
}

int32_t Sampler::pick(const std::vector<float>& logits) {
  if (greedy()) {
    const auto less = [](float a, float b) { return ordered(a) < ordered(b); };
    return static_cast<int32_t>(std::max_element(logits.begin(), logits.end(), less) -
                                logits.begin());
  }
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (const float logit : logits) {
    candidates.push_back({ordered(logit), static_cast<int32_t>(candidates.size()), 0});
  }
  penalize(candidates);
  const auto before = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const bool has_mirostat = sampling_.mirostat == 1 || sampling_.mirostat == 2;
  const auto k = sampling_.top_k > 0 && !has_mirostat
                     ? std::min(static_cast<size_t>(sampling_.top_k), candidates.size())
                     : candidates.size();
  std::partial_sort(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(k),
                    candidates.end(), before);
  candidates.resize(k);
  const auto soften = [&](float temperature) {
    double sum = 0;
    const float best = candidates[0].logit;
    for (Candidate& c : candidates) sum += c.p = exp_f32((c.logit - best) / temperature);
    for (Candidate& c : candidates) c.p = static_cast<float>(c.p / sum);
  };
  if (has_mirostat) {
    soften(sampling_.temperature);
    return mirostat(candidates);
  }
  soften(1.0f);
  double mass = 0;
  size_t kept = 0;
  while (kept < candidates.size() && (kept == 0 || mass < sampling_.top_p))
    mass += candidates[kept++].p;
  candidates.resize(kept);
  soften(sampling_.temperature);
  return draw(candidates);
}

int32_t Sampler::draw(const std::vector<Candidate>& candidates) {
  double sum = 0;
  for (const Candidate& c : candidates) sum += c.p;
  double left = random() * sum;
  for (const Candidate& c : candidates) {
    left -= c.p;
    if (left < 0) return c.id;
  }
  return candidates.back().id;
}

// Basu et al., "Mirostat", 2020: cut the candidates so that the surprise of the answer stays near
// tau.
int32_t Sampler::mirostat(std::vector<Candidate>& candidates) {
  size_t kept = 1;
  if (sampling_.mirostat == 1) {
    double numerator = 0, denominator = 0;
    const size_t m = std::min<size_t>(kMirostatSamples, candidates.size());
    for (size_t i = 0; i + 1 < m; ++i) {
      const double t = std::log(static_cast<double>(i + 2) / static_cast<double>(i + 1));
      const double b = std::log(std::max(1e-30, static_cast<double>(candidates[i].p)) /
                                std::max(1e-30, static_cast<double>(candidates[i + 1].p)));
      numerator += t * b;
      denominator += t * t;
    }
    const double s = denominator > 0 ? numerator / denominator : 1;
    const double epsilon = s - 1;
    const double n = static_cast<double>(candidates.size());
    const double k = std::pow((epsilon * std::pow(2.0, mu_)) / (1 - std::pow(n, -epsilon)),
                              1 / std::max(s, 1e-3));
    if (k > 1) kept = k < n ? static_cast<size_t>(k) : candidates.size();
  } else {
    while (kept < candidates.size() && -std::log2(std::max(1e-30f, candidates[kept].p)) <= mu_)
      ++kept;
  }
  candidates.resize(kept);
  double sum = 0;
  for (const Candidate& c : candidates) sum += c.p;
  const int32_t token = draw(candidates);
  for (const Candidate& c : candidates) {
    if (c.id != token) continue;
    const double surprise = -std::log2(std::max(1e-30, c.p / sum));
    mu_ -= sampling_.mirostat_eta * (static_cast<float>(surprise) - sampling_.mirostat_tau);
  }
  return token;
}

// splitmix64
double Sampler::random() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

}  // namespace rkemu
