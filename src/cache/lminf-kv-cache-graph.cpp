// What the model's graph does with the memory: stores keys and values, captures sink tokens, masks.

#include "lminf-kv-cache.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cassert>
#include <cmath>

ggml_tensor * lminf_kv_cache::k_rows(ggml_context * ctx, int32_t ikv) const {
    ggml_tensor * k = layers[ikv].k;
    return ggml_reshape_2d(ctx, k, k->ne[0], k->ne[1]*k->ne[2]);
}

ggml_tensor * lminf_kv_cache::build_input_k_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const {
    if (middle) {
        build_middle_inputs(ctx, ubatch);
    }
    const auto & c = capture;
    if (c.sinks.empty()) {
        return llama_kv_cache::build_input_k_idxs(ctx, ubatch);
    }

    // [cells of the tokens, rows of the originals, cells of the placements]
    ggml_tensor * k_idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, ubatch.n_tokens + c.sinks.size() + c.placements.size());
    ggml_set_input(k_idxs);
    ggml_set_name(k_idxs, "attn_inp_k_idxs");

    const size_t n_values = c.values.empty() ? 0 : ubatch.n_tokens + c.values.size();

    const size_t n_keys = c.sinks.size() + c.placements.size();

    capture.ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_keys*(1 + hparams.n_pos_per_embd()) + n_values);
    ggml_set_input(capture.ids);
    ggml_set_name(capture.ids, "lminf_inp_sinks");

    return k_idxs;
}

ggml_tensor * lminf_kv_cache::build_input_v_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const {
    llama_ubatch extended = ubatch;
    extended.n_tokens += capture.values.size();

    return llama_kv_cache::build_input_v_idxs(ctx, extended);
}

static ggml_tensor * view_ids(ggml_context * ctx, ggml_tensor * t, size_t n, size_t i0) {
    return ggml_view_1d(ctx, t, n, i0*ggml_element_size(t));
}

ggml_tensor * lminf_kv_cache::cpy_k(
        ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il, const slot_info & sinfo) const {
    const int32_t ikv = map_layer_ids.at(il);

    if (ropes[ikv].state == lminf_rope::UNKNOWN) {
        ropes[ikv] = lminf_rope::find(k_cur);
        if (ropes[ikv].state == lminf_rope::UNSUPPORTED) {
            lminf_refuse_rope(model);
        }
    }
    if (middle && middle_layers[ikv] >= 0) {
        k_cur = store_k(ctx, k_cur, ikv);
    }

    const auto & c = capture;
    if (c.sinks.empty()) {
        return llama_kv_cache::cpy_k(ctx, k_cur, k_idxs, il, sinfo);
    }

    const int64_t n_embd_head = k_cur->ne[0];
    const int64_t n_head_kv   = k_cur->ne[1];
    const int64_t n_embd      = n_embd_head*n_head_kv;

    const size_t n_tokens     = k_cur->ne[2];
    const size_t n_sinks      = c.sinks.size();
    const size_t n_placements = c.placements.size();

    // where the positions begin among the ids
    const size_t n_pos = hparams.n_pos_per_embd();
    const size_t i_pos = n_sinks + n_placements;

    const auto & rope = ropes[ikv];

    // keep the originals
    ggml_tensor * cur = ggml_view_2d(ctx, k_cur, n_embd, n_tokens, k_cur->nb[2], 0);

    cur = ggml_get_rows(ctx, cur, view_ids(ctx, c.ids, n_sinks, 0));
    cur = ggml_reshape_3d(ctx, cur, n_embd_head, n_head_kv, n_sinks);
    if (hadamard(ikv)) {
        cur = llama_mul_mat_hadamard(ctx, cur, hadamard(ikv));
    }
    cur = rope.unrotate(ctx, cur, view_ids(ctx, c.ids, n_sinks*n_pos, i_pos));
    cur = ggml_reshape_2d(ctx, cur, n_embd, n_sinks);

    ggml_tensor * originals = ggml_set_rows(ctx, sink_k[ikv], cur, view_ids(ctx, k_idxs, n_sinks, n_tokens));

    // place them
    cur = ggml_get_rows(ctx, originals, view_ids(ctx, c.ids, n_placements, n_sinks));
    cur = ggml_reshape_3d(ctx, cur, n_embd_head, n_head_kv, n_placements);
    cur = rope.rotate(ctx, cur, view_ids(ctx, c.ids, n_placements*n_pos, i_pos + n_sinks*n_pos));
    if (hadamard(ikv)) {
        cur = llama_mul_mat_hadamard(ctx, cur, hadamard(ikv));
    }
    cur = ggml_reshape_2d(ctx, cur, n_embd, n_placements);

    ggml_tensor * k = ggml_set_rows(ctx, k_rows(ctx, ikv), cur, view_ids(ctx, k_idxs, n_placements, n_tokens + n_sinks));

    // store the micro-batch
    cur = ggml_view_2d(ctx, k_cur, n_embd, n_tokens, k_cur->nb[2], 0);

    return ggml_set_rows(ctx, k, cur, view_ids(ctx, k_idxs, n_tokens, 0));
}

