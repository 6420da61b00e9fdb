// Whether a model's products with its weights depend on how many tokens are computed together, and how to make them independent of it.
//
// ggml has other kernels for many rows than for one, which add up in another order: for weights that were repacked when they were loaded,
// for most types in llamafile's products, and for K-quants in its tiled ones. Which of them a type meets depends on the processor, so it
// is not looked up but tried.

#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <string>
#include <vector>

struct llama_context;
struct llama_model;

// weights of one type that are kept in one way
struct lminf_weights {
    ggml_type                  type;
    ggml_backend_buffer_type_t buft;
    size_t                     n_bytes;   // of all of them
    bool                       same_bits; // a row's product with them is the same alone and among others, by one thread and by two
};

// All that a model multiplies with, the most bytes first; none of a model that was loaded without its weights, or has them on a device.
// single_row: as computed after lminf_use_single_row_products().
std::vector<lminf_weights> lminf_try_products(const llama_model & model, bool single_row);

// Why logits of a context of this model would depend on how a text is cut, all that can be done about it having been done; "" if they
// would not.
std::string lminf_why_not_same_bits(const llama_model & model);

// From now on the CPU computes all products of the context by its kernels for a single row. After its scheduler was made.
void lminf_use_single_row_products(const llama_context & lctx);
