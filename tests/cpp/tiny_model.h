// Writes a tiny random model, so that the memory can be tested without Python and without a download.

#pragma once

#include "ggml.h"
#include "gguf.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

struct tiny_model_params {
    // or "qwen3": NeoX order, keys are normalised before RoPE; or "hunyuan-dense": after it
    std::string arch = "llama";
    bool        yarn = false;

    uint32_t n_vocab     = 64;
    uint32_t n_embd      = 64;
    uint32_t n_layer     = 2;
    uint32_t n_head      = 2;
    uint32_t n_head_kv   = 1;
    uint32_t n_ff        = 96;
    uint32_t n_ctx_train = 256;
    uint32_t seed        = 1;
};

inline void write_tiny_model(const std::string & path, const tiny_model_params & params = {}) {
    const ggml_init_params iparams = { /*.mem_size =*/ size_t(16) << 20, /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ false };

    ggml_context * ctx  = ggml_init(iparams);
    gguf_context * gguf = gguf_init_empty();

    const uint32_t n_embd_head = params.n_embd/params.n_head;

    const auto key     = [&](const char * name) { return params.arch + "." + name; };
    const auto set_u32 = [&](const char * name, uint32_t value) { gguf_set_val_u32(gguf, key(name).c_str(), value); };
    const auto set_f32 = [&](const char * name, float    value) { gguf_set_val_f32(gguf, key(name).c_str(), value); };

    gguf_set_val_str(gguf, "general.architecture", params.arch.c_str());
    gguf_set_val_str(gguf, "tokenizer.ggml.model", "no_vocab");
    set_u32("vocab_size",                       params.n_vocab);
    set_u32("context_length",                   params.n_ctx_train);
    set_u32("embedding_length",                 params.n_embd);
    set_u32("block_count",                      params.n_layer);
    set_u32("feed_forward_length",              params.n_ff);
    set_u32("attention.head_count",             params.n_head);
    set_u32("attention.head_count_kv",          params.n_head_kv);
    set_u32("attention.key_length",             n_embd_head);
    set_u32("attention.value_length",           n_embd_head);
    set_u32("rope.dimension_count",             n_embd_head);
    set_f32("attention.layer_norm_rms_epsilon", 1e-5f);
    if (params.yarn) {
        gguf_set_val_str(gguf, key("rope.scaling.type").c_str(), "yarn");
        set_f32("rope.scaling.factor",                  4.0f);
        set_u32("rope.scaling.original_context_length", params.n_ctx_train/4);
    }

    std::mt19937                    generator(params.seed);
    std::normal_distribution<float> normal;

    const auto add = [&](const std::string & name, int64_t n_in, int64_t n_out, float scale) {
        ggml_tensor * t = n_out == 0 ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_in)
                                     : ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_in, n_out);
        ggml_set_name(t, name.c_str());
        for (int64_t i = 0; i < ggml_nelements(t); ++i) {
            static_cast<float *>(t->data)[i] = n_out == 0 ? 1.0f : scale*normal(generator)/std::sqrt(float(n_in));
        }
        gguf_add_tensor(gguf, t);
    };

    const int64_t n_embd_kv = int64_t(n_embd_head)*params.n_head_kv;

    add("token_embd.weight", params.n_embd, params.n_vocab, 8.0f);
    for (uint32_t il = 0; il < params.n_layer; ++il) {
        const std::string blk = "blk." + std::to_string(il) + ".";
        add(blk + "attn_norm.weight",   params.n_embd, 0, 0.0f);
        add(blk + "attn_q.weight",      params.n_embd, params.n_embd, 2.0f); // sharp attention: a wrong position shows
        add(blk + "attn_k.weight",      params.n_embd, n_embd_kv, 2.0f);
        if (params.arch != "llama") {
            add(blk + "attn_q_norm.weight", n_embd_head, 0, 0.0f);
            add(blk + "attn_k_norm.weight", n_embd_head, 0, 0.0f);
        }
        add(blk + "attn_v.weight",      params.n_embd, n_embd_kv, 1.0f);
        add(blk + "attn_output.weight", params.n_embd, params.n_embd, 1.0f);
        add(blk + "ffn_norm.weight",    params.n_embd, 0, 0.0f);
        add(blk + "ffn_gate.weight",    params.n_embd, params.n_ff, 1.0f);
        add(blk + "ffn_up.weight",      params.n_embd, params.n_ff, 1.0f);
        add(blk + "ffn_down.weight",    params.n_ff, params.n_embd, 1.0f);
    }
    add("output_norm.weight", params.n_embd, 0, 0.0f);
    add("output.weight", params.n_embd, params.n_vocab, 1.0f);

    gguf_write_to_file(gguf, path.c_str(), /* only_meta */ false);

    gguf_free(gguf);
    ggml_free(ctx);
}
