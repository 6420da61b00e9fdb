// What the model's graph does with the memory: stores keys and values, captures sink tokens, masks.

#include "lminf-kv-cache.h"

#include "lminf-attention-op.h"
#include "lminf-mask.h"
#include "lminf-middle.h"
#include "lminf-sinks.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

ggml_tensor * lminf_kv_cache::build_input_k_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const {
    if (attention) {
        attention->build_inputs(ctx, ubatch.n_tokens);
    }
    if (middle) {
        middle->build_inputs(ctx, ubatch.n_tokens);
    }
    return sinks->is_capturing() ? sinks->build_k_idxs(ctx, ubatch.n_tokens) : llama_kv_cache::build_input_k_idxs(ctx, ubatch);
}

ggml_tensor * lminf_kv_cache::build_input_v_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const {
    llama_ubatch extended = ubatch;
    extended.n_tokens += (uint32_t) sinks->n_values();

    return llama_kv_cache::build_input_v_idxs(ctx, extended);
}

ggml_tensor * lminf_kv_cache::cpy_k(
        ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il, const slot_info & sinfo) const {
    const int32_t ikv = map_layer_ids.at(il);

    auto & rope = kv.all[ikv].rope;
    if (rope.state == lminf_rope::UNKNOWN) {
        rope = lminf_rope::find(k_cur);
        if (rope.state == lminf_rope::UNSUPPORTED) {
            lminf_refuse_rope(model);
        }
    }
    if (middle) {
        k_cur = middle->store_k(ctx, k_cur, ikv);
    }
    return sinks->is_capturing() ? sinks->cpy_k(ctx, k_cur, k_idxs, ikv) : llama_kv_cache::cpy_k(ctx, k_cur, k_idxs, il, sinfo);
}

ggml_tensor * lminf_kv_cache::cpy_v(
        ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il, const slot_info & sinfo) const {
    const int32_t ikv = map_layer_ids.at(il);
    if (const auto & layer = kv.all[ikv]; v_cur->ne[0] != layer.n_embd_v) { // the heads are merged already (PLM)
        v_cur = ggml_reshape_3d(ctx, v_cur, layer.n_embd_v, layer.n_head_kv, v_cur->ne[1]);
    }
    if (middle) {
        v_cur = middle->store_v(ctx, v_cur, ikv);
    }
    if (sinks->n_values() > 0) {
        v_cur = sinks->add_values(ctx, v_cur, ikv);
    }
    return llama_kv_cache::cpy_v(ctx, v_cur, v_idxs, il, sinfo);
}

ggml_tensor * lminf_kv_cache::build_attn(
        ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, int32_t il) const {
    GGML_UNUSED(kq_mask);
    if (!attention) {
        return nullptr;
    }
    const int32_t ikv = map_layer_ids.at(il);
    if (kq_b || k->view_src != layers[ikv].k) { // sink tokens have no copies that llama.cpp's own attention could look at
        throw std::runtime_error("this model's attention is of a kind of its own: set LMINF_ATTENTION=stock");
    }
    const lminf_attention_op::inputs in = { q, k, v, sinks, kq_scale };

    ggml_tensor * recalling = middle ? middle->build_attn(ctx, ikv, in, n_threads()) : nullptr;
    return recalling ? recalling : attention->build(ctx, ikv, in, false);
}

void lminf_kv_cache::set_input_k_idxs(ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const {
    llama_kv_cache::set_input_k_idxs(dst, ubatch, sinfo);

    if (attention) {
        attention->set_inputs(middle ? middle->near() : std::vector<int64_t>());
    }
    if (middle) {
        middle->set_inputs({ ubatch->get_pos_rope(), ubatch->get_pos_rope() + ubatch->n_tokens });
    }
    if (sinks->is_capturing()) {
        sinks->set_k_idxs(dst, ubatch->n_tokens);
    }
}

void lminf_kv_cache::set_input_v_idxs(ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const {
    llama_kv_cache::set_input_v_idxs(dst, ubatch, sinfo);

    sinks->set_v_idxs(dst, ubatch->n_tokens, v_trans ? hparams.n_embd_v_gqa_max() : 1);
}

void lminf_kv_cache::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const {
    if (!dst->buffer) {
        return; // attention of our own needs none
    }
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));
    GGML_ASSERT(causal_attn);

    const int64_t n_kv = dst->ne[0];

    for (const auto & part : parts(*ubatch)) {
        const auto & seq  = seqs[part.seq_id];
        const auto   kept = seq.kept();

        for (uint32_t i = part.i0; i < part.i0 + part.n; ++i) {
            const int64_t p = seq.origin + ubatch->pos[i];
            if (dst->type == GGML_TYPE_F16) {
                lminf_fill_mask_row(policy, kept, p, (ggml_fp16_t *) dst->data + n_kv*i, n_kv, ggml_fp32_to_fp16(-INFINITY),
                        ggml_fp32_to_fp16(0.0f), [](int64_t distance) { return ggml_fp32_to_fp16(-(float) distance); });
            } else {
                lminf_fill_mask_row(policy, kept, p, (float *) dst->data + n_kv*i, n_kv, -INFINITY, 0.0f,
                        [](int64_t distance) { return -(float) distance; });
            }
        }
    }
}
