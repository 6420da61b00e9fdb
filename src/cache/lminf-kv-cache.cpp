#include "lminf-kv-cache.h"

#include "lminf-attention-op.h"
#include "lminf-middle.h"
#include "lminf-mover.h"
#include "lminf-sinks.h"

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

std::shared_ptr<lminf_cache_group> lminf_cache_group_scope::current() {
    return group_pending;
}

lminf_policy lminf_kv_cache::make_policy(
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
    res.cuts_at_rebase = params.deterministic;
    res.rotates_queries = group.has_own_attention() && !res.alibi;
    return res;
}

void lminf_kv_cache::init() {
    seqs.assign(n_seq_max, lminf_sequence(policy));

    init_layers();
    sinks = std::make_shared<lminf_sinks>(policy, kv, hparams.no_alloc);
    if (group->has_own_attention()) {
        attention = std::make_shared<lminf_attention_op>(model, policy, kv, sinks->originals());
    }
    middle = lminf_middle::make(model, policy, kv, *group, attention.get());

    group->caches.push_back(this);
}

void lminf_kv_cache::init_layers() {
    kv.n_stream       = n_stream;
    kv.n_pos_per_embd = hparams.n_pos_per_embd();
    kv.v_trans        = v_trans;

    std::map<ggml_backend_buffer_type_t, ggml_tensor *> k_rot;
    for (const auto & layer : layers) {
        lminf_layer res = {};
        res.il        = (int32_t) layer.il;
        res.k         = layer.k;
        res.v         = layer.v;
        res.k_stream  = layer.k_stream;
        res.v_stream  = layer.v_stream;
        res.n_head_kv = hparams.n_head_kv(layer.il);
        res.n_embd_k  = hparams.n_embd_head_k(layer.il);
        res.n_embd_v  = hparams.n_embd_head_v(layer.il);

        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layer.k->buffer);
        if (attn_rot_k && k_rot.count(buft) == 0) {
            ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead(), nullptr, true }) };

            ggml_tensor *           rot = build_input_k_rot(ctx.get());
            ggml_backend_buffer_ptr buf { hparams.no_alloc ? ggml_backend_buft_alloc_buffer(buft, 0)
                                                           : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
            if (!buf) {
                throw std::runtime_error("failed to allocate the cache's Hadamard matrix");
            }
            if (hparams.no_alloc) {
                rot->buffer = buf.get();
            } else {
                ggml_backend_tensor_set(rot, attn_rot_hadamard.at(rot->ne[0]).data(), 0, ggml_nbytes(rot));
            }
            k_rot[buft] = rot;
            k_rot_bufs.emplace_back(std::move(ctx), std::move(buf));
        }
        res.k_rot = attn_rot_k ? k_rot.at(buft) : nullptr;

        kv.all.push_back(std::move(res));
    }
    if (!hparams.no_alloc) {
        kv.use_large_pages();
    }
}

lminf_kv_cache::~lminf_kv_cache() {
    auto & caches = group->caches;
    caches.erase(std::remove(caches.begin(), caches.end(), this), caches.end());
}

llama_memory_context_ptr lminf_kv_cache::init_full() {
    // what the memory computes by itself finds its room now, or the context is not made
    if (!mover && !hparams.no_alloc) {
        mover = std::make_unique<lminf_mover>(group->lctx, kv, sinks->originals());
    }
    sinks->capture_most();
    if (attention) {
        attention->begin_any();
    }
    if (middle) {
        middle->set_recalls(false);
    }
    return llama_kv_cache::init_full();
}

//
// batches
//

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
    if (v_trans || !kv.is_host()) {
        return;
    }
    const auto moves = seqs[seq_id].compact();
    if (moves.empty()) {
        return;
    }
    group->lctx.synchronize();
    for (const auto & layer : kv.all) {
        for (ggml_tensor * t : { layer.k_stream[seq_id], layer.v_stream[seq_id] }) {
            for (size_t i = 0; t && i < moves.size(); ++i) {
                memcpy((char *) t->data + moves[i].to*t->nb[1], (char *) t->data + moves[i].from*t->nb[1], moves[i].n*t->nb[1]);
            }
        }
    }
}

