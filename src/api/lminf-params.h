// What contexts may have: defaults, and what model and context allow. Why something is refused is said here.

#pragma once

#include "lminf.h"

#include <cstdint>
#include <string>

struct llama_model;

// what the last call on this thread said; both return the status
lminf_status lminf_fail(lminf_status status, const std::string & message);
lminf_status lminf_succeed();

lminf_status lminf_fail_unsupported(const llama_model & model, const std::string & reason);
lminf_status lminf_fail_middle     (const llama_model & model, const std::string & reason);
lminf_status lminf_fail_deterministic(const llama_model & model, const std::string & reason);

// see the C function of this name
lminf_status lminf_resolve_params(
        const llama_model & model, llama_context_type ctx_type, uint32_t n_seq_max, uint32_t n_ubatch, lminf_params & p);

// Sink tokens that are many are placed once in a micro-batch at most, so that llama.cpp's attention needs one spare copy of them and no
// more: micro-batches are hardly longer than a block then.
uint32_t lminf_largest_ubatch(const lminf_params & params, uint32_t n_ubatch);

lminf_status lminf_check_cache_types(const llama_model & model, ggml_type type_k, ggml_type type_v);

// Where llama.cpp looks at the context's size it means the largest distance: models with long and short RoPE factors choose by it.
uint32_t lminf_largest_distance(const llama_model & model, const lminf_params & params);
