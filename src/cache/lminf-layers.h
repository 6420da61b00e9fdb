// The layers of a KV cache, as everything that moves keys and values sees them: their tensors, and how a key is rotated before it is
// stored. Owned by lminf_kv_cache; used by lminf_sinks, lminf_mover and lminf_middle.

#pragma once

#include "lminf-rope.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <utility>
#include <vector>

struct lminf_layer {
    int32_t il; // in the model

    ggml_tensor * k; // [n_embd_k*n_head_kv, n_cells, n_stream]
    ggml_tensor * v; // the same of values, transposed or not; NULL with latent attention, where values are a part of the keys

    std::vector<ggml_tensor *> k_stream; // of each sequence
    std::vector<ggml_tensor *> v_stream;

    int64_t n_head_kv;
    int64_t n_embd_k; // of a head
    int64_t n_embd_v;

    lminf_rope rope; // as seen in the model's graph

    ggml_tensor * k_rot = nullptr; // the cache's Hadamard matrix, if it has one

    // what keys of this layer are multiplied with, on top of RoPE, before they are stored; or NULL
    ggml_tensor * hadamard() const { return rope.is_hadamard_rotated ? k_rot : nullptr; }

    ggml_tensor * k_rows(ggml_context * ctx) const; // of all streams, one after the other
    ggml_tensor * v_rows(ggml_context * ctx) const; // not if they are transposed

    // Keys F32 [n_embd_k, n_head_kv, n] as they are stored, taken delta positions further on, and out of the Hadamard rotation ...
    ggml_tensor * unstored(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * delta) const;
    // ... and the other way round.
    ggml_tensor * restored(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * delta) const;
};

struct lminf_layers {
    std::vector<lminf_layer> all;

    int64_t  n_stream       = 1;
    uint32_t n_pos_per_embd = 1;
    bool     v_trans        = false;

    // all tensors are in memory that the CPU reads
    bool is_host() const;

    // Asks the system for large pages: a step reads all keys and values once, and a small page takes long to be found.
    void use_large_pages() const;

    // positions of single tokens as the model's RoPE takes them: M-RoPE has four for each, of which text uses three
    std::vector<int32_t> rope_positions(const std::vector<int32_t> & pos) const;

    // an input of a graph for n of them
    ggml_tensor * new_positions(ggml_context * ctx, int64_t n) const;
    void          set_positions(ggml_tensor * input, const std::vector<int32_t> & pos) const; // if the graph has a use for it
};
