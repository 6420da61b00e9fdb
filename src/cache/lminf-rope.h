// Rotation of stored keys: takes a key to another position.
//
// The parameters are read from the RoPE node of the model's own graph, so that a key is re-placed with exactly what the
// model rotated it with, for each layer (frequency base, scaling, factors, partial rotation, normal or NeoX order, sections of
// M-RoPE, the rotary part of a latent key).
// Called by lminf-layers.cpp, for stored keys, and by lminf-middle.cpp, for queries.

#pragma once

#include "ggml.h"

#include <cstdint>

struct lminf_rope {
    enum status {
        UNKNOWN,     // no key of this layer has been seen yet
        ROTATED,     // RoPE is the last thing that happens to a key
        PLAIN,       // the layer has no RoPE: a key is the same at every position
        UNSUPPORTED, // something else happens after RoPE, or only a part of the key passes through it
    };

    status state = UNKNOWN;

    bool is_hadamard_rotated = false; // the cache stores the key Hadamard-rotated, on top of RoPE

    // Finds out how k_cur, as it is handed to the cache, was rotated. k_cur may have passed the cache's Hadamard rotation.
    static lminf_rope find(const ggml_tensor * k_cur);

    // The same of a query. What its heads are scaled with after RoPE does not matter to a rotation.
    static lminf_rope find_query(const ggml_tensor * q);

    // One that takes as much room in a graph as any: graphs are reserved before the model's first graph is seen.
    static lminf_rope any(int64_t n_embd_head, uint32_t n_pos_per_embd);

    // F32 [n_embd_head, n_head_kv, n] from the same: what it would be if it stood delta positions further on. PLAIN layers return cur.
    // What YaRN multiplies keys with stays on them.
    // delta: I32 [n]; with M-RoPE I32 [4*n], as llama.cpp lays out the positions of text: three times [n], and zeros.
    ggml_tensor * shift(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * delta) const;

private:
    int   n_dims      = 0;
    int   n_offs      = 0; // the first dimension that is rotated
    int   mode        = 0;
    int   n_ctx_orig  = 0;
    int   sections[GGML_MROPE_SECTIONS] = {};
    float freq_base   = 0.0f;
    float freq_scale  = 1.0f;
    float ext_factor  = 0.0f;
    float beta_fast   = 0.0f;
    float beta_slow   = 0.0f;

    ggml_tensor * factors     = nullptr; // weights of the model, or none
    ggml_tensor * norm_weight = nullptr; // of a norm after RoPE

    void read(const ggml_tensor * rope);

    // YaRN also scales what it rotates; ggml multiplies this into attn_factor
    float yarn_magnitude() const;
};
