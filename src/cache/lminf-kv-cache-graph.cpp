// What the model's graph does with the memory: stores keys and values, captures sink tokens, masks.

#include "lminf-kv-cache.h"

#include "lminf-attention-op.h"
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

// One row: what query p sees is 0, or what ALiBi adds; the rest is hidden. kept: the sequence's keys.
template <typename T>
static void fill_kq_mask(
        const lminf_policy & policy, const std::vector<lminf_run> & kept, T * row, int64_t n_kv, int64_t p, T (*value)(float)) {
    std::fill(row, row + n_kv, value(-INFINITY));

    const auto show = [&](int64_t cell, int64_t j, int64_t n) {
        if (!policy.alibi) {
            std::fill(row + cell, row + cell + n, value(0.0f));
            return;
        }
        for (int64_t i = 0; i < n; ++i) { // it takes its bias from the distance
            row[cell + i] = value(-(float) policy.distance(p, j + i));
        }
    };

    if (policy.n_sink > 0) {
        show(policy.sink_cell(policy.copy(p), 0), 0, std::min(policy.n_sink, p + 1));
    }
    const int64_t begin = policy.window_begin(p);
    for (const auto & run : kept) {
        const int64_t j0 = std::max(run.pos, begin);
        const int64_t j1 = std::min(run.pos + run.n, p + 1);
        if (j0 < j1) {
            show(run.cell + j0 - run.pos, j0, j1 - j0);
        }
    }
}

void lminf_kv_cache::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));
    GGML_ASSERT(causal_attn);

    const int64_t n_kv = dst->ne[0];

    for (const auto & part : parts(*ubatch)) {
        const auto & seq  = seqs[part.seq_id];
        const auto   kept = seq.kept();

        for (uint32_t i = part.i0; i < part.i0 + part.n; ++i) {
            const int64_t p = seq.origin + ubatch->pos[i];
            if (dst->type == GGML_TYPE_F16) {
                fill_kq_mask<ggml_fp16_t>(policy, kept, (ggml_fp16_t *) dst->data + n_kv*i, n_kv, p, ggml_fp32_to_fp16);
            } else {
                fill_kq_mask<float>(policy, kept, (float *) dst->data + n_kv*i, n_kv, p, [](float x) { return x; });
            }
        }
    }
}
