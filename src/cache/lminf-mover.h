// Moves what is stored: places sink tokens from their originals, shifts the keys of a window (a rebase), copies values of sink tokens.
//
// By stock operations alone, on whatever devices the cache is on. What a call had begun when it failed is unknown; the caller plans
// before and commits afterwards. Called by lminf-kv-cache.cpp.

#pragma once

#include "lminf-layers.h"
#include "lminf-runner.h"

#include <cstdint>
#include <memory>
#include <vector>

// One row to write. Rows and cells are counted over all streams.
struct lminf_key_move {
    int64_t src;  // row of the originals, or the cell itself
    int64_t cell;
    int32_t pos;  // position at which the original is placed, or by which the cell's key is shifted
};
struct lminf_value_move {
    int64_t src; // cell
    int64_t cell;
};

class lminf_mover {
public:
    // originals: of the sink tokens of each layer, F32 [n_embd_k*n_head_kv, rows] at position 0. Throws std::runtime_error if what the
    // largest graph needs cannot be allocated.
    lminf_mover(const llama_context & lctx, const lminf_layers & layers, const std::vector<ggml_tensor *> & originals);

    // false if a computation failed
    bool place      (const std::vector<lminf_key_move>   & moves);
    bool shift      (const std::vector<lminf_key_move>   & moves);
    bool copy_values(const std::vector<lminf_value_move> & moves);

private:
    const llama_context &              lctx;
    const lminf_layers &               layers;
    const std::vector<ggml_tensor *> & originals;

    lminf_runner runner;

    // inputs of the last graph
    ggml_tensor * src  = nullptr; // I32 [n]
    ggml_tensor * cell = nullptr; // I64 [n]
    ggml_tensor * pos  = nullptr; // see lminf_layers

    bool move_keys(const std::vector<lminf_key_move> & moves, bool from_originals, int n_threads);

    void new_inputs(ggml_context * ctx, int64_t n);
    void build_keys  (ggml_context * ctx, ggml_cgraph * gf, int64_t n, bool from_originals, bool is_reserved);
    void build_values(ggml_context * ctx, ggml_cgraph * gf, const std::vector<lminf_value_move> & moves);
};
