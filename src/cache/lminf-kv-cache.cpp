#include "lminf-kv-cache.h"

#include "lminf-hooks.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

//
// creation
//

static thread_local std::shared_ptr<lminf_cache_group> group_pending;

lminf_cache_group_scope::lminf_cache_group_scope(std::shared_ptr<lminf_cache_group> group) {
    group_pending = std::move(group);
}

lminf_cache_group_scope::~lminf_cache_group_scope() {
    group_pending.reset();
}

static lminf_policy make_policy(
        const lminf_cache_group & group, const llama_hparams & hparams, uint32_t n_swa, llama_swa_type swa_type) {
    const auto & params = group.params;

    const bool is_swa = swa_type != LLAMA_SWA_TYPE_NONE;

    lminf_policy res;
    res.n_sink     = is_swa ? 0 : params.n_sink;
    res.n_window   = is_swa ? n_swa : params.n_window;
    res.n_clamp    = params.n_clamp;
    res.n_block    = params.n_block;
    res.n_rollback = params.n_rollback;
    res.n_ubatch   = group.n_ubatch;
    res.n_rebase   = params.n_rebase;
    res.n_pinned   = params.n_sink;
    res.n_middle   = is_swa || params.middle.k == 0 ? 0 : params.middle.max_tokens;
    res.n_near     = params.middle.distance;
    res.n_reach    = std::max(params.n_window, hparams.swa_type != LLAMA_SWA_TYPE_NONE ? hparams.n_swa : 0);
    res.kept_order = params.sink_order == LMINF_SINK_ORDER_KEPT;
    res.chunked    = swa_type == LLAMA_SWA_TYPE_CHUNKED;
    res.alibi      = hparams.use_alibi;
    return res;
}

std::unique_ptr<llama_kv_cache> lminf_make_kv_cache(
        const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v, bool v_trans,
        bool offload, bool unified, uint32_t kv_size, uint32_t n_seq_max, uint32_t n_pad, uint32_t n_swa,
        llama_swa_type swa_type, llama_memory_t mem_other, const llama_memory_i::layer_filter_cb & filter,
        const llama_memory_i::layer_reuse_cb & reuse, const llama_memory_i::layer_share_cb & share) {
    if (!group_pending || mem_other) {
        return std::make_unique<llama_kv_cache>(model, hparams, type_k, type_v, v_trans, offload, unified, kv_size, n_seq_max, n_pad,
                n_swa, swa_type, mem_other, filter, reuse, share);
    }
    return std::make_unique<lminf_kv_cache>(group_pending, make_policy(*group_pending, hparams, n_swa, swa_type), model, hparams,
            type_k, type_v, v_trans, offload, unified, n_seq_max, n_swa, swa_type, filter, reuse);
}

lminf_kv_cache::lminf_kv_cache(
        std::shared_ptr<lminf_cache_group> group, const lminf_policy & policy,
        const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v, bool v_trans,
        bool offload, bool unified, uint32_t n_seq_max, uint32_t n_swa, llama_swa_type swa_type,
        const layer_filter_cb & filter, const layer_reuse_cb & reuse) :
    llama_kv_cache(model, hparams, type_k, type_v, v_trans, offload, unified, (uint32_t) policy.n_cells(), n_seq_max,
            /* n_pad */ 1, n_swa, swa_type, /* mem_other */ nullptr, filter, reuse, /* share */ nullptr),
    group(std::move(group)), policy(policy), seqs(n_seq_max, lminf_sequence(this->policy)), ropes(layers.size()) {
    alloc_sink_originals();
    make_middle();
    this->group->caches.push_back(this);
}

lminf_kv_cache::~lminf_kv_cache() {
    auto & caches = group->caches;
    caches.erase(std::remove(caches.begin(), caches.end(), this), caches.end());
}

