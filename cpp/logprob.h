// The softmax of one row of logits, and its largest ones.

#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

namespace lminf_python {

// Natural log of the sum of exp(logit): a token's log-probability is its logit less this.
double log_sum_exp(const float * logits, int32_t n_vocab);

// The n tokens with the largest logits (all, if there are fewer, or if others are impossible: -infinity), the largest
// first; of equal ones that with the smaller id first.
// Throws error_type::context if a logit is not a number.
std::vector<llama_token> largest(const float * logits, int32_t n_vocab, size_t n);

inline float logprob(const float * logits, int32_t n_vocab, llama_token token) {
    return static_cast<float>(logits[token] - log_sum_exp(logits, n_vocab));
}

} // namespace lminf_python
