// Rules that hold for every supported model and need no reference: a model is compared with itself.

#pragma once

#include "llama-cpp.h"

#include <cstdint>
#include <string>
#include <vector>

enum outcome { PASSED, FAILED, NOT_CHECKED };

struct result {
    std::string name;
    outcome     verdict;
    double      value; // what was compared with a limit
    std::string note;  // how it was passed, why it failed or was not checked
};

// A context with a window of 32 tokens, 4 sink tokens and an F32 cache; NULL if the engine refuses.
llama_context_ptr init_small_window(llama_model & model, uint32_t n_ubatch = 16, uint32_t n_seq_max = 1);

// Each rule is checked on contexts of its own. The model must be one that init_small_window() accepts.
std::vector<result> check_invariants(llama_model & model);
