// What the patch (patches/) calls. Included by llama.cpp's own files, so it says nothing of ours but this.

#pragma once

#include "llama-cparams.h"
#include "llama-kv-cache.h"

#include <memory>

// In place of llama_model::create_memory(), which it calls: finds out whether the context being made is to have LM-Infinite (asked
// for by lminf_init_from_model(), lminf_use_params() or the environment), and checks and sets what is common to all kinds of
// memory. Throws, with the reason, if model and parameters do not fit.
llama_memory_i * lminf_create_memory(const llama_model & model, const llama_memory_params & params, llama_cparams & cparams);

// Takes the place of llama_kv_cache's constructor wherever the KV cache of a model's layers is made: an lminf_kv_cache if the
// context being created is to have LM-Infinite, else llama.cpp's own.
std::unique_ptr<llama_kv_cache> lminf_make_kv_cache(
        const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v, bool v_trans,
        bool offload, bool unified, uint32_t kv_size, uint32_t n_seq_max, uint32_t n_pad, uint32_t n_swa,
        llama_swa_type swa_type, llama_memory_t mem_other, const llama_memory_i::layer_filter_cb & filter,
        const llama_memory_i::layer_reuse_cb & reuse, const llama_memory_i::layer_share_cb & share);
