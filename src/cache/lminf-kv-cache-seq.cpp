// What happens to sequences between decodes, and what callers ask about them.

#include "lminf-kv-cache.h"

#include "lminf-middle.h"
#include "lminf-sinks.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

// llama_pos starts again from here when it gets large: above every n_clamp, so that an attention temperature does not notice
static constexpr int64_t POS_RENUMBERED = int64_t(1) << 29;

void lminf_kv_cache::reset_sequence(llama_seq_id seq_id) {
    seqs[seq_id] = lminf_sequence(policy);
    group->damaged[seq_id] = false;
    if (middle) {
        middle->release(seq_id);
    }
}

void lminf_kv_cache::clear(bool data) {
    for (llama_seq_id s = 0; s < (int) seqs.size(); ++s) {
        reset_sequence(s);
    }
    sinks->begin_capture();

    llama_kv_cache::clear(data);
}

std::pair<int64_t, int64_t> lminf_kv_cache::logical_range(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & seq = seqs[seq_id];
    return {
        p0 <= 0 ? 0          : std::min(seq.origin + p0, seq.n_past),
        p1 <  0 ? seq.n_past : std::min(seq.origin + p1, seq.n_past),
    };
}

void lminf_kv_cache::remove(llama_seq_id seq_id, int64_t j0, int64_t j1) {
    auto & seq = seqs[seq_id];
    if (j0 == 0 && j1 >= seq.n_past) {
        reset_sequence(seq_id);
    } else {
        seq.remove(j0, j1);
    }
}

bool lminf_kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= 0 && !has_seq(seq_id)) {
        return false;
    }
    const llama_seq_id s0 = seq_id < 0 ? 0                     : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? (int) seqs.size() - 1 : seq_id;

    for (llama_seq_id s = s0; s <= s1; ++s) {
        const auto [j0, j1] = logical_range(s, p0, p1);
        if (!can_remove(s, j0, j1)) {
            return false;
        }
    }
    for (llama_seq_id s = s0; s <= s1; ++s) {
        const auto [j0, j1] = logical_range(s, p0, p1);
        remove(s, j0, j1);
    }
    return true;
}

void lminf_kv_cache::seq_keep(llama_seq_id seq_id) {
    for (llama_seq_id s = 0; s < (int) seqs.size(); ++s) {
        if (s != seq_id) {
            reset_sequence(s);
        }
    }
}

void lminf_kv_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    copy(seq_id_src, seq_id_dst, logical_range(seq_id_src, p0, p1).second);
}

void lminf_kv_cache::reserve_copy(llama_seq_id dst, int64_t n) const {
    if (middle) {
        middle->reserve_or_throw(dst, n);
    }
}

void lminf_kv_cache::copy(llama_seq_id src, llama_seq_id dst, int64_t n) {
    group->lctx.synchronize();
    for (size_t i = 0; i < kv.all.size(); ++i) {
        const auto & layer = kv.all[i];

        ggml_backend_tensor_copy(layer.k_stream[src], layer.k_stream[dst]);
        if (layer.v) {
            ggml_backend_tensor_copy(layer.v_stream[src], layer.v_stream[dst]);
        }
        if (ggml_tensor * originals = sinks->originals()[i]) {
            const auto [from, size] = sinks->slice(originals, src);

            std::vector<uint8_t> bytes(size);
            ggml_backend_tensor_get(originals, bytes.data(), from, size);
            ggml_backend_tensor_set(originals, bytes.data(), sinks->slice(originals, dst).first, size);
        }
    }
    auto & seq = seqs[dst];

    seq = seqs[src];
    group->damaged[dst] = group->damaged[src];
    if (middle) {
        middle->copy(src, dst, seq);
    }
    seq.remove(n, seq.n_past);
}

void lminf_kv_cache::seq_add(llama_seq_id, llama_pos, llama_pos, llama_pos) {
}

void lminf_kv_cache::seq_div(llama_seq_id, llama_pos, llama_pos, int) {
}

