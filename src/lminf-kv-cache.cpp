#include "lminf-kv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

//
// lminf_kv_cache
//

lminf_kv_cache::lminf_kv_cache(
        const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
        const lminf_params & lparams, const lminf_policy & policy, const layer_filter_cb & filter) :
    llama_kv_cache(model, model.hparams, params.type_k, params.type_v, !cparams.flash_attn, cparams.offload_kqv,
            /* unified */ cparams.n_seq_max == 1, (uint32_t) policy.n_cells(), cparams.n_seq_max, /* n_pad */ 1,
            /* n_swa */ 0, LLAMA_SWA_TYPE_NONE, /* mem_other */ nullptr, filter, nullptr, nullptr),
    lparams(lparams), policy(policy), seqs(cparams.n_seq_max, new_sequence()), ropes(layers.size()) {
    alloc_sink_originals();
}

lminf_kv_cache::sequence lminf_kv_cache::new_sequence() const {
    sequence res;
    res.oldest = policy.n_sink;
    res.copies.resize(policy.n_copies());
    return res;
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

llama_memory_context_ptr lminf_kv_cache::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    capture = {};

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = n_stream == 1 ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        ubatches.push_back(std::move(ubatch));
    }

    bool ok = !ubatches.empty() && balloc.get_n_used() == balloc.get_n_tokens();

    std::vector<int64_t> n_next;
    n_next.reserve(seqs.size());
    for (const auto & seq : seqs) {
        n_next.push_back(seq.n_past);
    }

    slot_info_vec_t sinfos;

    for (const auto & ubatch : ubatches) {
        const uint32_t n_seqs = n_stream == 1 ? 1 : ubatch.n_seqs_unq;
        const size_t   n_tps  = ubatch.n_tokens/n_seqs;

        slot_info sinfo = { LLAMA_MAX_SEQ, 0, {}, {} };
        sinfo.resize(n_seqs);

        for (uint32_t s = 0; ok && s < n_seqs; ++s) {
            const llama_seq_id seq_id = ubatch.seq_id[s*n_tps][0];

            ok = has_seq(seq_id);
            if (!ok) {
                break;
            }
            sinfo.s0      = std::min<uint32_t>(sinfo.s0, seq_id);
            sinfo.s1      = std::max<uint32_t>(sinfo.s1, seq_id);
            sinfo.strm[s] = seq_id;

            for (size_t i = s*n_tps; i < (s + 1)*n_tps; ++i) {
                const int64_t p = logical(seqs[seq_id], ubatch.pos[i]);

                // a token belongs to one sequence, and a sequence has no holes
                ok = ok && ubatch.n_seq_id[i] == 1 && ubatch.seq_id[i][0] == seq_id && p == n_next[seq_id]++;

                sinfo.idxs[s].push_back((uint32_t) policy.cell(p));
            }
        }
        sinfos.push_back(std::move(sinfo));
    }

    if (!ok) {
        LLAMA_LOG_ERROR("%s: the batch does not continue its sequences by one token after the other, each in one sequence\n", __func__);
        return std::make_unique<llama_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    return std::make_unique<lminf_kv_cache_context>(this, std::move(sinfos), std::move(ubatches));
}

llama_memory_context_ptr lminf_kv_cache::init_full() {
    // the largest graph is one that captures all sink tokens and fills all copies
    capture = {};
    capture.sinks     .resize(policy.n_sink*n_stream);
    capture.placements.resize(policy.n_sink_cells()*n_stream);
    capture.values    .resize((policy.n_sink_cells() - policy.n_sink)*n_stream);

    return llama_kv_cache::init_full();
}

llama_memory_context_ptr lminf_kv_cache::init_update(llama_context * lctx, bool optimize) {
    this->lctx = lctx;
    return llama_kv_cache::init_update(lctx, optimize);
}