void lminf_kv_cache::alloc_sink_originals() {
    sink_k.resize(layers.size(), nullptr);
    k_rot .resize(layers.size(), nullptr);

    if (policy.n_sink == 0 && !attn_rot_k) {
        return;
    }

    std::map<ggml_backend_buffer_type_t, std::vector<size_t>> by_buft;
    for (size_t i = 0; i < layers.size(); ++i) {
        by_buft[ggml_backend_buffer_get_type(layers[i].k->buffer)].push_back(i);
    }

    for (const auto & [buft, ids] : by_buft) {
        const ggml_init_params iparams = {
            /*.mem_size   =*/ ggml_tensor_overhead()*(ids.size() + 1),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };
        ggml_context_ptr ctx { ggml_init(iparams) };

        ggml_tensor * rot = build_input_k_rot(ctx.get());

        for (const size_t i : ids) {
            if (policy.n_sink > 0) {
                sink_k[i] = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, layers[i].k->ne[0], policy.n_sink*n_stream);
                ggml_format_name(sink_k[i], "sink_k_l%d", layers[i].il);
            }
            k_rot[i] = rot;
        }

        if (hparams.no_alloc) { // nothing will be computed; see memory_breakdown()
            ggml_backend_buffer_ptr none { ggml_backend_buft_alloc_buffer(buft, 0) };
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = none.get();
            }
            sink_bufs.emplace_back(std::move(ctx), std::move(none));
            continue;
        }

        ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buf) {
            throw std::runtime_error("failed to allocate the sink tokens' originals");
        }
        ggml_backend_buffer_clear(buf.get(), 0);
        if (rot) {
            ggml_backend_tensor_set(rot, attn_rot_hadamard.at(rot->ne[0]).data(), 0, ggml_nbytes(rot));
        }
        sink_bufs.emplace_back(std::move(ctx), std::move(buf));
    }
}

//
// batches
//

llama_memory_context_ptr lminf_kv_cache::init_full() {
    // the largest graph is one that captures all sink tokens and fills all copies
    capture = {};
    capture.sinks     .resize(policy.n_sink*n_stream);
    capture.placements.resize(policy.n_sink_cells()*n_stream);
    capture.values    .resize((policy.n_sink_cells() - policy.n_sink)*n_stream);
    if (middle) {
        middle->recalls = false;
    }

    return llama_kv_cache::init_full();
}

llama_memory_context_ptr lminf_kv_cache::init_update(llama_context * lctx, bool optimize) {
    this->lctx = lctx;
    return llama_kv_cache::init_update(lctx, optimize);
}

std::vector<lminf_kv_cache::ubatch_part> lminf_kv_cache::parts(const llama_ubatch & ubatch) const {
    const uint32_t n_seqs = n_stream == 1 ? 1 : ubatch.n_seqs_unq;
    const uint32_t n      = ubatch.n_tokens/n_seqs;

    std::vector<ubatch_part> res;
    for (uint32_t s = 0; s < n_seqs; ++s) {
        res.push_back({ s*n, n, ubatch.seq_id[s*n][0] });
    }
    return res;
}

void lminf_kv_cache::compact(llama_seq_id seq_id) {
    // Bytes are moved as they are. In a device's memory that would be thousands of tiny transfers, and a transposed V is
    // read by an attention that gains nothing.
    const auto is_host = [](const ggml_tensor * t) { return !t || ggml_backend_buffer_is_host(t->buffer); };
    for (const auto & layer : layers) {
        if (v_trans || !is_host(layer.k) || !is_host(layer.v)) {
            return;
        }
    }

    const auto moves = seqs[seq_id].compact();
    if (moves.empty()) {
        return;
    }
    lctx->synchronize();
    for (const auto & layer : layers) {
        for (ggml_tensor * t : { layer.k_stream[seq_id], layer.v_stream[seq_id] }) {
            for (size_t i = 0; t && i < moves.size(); ++i) {
                memcpy((char *) t->data + moves[i].to*t->nb[1], (char *) t->data + moves[i].from*t->nb[1], t->nb[1]);
            }
        }
    }
}