llama_kv_cache::slot_info_vec_t lminf_kv_cache::prepare(const std::vector<llama_ubatch> & ubatches) {
    sinks->begin_capture();

    if (!group->lctx.get_cparams().causal_attn) {
        LLAMA_LOG_ERROR("%s: LM-Infinite needs causal attention, and llama_set_causal_attn() has turned it off\n", __func__);
        return {};
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
            if (ok && group->damaged[part.seq_id]) {
                LLAMA_LOG_ERROR("%s: sequence %d is damaged: moving its keys failed halfway; clear it\n", __func__, part.seq_id);
                return {};
            }
            if (ok) {
                if (part.n == 1 && ubatches.size() == 1) {
                    compact(part.seq_id);
                }
                const auto & seq = trial.emplace(part.seq_id, seqs[part.seq_id]).first->second;

                for (uint32_t i = 0; i < part.n; ++i) {
                    const uint32_t it = part.i0 + i;
                    ok = ok && ubatch.n_seq_id[it] == 1 && ubatch.seq_id[it][0] == part.seq_id &&
                        seq.origin + ubatch.pos[it] == seq.n_past + i;
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
        if (middle && !middle->reserve(seq_id, seq.n_past)) {
            return {};
        }
    }

    return res;
}

int64_t lminf_kv_cache::next_base(llama_seq_id seq_id, int64_t p0, int64_t p1) const {
    const auto * first = group->caches.front();
    const auto & seq   = first->seqs[seq_id];
    return first == this ? policy.base(p0, p1, seq.base) : seq.base;
}

bool lminf_kv_cache::begin_ubatch(const llama_ubatch & ubatch) {
    try {
        return make_ready(ubatch);
    } catch (const std::exception & error) { // it would go through llama_decode()
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }
}

bool lminf_kv_cache::make_ready(const llama_ubatch & ubatch) {
    sinks->begin_capture();

    //
    // plan
    //

    struct rebase { llama_seq_id seq_id; int64_t base; };

    std::vector<rebase>         rebases;
    std::vector<lminf_key_move> shifts;
    lminf_sinks::plan           plan;

    for (const auto & part : parts(ubatch)) {
        auto & seq = seqs[part.seq_id];

        const int64_t p0   = seq.n_past;
        const int64_t p1   = p0 + part.n - 1;
        const int64_t base = next_base(part.seq_id, p0, p1);

        if (base != seq.base) {
            rebases.push_back({ part.seq_id, base });
            // what a rollback could bring back is rotated too; what was forgotten or overwritten is not
            for (const auto & run : seq.kept()) {
                for (int64_t i = 0; i < run.n; ++i) {
                    const int64_t cell = global_cell(part.seq_id, run.cell + i);
                    shifts.push_back({ cell, cell, (int32_t) (seq.base - base) });
                }
            }
        }
        sinks->add_to(plan, part.seq_id, seq, p0, p1, base);
    }

    //
    // execute
    //

    if (!mover->shift(shifts)) {
        for (const auto & rebase : rebases) {
            group->damaged[rebase.seq_id] = true; // some keys stand where they stood, some do not
        }
        return false;
    }
    for (const auto & rebase : rebases) {
        seqs[rebase.seq_id].base = rebase.base;
        seqs[rebase.seq_id].n_rebases++;
    }
    if (!mover->copy_values(plan.values) || !mover->place(plan.keys)) {
        plan.forget();
        return false;
    }

    //
    // commit
    //

    plan.commit();

    ubatch.data->pos_rope.clear();
    for (const auto & part : parts(ubatch)) {
        auto & seq = seqs[part.seq_id];

        if (seq.n_past < policy.n_sink) {
            sinks->capture(part.seq_id, seq, seq.n_past, seq.n_past + part.n - 1, (int32_t) part.i0);
        }
        if (middle) {
            middle->find_means(part.seq_id, seq, group->lctx);
        }
        for (uint32_t i = 0; i < part.n; ++i) {
            ubatch.data->pos_rope.push_back((llama_pos) (seq.n_past + i - seq.base));
        }
    }
    std::vector<lminf_attention_op::part> tokens;
    for (const auto & part : parts(ubatch)) {
        tokens.push_back({ part.seq_id, &seqs[part.seq_id], seqs[part.seq_id].n_past, part.n });
    }
    if (attention) {
        attention->begin(tokens, n_threads());
    }
    if (middle) {
        middle->begin(tokens, group->recall);
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

int32_t lminf_kv_cache::n_threads() const {
    return (int32_t) std::max(group->lctx.n_threads(), group->lctx.n_threads_batch());
}

bool lminf_kv_cache::can_reuse_graph() const {
    return !sinks->is_capturing() && (!attention || attention->can_reuse_graph()) && (!middle || middle->can_reuse_graph());
}