bool lminf_kv_cache::begin_ubatch(const llama_ubatch & ubatch) {
    capture = {};

    std::vector<key_move> moves;

    const uint32_t n_seqs = n_stream == 1 ? 1 : ubatch.n_seqs_unq;
    const size_t   n_tps  = ubatch.n_tokens/n_seqs;

    for (uint32_t s = 0; s < n_seqs; ++s) {
        const llama_seq_id seq_id = ubatch.seq_id[s*n_tps][0];

        auto & seq = seqs[seq_id];

        const int64_t p0 = seq.n_past;
        const int64_t p1 = p0 + (int64_t) n_tps - 1;

        const int64_t base = policy.base(p0, p1, seq.base);
        if (base != seq.base && !rebase(seq_id, base)) {
            return false;
        }

        // sink tokens stored so far; those of this very micro-batch follow in capture_sinks()
        const int64_t n_stored = std::min(policy.n_sink, p0);

        for (int64_t b = policy.block(p0); n_stored > 0 && b <= policy.block(p1); ++b) {
            const int64_t p     = b*policy.n_block;
            const int64_t shift = policy.sink_shift(p);
            const int64_t icopy = policy.copy(p);

            auto & copy = seq.copies[icopy];

            if (copy.n_v < n_stored) {
                if (!copy_values(seq_id, icopy)) {
                    return false;
                }
                copy.n_v = n_stored;
            }

            if (copy.shift != shift || copy.base != seq.base || copy.n_k < n_stored) {
                for (int64_t j = 0; j < n_stored; ++j) {
                    moves.push_back({ seq_id*policy.n_sink + j, global_cell(seq_id, policy.sink_cell(icopy, j)),
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

    for (uint32_t s = 0; s < n_seqs; ++s) {
        const llama_seq_id seq_id = ubatch.seq_id[s*n_tps][0];

        const int64_t p0 = seqs[seq_id].n_past;
        if (p0 < policy.n_sink) {
            capture_sinks(seq_id, p0, p0 + (int64_t) n_tps - 1, (int32_t) (s*n_tps));
        }
    }

    return true;
}

void lminf_kv_cache::commit_ubatch(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        auto & seq = seqs[ubatch.seq_id[i][0]];

        seq.n_past++;
        seq.n_high = std::max(seq.n_high, seq.n_past);
        seq.oldest = std::max(seq.oldest, policy.oldest_stored(seq.n_high));
    }
}

uint32_t lminf_kv_cache::used_cells(const llama_ubatch & ubatch) const {
    int64_t res = 0;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        res = std::max(res, std::min(policy.n_cells(), policy.n_sink_cells() + seqs[ubatch.seq_id[i][0]].n_high));
    }
    return (uint32_t) res;
}

std::vector<llama_pos> lminf_kv_cache::physical_positions(const llama_ubatch & ubatch) const {
    std::vector<llama_pos> res(ubatch.n_tokens);

    bool same = true;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const auto & seq = seqs[ubatch.seq_id[i][0]];

        res[i] = (llama_pos) (logical(seq, ubatch.pos[i]) - seq.base);
        same   = same && res[i] == ubatch.pos[i];
    }
    if (same) {
        res.clear();
    }
    return res;
}

//
// sequences
//

void lminf_kv_cache::clear(bool data) {
    for (auto & seq : seqs) {
        seq = new_sequence();
    }
    capture = {};

    llama_kv_cache::clear(data);
}

lminf_kv_cache::removal lminf_kv_cache::check_rm(const sequence & seq, llama_pos p0, llama_pos p1) const {
    const int64_t j0 = p0 <= 0 ? 0           : std::min(logical(seq, p0), seq.n_past);
    const int64_t j1 = p1 <  0 ? seq.n_past  : std::min(logical(seq, p1), seq.n_past);

    if (j0 >= j1) {
        return { true, seq.n_past, seq.oldest }; // nothing to remove
    }
    if (j1 == seq.n_past) {
        return { policy.can_cut(j0, seq.n_past, seq.n_high), j0, std::min(seq.oldest, std::max(j0, policy.n_sink)) };
    }
    // the oldest part of the window: from anywhere between the sink tokens and what is still there
    return { j0 >= policy.n_sink && j0 <= std::max(seq.oldest, policy.window_begin(seq.n_past)), seq.n_past, std::max(seq.oldest, j1) };
}

bool lminf_kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= 0 && !has_seq(seq_id)) {
        return false;
    }

    const llama_seq_id s0 = seq_id < 0 ? 0                    : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? (int) seqs.size() - 1 : seq_id;

    for (llama_seq_id s = s0; s <= s1; ++s) {
        if (!check_rm(seqs[s], p0, p1).ok) {
            LLAMA_LOG_ERROR("%s: [%d, %d) of sequence %d cannot be removed exactly: possible are the last n_rollback = %d tokens, "
                    "the oldest part of the window, and all\n", __func__, p0, p1, s, (int) policy.n_rollback);
            return false;
        }
    }

    for (llama_seq_id s = s0; s <= s1; ++s) {
        auto & seq = seqs[s];

        const auto rm = check_rm(seq, p0, p1);

        if (rm.n_keep == 0 && seq.n_past > 0) {
            seq = new_sequence();
            continue;
        }
        seq.n_past = rm.n_keep;
        seq.oldest = rm.oldest;

        if (seq.n_past < policy.n_sink) {
            for (size_t i = 1; i < seq.copies.size(); ++i) {
                seq.copies[i] = {};
            }
            seq.copies[0].n_k = std::min(seq.copies[0].n_k, seq.n_past);
            seq.copies[0].n_v = std::min(seq.copies[0].n_v, seq.n_past);
        }
    }

    return true;
}

void lminf_kv_cache::seq_keep(llama_seq_id seq_id) {
    for (llama_seq_id s = 0; s < (int) seqs.size(); ++s) {
        if (s != seq_id) {
            seqs[s] = new_sequence();
        }
    }
}

void lminf_kv_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (seq_id_src != seq_id_dst) {
        LLAMA_LOG_ERROR("%s: sequences of an LM-Infinite context cannot be copied; nothing was changed\n", __func__);
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
    return policy.n_sink > 0 ? 0 : (llama_pos) (std::max(policy.window_begin(seq.n_past - 1), seq.oldest) - seq.origin);
}

llama_pos lminf_kv_cache::seq_pos_max(llama_seq_id seq_id) const {
    const auto & seq = seqs.at(seq_id);
    return (llama_pos) (seq.n_past - 1 - seq.origin);
}

void lminf_kv_cache::renumber(llama_seq_id seq_id) {
    auto & seq = seqs[seq_id];
    if (seq.n_past - seq.origin > (1 << 30)) {
        // leaves room below for what can be removed
        seq.origin = seq.n_past - policy.n_cells();
    }
}

bool lminf_kv_cache::set_position(llama_seq_id seq_id, int64_t pos) {
    auto & seq = seqs[seq_id];
    if (pos < seq.n_past || seq.n_past < policy.n_sink) {
        return false;
    }
    seq.n_past = seq.n_high = seq.oldest = pos;
    renumber(seq_id);
    return true;
}

std::map<ggml_backend_buffer_type_t, size_t> lminf_kv_cache::memory_breakdown() const {
    auto res = llama_kv_cache::memory_breakdown();
    for (const auto & [_, buf] : sink_bufs) {
        res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

void lminf_kv_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(io);
    GGML_UNUSED(seq_id);
    GGML_UNUSED(flags);
    throw std::runtime_error("the state of an LM-Infinite context cannot be saved");
}

void lminf_kv_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(io);
    GGML_UNUSED(seq_id);
    GGML_UNUSED(flags);
    throw std::runtime_error("the state of an LM-Infinite context cannot be restored");
}

//
// what lminf.cpp reads
//

bool lminf_kv_cache::rope_is_supported() const {
    return std::all_of(ropes.begin(), ropes.end(), [](const lminf_rope & rope) {
        return rope.state == lminf_rope::ROTATED || rope.state == lminf_rope::PLAIN;
    });
}

lminf_stats lminf_kv_cache::stats(llama_seq_id seq_id) const {
    const auto & seq = seqs[seq_id];

    const int64_t n_sinks = std::min(policy.n_sink, seq.n_past);
    const int64_t begin   = std::max(policy.window_begin(seq.n_past - 1), seq.oldest);
    const int64_t n_ring  = std::max<int64_t>(0, seq.n_past - begin);

    lminf_stats res = {};
    res.n_past        = seq.n_past;
    res.n_evicted     = seq.n_past - n_sinks - n_ring;
    res.pos_physical  = seq.n_past - seq.base;
    res.n_placements  = seq.n_placements;
    res.n_rebases     = seq.n_rebases;
    res.n_cells       = (uint32_t) policy.n_cells();
    res.n_cells_used  = (uint32_t) (n_sinks + n_ring);
    res.n_ring        = (uint32_t) policy.n_ring();
    res.sink_distance = -1;
    if (n_sinks > 0) {
        const int64_t p = seq.n_past - 1;
        res.sink_distance = (int32_t) (p - policy.sink_pos(0, policy.sink_shift(p)));
    }
    return res;
}

size_t lminf_kv_cache::get_key(llama_seq_id seq_id, int32_t il, int64_t pos, void * dst, size_t size) const {
    const auto & seq = seqs[seq_id];
    const auto   it  = map_layer_ids.find(il);

    if (it == map_layer_ids.end() || pos < 0 || pos >= seq.n_past || (pos >= policy.n_sink && pos < seq.oldest)) {
        return 0;
    }
    ggml_tensor * k = layers[it->second].k_stream[seq_id];

    const size_t n = ggml_row_size(k->type, k->ne[0]);
    if (size < n) {
        return 0;
    }
    ggml_backend_tensor_get(k, dst, policy.cell(pos)*n, n);
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

//
// lminf_kv_cache_context
//

lminf_kv_cache_context::lminf_kv_cache_context(
        lminf_kv_cache * kv, slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches) :
    llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches)), kv_inf(kv) {
}

bool lminf_kv_cache_context::apply() {
    auto & ubatch = ubatches[i_cur];

    if (!kv_inf->begin_ubatch(ubatch)) {
        return false;
    }
    pos_rope        = kv_inf->physical_positions(ubatch);
    ubatch.pos_rope = pos_rope.empty() ? nullptr : pos_rope.data();

    kv_inf->commit_ubatch(ubatch);

    // in steps, so that the graph can be reused
    n_kv = std::min<uint32_t>(kv_inf->get_size(), GGML_PAD(kv_inf->used_cells(ubatch), 256));

    return true;
}

bool lminf_kv_cache_context::can_reuse_graph() const {
    return !kv_inf->captures_sinks();
}
