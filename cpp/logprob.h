// Log-softmax of one row of logits, for one token.

#pragma once

#include "llama.h"

#include <algorithm>
#include <cmath>

namespace lminf_python {

inline float logprob(const float * logits, int32_t n_vocab, llama_token token) {
    const float max = *std::max_element(logits, logits + n_vocab);
    double      sum = 0.0;
    for (int32_t i = 0; i < n_vocab; i++) {
        sum += std::exp(logits[i] - max);
    }
    return static_cast<float>(static_cast<double>(logits[token]) - max - std::log(sum));
}

} // namespace lminf_python