llama_pos lminf_kv_cache::seq_pos_min(llama_seq_id seq_id) const {
    if (!has_seq(seq_id) || seqs[seq_id].n_past == 0) {
        return -1;
    }
    const auto & seq = seqs[seq_id];

    int64_t res = seq.n_past - 1;
    if (seq.n_sinks() > 0) {
        res = 0;
    } else {
        for (const auto & run : seq.kept()) {
            res = std::min(res, std::max(run.pos, policy.window_begin(seq.n_past - 1)));
        }
    }
    return (llama_pos) (res - seq.origin);
}

llama_pos lminf_kv_cache::seq_pos_max(llama_seq_id seq_id) const {
    return has_seq(seq_id) ? (llama_pos) (seqs[seq_id].n_past - 1 - seqs[seq_id].origin) : -1;
}

bool lminf_kv_cache::renumber(llama_seq_id seq_id) {
    auto & seq = seqs[seq_id];

    const bool is_large = seq.n_past - seq.origin > 2*POS_RENUMBERED;
    if (is_large) {
        seq.origin = seq.n_past - POS_RENUMBERED;
    }
    return is_large;
}

bool lminf_kv_cache::can_set_position(llama_seq_id seq_id, int64_t pos) const {
    return pos >= seqs[seq_id].n_past && seqs[seq_id].n_past >= policy.n_pinned;
}

void lminf_kv_cache::set_position(llama_seq_id seq_id, int64_t pos) {
    seqs[seq_id].set_position(pos);
    renumber(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> lminf_kv_cache::memory_breakdown() const {
    auto res = llama_kv_cache::memory_breakdown();
    sinks->add_memory(res);
    for (const auto & [ctx, buf] : k_rot_bufs) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());

        res[buft] += hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft)
                                      : ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

lminf_stats lminf_kv_cache::stats(llama_seq_id seq_id) const {
    const auto & seq = seqs[seq_id];

    const int64_t n_used = seq.n_sinks() + seq.n_window();

    lminf_stats res = {};
    res.n_past        = seq.n_past;
    res.n_evicted     = seq.n_past - n_used;
    res.pos_physical  = seq.n_past - seq.base;
    res.n_placements  = seq.n_placements;
    res.n_rebases     = seq.n_rebases;
    res.n_until_rebase = std::max<int64_t>(0, policy.rebase_limit() - res.pos_physical);
    res.n_cells       = (uint32_t) policy.n_cells();
    res.n_cells_used  = (uint32_t) n_used;
    res.n_ring        = (uint32_t) policy.n_ring();
    res.sink_distance = seq.n_sinks() > 0 ? (int32_t) policy.distance(seq.n_past - 1, 0) : -1;
    return res;
}

//
// test hooks
//

static size_t get_row(const ggml_tensor * t, int64_t row, void * dst, size_t size) {
    const size_t n = ggml_row_size(t->type, t->ne[0]);
    if (size < n) {
        return 0;
    }
    ggml_backend_tensor_get(t, dst, row*n, n);
    return n;
}

size_t lminf_kv_cache::get_key(llama_seq_id seq_id, int32_t il, int64_t pos, void * dst, size_t size) const {
    const auto    it   = map_layer_ids.find(il);
    const int64_t cell = seqs[seq_id].cell_of(pos);

    return it == map_layer_ids.end() || cell < 0 ? 0 : get_row(layers[it->second].k_stream[seq_id], cell, dst, size);
}

size_t lminf_kv_cache::get_sink_original(llama_seq_id seq_id, int32_t il, uint32_t j, void * dst, size_t size) const {
    const auto it = map_layer_ids.find(il);
    if (it == map_layer_ids.end() || j >= std::min(policy.n_sink, seqs[seq_id].n_past)) {
        return 0;
    }
    return get_row(sinks->originals()[it->second], seq_id*policy.n_sink + j, dst, size);
}
