#include "logprob.h"

#include "errors.h"

#include <algorithm>
#include <cmath>

namespace lminf_python {

double log_sum_exp(const float * logits, int32_t n_vocab) {
    const float max = *std::max_element(logits, logits + n_vocab);
    double      sum = 0.0;
    for (int32_t i = 0; i < n_vocab; i++) {
        sum += std::exp(logits[i] - max);
    }
    return max + std::log(sum);
}

// Most logits are smaller than the n-th largest so far. They are looked at in stretches of which the compiler makes few
// instructions; so are those that are not a number, which no comparison finds smaller.
static constexpr int32_t n_stretch = 64;

static bool has_candidate(const float * logits, int32_t n, float bound) {
    int32_t found = 0;
    for (int32_t i = 0; i < n; i++) {
        found |= static_cast<int32_t>(!(logits[i] <= bound));
    }
    return found != 0;
}

std::vector<llama_token> largest(const float * logits, int32_t n_vocab, size_t n) {
    const auto before = [&](llama_token a, llama_token b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    };
    std::vector<llama_token> result;
    float                    bound = n > 0 ? -INFINITY : INFINITY; // what is not larger is not among the n largest

    const auto cut = [&] {
        std::nth_element(result.begin(), result.begin() + static_cast<std::ptrdiff_t>(n) - 1, result.end(), before);
        result.resize(n);
        bound = logits[result[n - 1]];
    };
    for (int32_t begin = 0; begin < n_vocab; begin += n_stretch) {
        const int32_t end = std::min(begin + n_stretch, n_vocab);
        if (!has_candidate(logits + begin, end - begin, bound)) {
            continue;
        }
        for (int32_t i = begin; i < end; i++) {
            if (std::isnan(logits[i])) {
                throw error(error_type::context, "the model computed logits that are not numbers");
            }
            if (logits[i] > bound) {
                result.push_back(i);
            }
        }
        if (result.size() > 2 * n + n_stretch) {
            cut();
        }
    }
    std::sort(result.begin(), result.end(), before);
    result.resize(std::min(result.size(), n));
    return result;
}

} // namespace lminf_python
