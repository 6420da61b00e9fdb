// What the patch (patches/) calls. Included by llama.cpp's own files.

#pragma once

#include "lminf-kv-cache.h"

#include "llama-cparams.h"

#include <memory>

// In place of llama_model::create_memory(), which it calls: finds out whether the context being made is to have LM-Infinite (asked
// for by lminf_init_from_model(), lminf_use_params() or the environment), and checks and sets what is common to all kinds of
// memory. Throws, with the reason, if model and parameters do not fit.
llama_memory_i * lminf_create_memory(llama_context & lctx, const llama_model & model, const llama_memory_params & params, llama_cparams & cparams);

// Takes the place of llama_kv_cache's constructor wherever the KV cache of a model's layers is made: an lminf_kv_cache if the
// context being created is to have LM-Infinite, else llama.cpp's own. What is not looked at is handed on.
template <typename... Rest>
std::unique_ptr<llama_kv_cache> lminf_make_kv_cache(
        const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v, bool v_trans,
        bool offload, bool unified, uint32_t kv_size, uint32_t n_seq_max, uint32_t n_pad, uint32_t n_swa,
        llama_swa_type swa_type, llama_memory_t mem_other, Rest &&... rest) {
    const auto group = lminf_cache_group_scope::current();
    if (!group || mem_other) {
        return std::make_unique<llama_kv_cache>(model, hparams, type_k, type_v, v_trans, offload, unified, kv_size, n_seq_max, n_pad,
                n_swa, swa_type, mem_other, std::forward<Rest>(rest)...);
    }
    const lminf_policy policy = lminf_kv_cache::make_policy(*group, hparams, n_swa, swa_type);
    v_trans = v_trans && !group->has_own_attention(); // ours takes values as they come, flash attention or not
    return std::make_unique<lminf_kv_cache>(group, policy, model, hparams, type_k, type_v, v_trans, offload, unified,
            (uint32_t) policy.n_cells(), n_seq_max, /* n_pad */ 1u, n_swa, swa_type, mem_other, std::forward<Rest>(rest)...);
}
