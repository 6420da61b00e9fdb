// What happens to sequences between decodes, and what callers ask about them.

#include "lminf-kv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

// llama_pos starts again from here when it gets large: above every n_clamp, so that an attention temperature does not notice
static constexpr int64_t POS_RENUMBERED = int64_t(1) << 29;

void lminf_kv_cache::clear(bool data) {
    for (llama_seq_id s = 0; s < (int) seqs.size(); ++s) {
        reset_sequence(s);
    }
    capture = {};

    llama_kv_cache::clear(data);
}

std::pair<int64_t, int64_t> lminf_kv_cache::logical_range(const lminf_sequence & seq, llama_pos p0, llama_pos p1) const {
    return {
        p0 <= 0 ? 0          : std::min(logical(seq, p0), seq.n_past),
        p1 <  0 ? seq.n_past : std::min(logical(seq, p1), seq.n_past),
    };
}

bool lminf_kv_cache::can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    return std::all_of(group->caches.begin(), group->caches.end(), [&](const lminf_kv_cache * kv) {
        const auto & seq = kv->seqs[seq_id];

        const auto [j0, j1] = logical_range(seq, p0, p1);
        return seq.can_remove(j0, j1);
    });
}

bool lminf_kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= 0 && !has_seq(seq_id)) {
        return false;
    }

    const llama_seq_id s0 = seq_id < 0 ? 0                    : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? (int) seqs.size() - 1 : seq_id;

    for (llama_seq_id s = s0; s <= s1; ++s) {
        if (!can_remove(s, p0, p1)) {
            LLAMA_LOG_INFO("%s: [%d, %d) of sequence %d cannot be removed exactly: possible are the last n_rollback = %d tokens, "
                    "the oldest part of the window, and all\n", __func__, p0, p1, s, (int) policy.n_rollback);
            return false;
        }
    }

    for (llama_seq_id s = s0; s <= s1; ++s) {
        auto & seq = seqs[s];

        const auto [j0, j1] = logical_range(seq, p0, p1);
        if (j0 == 0 && j1 == seq.n_past) {
            reset_sequence(s);
        } else {
            seq.remove(j0, j1);
        }
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
    if (seq_id_src == seq_id_dst) {
        return;
    }

    bool ok = has_seq(seq_id_src) && has_seq(seq_id_dst);
    if (ok) {
        // the copy is cut to its first j1 tokens; a recurrent state beside it cannot be
        const auto [j0, j1] = logical_range(seqs[seq_id_src], p0, p1);
        ok = j0 == 0 && (j1 == seqs[seq_id_src].n_past || (!llm_arch_is_hybrid(model.arch) && can_remove(seq_id_src, p1, -1)));
        ok = ok && (!middle || reserve_middle(seq_id_dst, seqs[seq_id_src].n_past));
    }
    if (!ok) {
        LLAMA_LOG_ERROR("%s: [%d, %d) of sequence %d cannot be copied exactly to sequence %d; nothing was changed\n", __func__,
                p0, p1, seq_id_src, seq_id_dst);
        return;
    }

    if (lctx) {
        lctx->synchronize();
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & layer = layers[i];

        ggml_backend_tensor_copy(layer.k_stream[seq_id_src], layer.k_stream[seq_id_dst]);
        if (layer.v) {
            ggml_backend_tensor_copy(layer.v_stream[seq_id_src], layer.v_stream[seq_id_dst]);
        }
        if (sink_k[i]) {
            const size_t n = policy.n_sink*sink_k[i]->nb[1];

            std::vector<uint8_t> originals(n);
            ggml_backend_tensor_get(sink_k[i], originals.data(), seq_id_src*n, n);
            ggml_backend_tensor_set(sink_k[i], originals.data(), seq_id_dst*n, n);
        }
    }

    auto & seq = seqs[seq_id_dst];

    seq = seqs[seq_id_src];
    if (middle) {
        const auto [slot, n] = middle_rows(seq);
        middle->store.copy(seq_id_src, seq_id_dst, slot, n);
    }
    if (p1 >= 0) {
        seq.remove(logical_range(seq, p1, -1).first, seq.n_past);
    }
}

void lminf_kv_cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (shift != 0) {
        LLAMA_LOG_ERROR("%s: an LM-Infinite context needs no context shift and refuses it; nothing was changed\n", __func__);
    }
}

void lminf_kv_cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (d != 1) {
        LLAMA_LOG_ERROR("%s: positions of an LM-Infinite context cannot be divided; nothing was changed\n", __func__);
    }
}

llama_pos lminf_kv_cache::seq_pos_min(llama_seq_id seq_id) const {
    const auto & seq = seqs.at(seq_id);
    if (seq.n_past == 0) {
        return -1;
    }
    int64_t res = seq.n_sinks() > 0 ? 0 : policy.window_begin(seq.n_past - 1);
    while (res < seq.n_past - 1 && !seq.is_kept(res)) {
        ++res;
    }
    return (llama_pos) (res - seq.origin);
}

llama_pos lminf_kv_cache::seq_pos_max(llama_seq_id seq_id) const {
    const auto & seq = seqs.at(seq_id);
    return (llama_pos) (seq.n_past - 1 - seq.origin);
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
    for (const auto & [ctx, buf] : sink_bufs) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());

        res[buft] += hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft)
                                      : ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

//
// what lminf.cpp reads
//

lminf_stats lminf_kv_cache::stats(llama_seq_id seq_id) const {
    const auto & seq = seqs[seq_id];

    const int64_t n_used = seq.n_sinks() + seq.n_window();

    lminf_stats res = {};
    res.n_past        = seq.n_past;
    res.n_evicted     = seq.n_past - n_used;
    res.pos_physical  = seq.n_past - seq.base;
    res.n_placements  = seq.n_placements;
    res.n_rebases     = seq.n_rebases;
    res.n_cells       = (uint32_t) policy.n_cells();
    res.n_cells_used  = (uint32_t) n_used;
    res.n_ring        = (uint32_t) policy.n_ring();
    res.sink_distance = seq.n_sinks() > 0 ? (int32_t) policy.distance(seq.n_past - 1, 0) : -1;
    return res;
}

size_t lminf_kv_cache::get_key(llama_seq_id seq_id, int32_t il, int64_t pos, void * dst, size_t size) const {
    const auto    it   = map_layer_ids.find(il);
    const int64_t cell = seqs[seq_id].cell_of(pos);

    if (it == map_layer_ids.end() || cell < 0) {
        return 0;
    }
    ggml_tensor * k = layers[it->second].k_stream[seq_id];

    const size_t n = ggml_row_size(k->type, k->ne[0]);
    if (size < n) {
        return 0;
    }
    ggml_backend_tensor_get(k, dst, cell*n, n);
    return n;
}

size_t lminf_kv_cache::get_sink_original(llama_seq_id seq_id, int32_t il, uint32_t j, void * dst, size_t size) const {
    const auto it = map_layer_ids.find(il);

    if (it == map_layer_ids.end() || j >= std::min(policy.n_sink, seqs[seq_id].n_past)) {
        return 0;
    }
    ggml_tensor * k = sink_k[it->second];

    const size_t n = ggml_row_size(k->type, k->ne[0]);
    if (size < n) {
        return 0;
    }
    ggml_backend_tensor_get(k, dst, (seq_id*policy.n_sink + j)*n, n);
    return n;
}