llama_kv_cache::slot_info_vec_t lminf_kv_cache::prepare(const std::vector<llama_ubatch> & ubatches) {
    capture = {};

    if (lctx && !lctx->get_cparams().causal_attn) {
        LLAMA_LOG_ERROR("%s: LM-Infinite needs causal attention, and llama_set_causal_attn() has turned it off\n", __func__);
        return {};
    }

    if (lctx && ubatches.size() == 1 && ubatches[0].n_tokens == 1 && has_seq(ubatches[0].seq_id[0][0])) {
        compact(ubatches[0].seq_id[0][0]);
    }

    slot_info_vec_t res;

    // the batch is tried on copies: it is stored micro-batch by micro-batch, in apply_ubatch()
    std::map<llama_seq_id, lminf_sequence> trial;

    for (const auto & ubatch : ubatches) {
        if (ubatch.embd && ubatch.is_pos_2d()) {
            LLAMA_LOG_ERROR("%s: LM-Infinite has no place for embeddings with positions in several dimensions\n", __func__);
            return {};
        }

        const auto parts = this->parts(ubatch);

        slot_info sinfo = { LLAMA_MAX_SEQ, 0, {}, {} };
        sinfo.resize(parts.size());

        for (size_t s = 0; s < parts.size(); ++s) {
            const auto & part = parts[s];

            bool ok = has_seq(part.seq_id);
            if (ok) {
                const auto & seq = trial.emplace(part.seq_id, seqs[part.seq_id]).first->second;

                for (uint32_t i = 0; i < part.n; ++i) {
                    const uint32_t it = part.i0 + i;
                    ok = ok && ubatch.n_seq_id[it] == 1 && ubatch.seq_id[it][0] == part.seq_id &&
                        logical(seq, ubatch.pos[it]) == seq.n_past + i;
                }
            }
            if (!ok) {
                LLAMA_LOG_ERROR("%s: the batch does not continue its sequences by one token after the other, "
                        "each in one sequence\n", __func__);
                return {};
            }

            sinfo.s0      = std::min<uint32_t>(sinfo.s0, part.seq_id);
            sinfo.s1      = std::max<uint32_t>(sinfo.s1, part.seq_id);
            sinfo.strm[s] = part.seq_id;
            sinfo.idxs[s] = trial.at(part.seq_id).append(part.n);
        }
        res.push_back(std::move(sinfo));
    }

    for (const auto & [seq_id, seq] : trial) {
        if (middle && !reserve_middle(seq_id, seq.n_past)) {
            return {};
        }
    }

    return res;
}

bool lminf_kv_cache::begin_ubatch(const llama_ubatch & ubatch) {
    capture = {};

    std::vector<key_move> moves;

    for (const auto & part : parts(ubatch)) {
        auto & seq = seqs[part.seq_id];

        const int64_t p0 = seq.n_past;
        const int64_t p1 = p0 + part.n - 1;

        const int64_t base = policy.base(p0, p1, seq.base);
        if (base != seq.base && !rebase(part.seq_id, base)) {
            return false;
        }

        // sink tokens stored so far; those of this very micro-batch follow in capture_sinks()
        const int64_t n_stored = std::min(policy.n_sink, p0);

        for (int64_t b = policy.block(p0); n_stored > 0 && b <= policy.block(p1); ++b) {
            const int64_t p     = b*policy.n_block;
            const int64_t icopy = policy.copy(p);
            const int64_t shift = icopy == 0 ? 0 : policy.sink_shift(p);

            auto & copy = seq.copies[icopy];

            if (copy.n_v < n_stored) {
                if (!copy_values(part.seq_id, icopy)) {
                    return false;
                }
                copy.n_v = n_stored;
            }

            if (copy.shift != shift || copy.base != seq.base || copy.n_k < n_stored) {
                for (int64_t j = 0; j < n_stored; ++j) {
                    moves.push_back({ part.seq_id*policy.n_sink + j, global_cell(part.seq_id, policy.sink_cell(icopy, j)),
                            policy.sink_pos(j, shift) - seq.base });
                }
                copy.shift = shift;
                copy.base  = seq.base;
                copy.n_k   = n_stored;

                seq.n_placements++;
            }
        }
    }

    if (!place_keys(moves)) {
        for (auto & seq : seqs) {
            for (auto & copy : seq.copies) {
                copy.n_k = 0; // unknown now: place again
            }
        }
        return false;
    }

    ubatch.data->pos_rope.clear();
    for (const auto & part : parts(ubatch)) {
        const auto & seq = seqs[part.seq_id];

        if (seq.n_past < policy.n_sink) {
            capture_sinks(part.seq_id, seq.n_past, seq.n_past + part.n - 1, (int32_t) part.i0);
        }
        for (uint32_t i = 0; i < part.n; ++i) {
            ubatch.data->pos_rope.push_back((llama_pos) (seq.n_past + i - seq.base));
        }
    }
    if (middle) {
        begin_middle(ubatch);
    }
    // no query sees a distance above L, so none needs another temperature than that of position L
    ubatch.data->pos_max = (llama_pos) policy.n_clamp;

    return true;
}

void lminf_kv_cache::apply_ubatch(const slot_info & sinfo, const llama_ubatch & ubatch) {
    GGML_UNUSED(sinfo); // append() chooses the same cells again

    for (const auto & part : parts(ubatch)) {
        seqs[part.seq_id].append(part.n);
    }
}

uint32_t lminf_kv_cache::get_n_kv(const slot_info & sinfo) const {
    int64_t res = 0;
    for (const auto seq_id : sinfo.strm) {
        res = std::max(res, seqs[seq_id].n_used());
    }
    // in steps, so that the graph can be reused
    return (uint32_t) std::min(policy.n_cells(), GGML_PAD(res, 256));
}