ggml_tensor * lminf_kv_cache::cpy_v(
        ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il, const slot_info & sinfo) const {
    const int32_t ikv = map_layer_ids.at(il);
    if (middle && middle_layers[ikv] >= 0) {
        v_cur = store_v(ctx, v_cur, ikv);
    }

    const auto & c = capture;
    if (!c.values.empty()) {
        const int64_t n_embd_head = hparams.n_embd_head_v(il);
        const int64_t n_head_kv   = hparams.n_head_kv(il);

        if (v_cur->ne[0] != n_embd_head) { // the heads are merged already (PLM)
            v_cur = ggml_reshape_3d(ctx, v_cur, n_embd_head, n_head_kv, v_cur->ne[1]);
        }

        const size_t n_tokens = v_cur->ne[2];
        const size_t n_values = n_tokens + c.values.size();

        v_cur = ggml_view_2d(ctx, v_cur, n_embd_head*n_head_kv, n_tokens, v_cur->nb[2], 0);
        v_cur = ggml_get_rows(ctx, v_cur, view_ids(ctx, c.ids, n_values, c.ids->ne[0] - n_values));
        v_cur = ggml_reshape_3d(ctx, v_cur, n_embd_head, n_head_kv, n_values);
    }

    return llama_kv_cache::cpy_v(ctx, v_cur, v_idxs, il, sinfo);
}

void lminf_kv_cache::set_input_k_idxs(ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const {
    llama_kv_cache::set_input_k_idxs(dst, ubatch, sinfo);

    if (middle) {
        set_middle_inputs(*ubatch);
    }

    const auto & c = capture;
    if (c.sinks.empty()) {
        return;
    }

    int64_t * cells = (int64_t *) dst->data + ubatch->n_tokens;

    std::vector<int32_t> ids;
    std::vector<int32_t> pos_sinks;
    std::vector<int32_t> pos_placements;
    for (const auto & sink : c.sinks) {
        ids      .push_back(sink.i_token);
        pos_sinks.push_back((int32_t) -sink.pos);
        *cells++ = sink.row;
    }
    for (const auto & placement : c.placements) {
        ids           .push_back((int32_t) placement.row);
        pos_placements.push_back((int32_t) placement.pos);
        *cells++ = placement.cell;
    }
    for (const auto & pos : { rope_positions(pos_sinks), rope_positions(pos_placements) }) {
        ids.insert(ids.end(), pos.begin(), pos.end());
    }
    if (!c.values.empty()) {
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            ids.push_back((int32_t) i);
        }
        for (const auto & value : c.values) {
            ids.push_back(value.i_token);
        }
    }
    assert((int64_t) ids.size() == ggml_nelements(c.ids));

    ggml_backend_tensor_set(c.ids, ids.data(), 0, ggml_nbytes(c.ids));
}

void lminf_kv_cache::set_input_v_idxs(ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const {
    llama_kv_cache::set_input_v_idxs(dst, ubatch, sinfo);

    const int64_t n_embd  = v_trans ? hparams.n_embd_v_gqa_max() : 1;
    const int64_t n_cells = policy.n_cells();

    int64_t * data = (int64_t *) dst->data + ubatch->n_tokens*n_embd;
    for (const auto & value : capture.values) {
        for (int64_t j = 0; j < n_embd; ++j) {
            *data++ = value.strm*n_cells*n_embd + j*n_cells + value.cell;
        }
    }
}

template <typename T>
static void fill_kq_mask(const lminf_policy & policy, const lminf_sequence & seq, T * row, int64_t n_kv, int64_t p, T (*value)(float)) {
    const T hidden = value(-INFINITY);
    const T seen   = value(0.0f);

    // ALiBi takes its bias from the distance
    const auto visible = [&](int64_t j) { return policy.alibi ? value(-(float) policy.distance(p, j)) : seen; };

    std::fill(row, row + n_kv, hidden);

    const int64_t icopy = policy.copy(p);
    for (int64_t j = 0; j < std::min(policy.n_sink, p + 1); ++j) {
        row[policy.sink_cell(icopy, j)] = visible(j);
    }
    const int64_t begin = policy.window_begin(p);
    for (int64_t cell = policy.n_sink_cells(); cell < n_kv; ++cell) {
        const int64_t j = seq.key_at(cell);
        if (begin <= j && j <= p && seq.is_kept(j)) {
            row[cell] = visible(j);
        }
    }
}

void lminf_kv_cache::set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));
    GGML_ASSERT(causal_attn);

    const int64_t n_kv = dst->ne[0];

    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        const auto & seq = seqs[ubatch->seq_id[i][0]];

        const int64_t p = logical(seq, ubatch->pos[i]);

        if (dst->type == GGML_TYPE_F16) {
            fill_kq_mask<ggml_fp16_t>(policy, seq, (ggml_fp16_t *) dst->data + n_kv*i, n_kv, p, ggml_fp32_to_fp16);
        } else {
            fill_kq_mask<float>(policy, seq, (float *) dst->data + n_kv*i, n_kv, p, [](float x) { return x; });
        }
    }
}
