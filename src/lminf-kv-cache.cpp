#include "lminf-kv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>
#include <stdexcept>

// keys that a rebase rotates in one graph: bounds its compute buffer
static constexpr size_t N_MOVES_MAX = 256;

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

lminf_runner & lminf_kv_cache::get_runner() {
    if (!runner) {
        // a moved key takes at most 10 nodes, a copied value 3
        runner = std::make_unique<lminf_runner>(*lctx, 64 + 16*layers.size());
    }
    return *runner;
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

void lminf_kv_cache::capture_sinks(llama_seq_id seq_id, int64_t p0, int64_t p1, int32_t i_token) {
    auto & seq = seqs[seq_id];

    const int64_t n_stored = std::min(policy.n_sink, p1 + 1);

    const int64_t row0 = seq_id*policy.n_sink;

    for (int64_t j = p0; j < n_stored; ++j) {
        capture.sinks.push_back({ i_token + (int32_t) (j - p0), row0 + j, j - seq.base });
    }

    // The home is placed too, and overwritten right away by the keys as the model computed them: it makes the originals an
    // ancestor of the write that the graph waits for.
    int64_t icopy_last = -1;
    for (int64_t p = -1; p <= p1; p = p < p0 ? p0 : policy.block_end(p) + 1) {
        const int64_t icopy = p < p0 ? 0 : policy.copy(p);
        const int64_t shift = p < p0 ? 0 : policy.sink_shift(p);
        if (icopy == icopy_last) {
            continue;
        }
        icopy_last = icopy;

        for (int64_t j = icopy == 0 ? p0 : 0; j < n_stored; ++j) {
            capture.placements.push_back({ row0 + j, global_cell(seq_id, policy.sink_cell(icopy, j)),
                    policy.sink_pos(j, shift) - seq.base });
        }
        for (int64_t j = p0; icopy != 0 && j < n_stored; ++j) {
            capture.values.push_back({ i_token + (int32_t) (j - p0), seq_id, policy.sink_cell(icopy, j) });
        }
        seq.copies[icopy] = { shift, seq.base, n_stored, n_stored };

        seq.n_placements += icopy != 0;
    }
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
// keys on the move
//

ggml_tensor * lminf_kv_cache::k_rows(ggml_context * ctx, int32_t ikv) const {
    ggml_tensor * k = layers[ikv].k;
    return ggml_reshape_2d(ctx, k, k->ne[0], k->ne[1]*k->ne[2]);
}

bool lminf_kv_cache::place_keys(const std::vector<key_move> & moves) {
    // a few small rows: more threads would only wait for each other
    return move_keys(moves, true, 1);
}

bool lminf_kv_cache::shift_keys(const std::vector<key_move> & moves) {
    return move_keys(moves, false, lctx->n_threads());
}

bool lminf_kv_cache::move_keys(const std::vector<key_move> & moves, bool from_originals, int n_threads) {
    for (size_t i0 = 0; i0 < moves.size(); i0 += N_MOVES_MAX) {
        const size_t n = std::min(N_MOVES_MAX, moves.size() - i0);

        const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) {
            inp_moves.src  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
            inp_moves.pos  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
            inp_moves.cell = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
            for (auto * t : { inp_moves.src, inp_moves.pos, inp_moves.cell }) {
                ggml_set_input(t);
            }

            for (size_t i = 0; i < layers.size(); ++i) {
                const auto & rope = ropes[i];
                if (!from_originals && rope.state == lminf_rope::PLAIN) {
                    continue; // nothing to shift
                }
                const int64_t n_embd_head = hparams.n_embd_head_k(layers[i].il);

                ggml_tensor * rows = k_rows(ctx, i);

                ggml_tensor * cur = ggml_get_rows(ctx, from_originals ? sink_k[i] : rows, inp_moves.src);

                cur = ggml_reshape_3d(ctx, cur, n_embd_head, cur->ne[0]/n_embd_head, n);
                if (!from_originals && k_rot[i]) {
                    cur = llama_mul_mat_hadamard(ctx, cur, k_rot[i]);
                }
                cur = from_originals ? rope.rotate(ctx, cur, inp_moves.pos) : rope.shift(ctx, cur, inp_moves.pos);
                if (k_rot[i]) {
                    cur = llama_mul_mat_hadamard(ctx, cur, k_rot[i]);
                }
                cur = ggml_reshape_2d(ctx, cur, rows->ne[0], n);

                ggml_build_forward_expand(gf, ggml_set_rows(ctx, rows, cur, inp_moves.cell));
            }
        };

        const auto set_inputs = [&]() {
            std::vector<int32_t> src(n);
            std::vector<int32_t> pos(n);
            std::vector<int64_t> cell(n);
            for (size_t i = 0; i < n; ++i) {
                src [i] = (int32_t) moves[i0 + i].src;
                pos [i] = (int32_t) moves[i0 + i].pos;
                cell[i] = moves[i0 + i].cell;
            }
            ggml_backend_tensor_set(inp_moves.src,  src .data(), 0, ggml_nbytes(inp_moves.src));
            ggml_backend_tensor_set(inp_moves.cell, cell.data(), 0, ggml_nbytes(inp_moves.cell));
            if (inp_moves.pos->buffer) { // a model without any RoPE has no use for it
                ggml_backend_tensor_set(inp_moves.pos, pos.data(), 0, ggml_nbytes(inp_moves.pos));
            }
        };

        if (!get_runner().run(2*n + from_originals, n_threads, build, set_inputs)) {
            LLAMA_LOG_ERROR("%s: failed to rotate %zu keys\n", __func__, n);
            return false;
        }
    }
    return true;
}

bool lminf_kv_cache::copy_values(llama_seq_id seq_id, int64_t copy) {
    const int64_t dst = policy.sink_cell(copy, 0);

    const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) {
        for (const auto & layer : layers) {
            ggml_tensor * v = layer.v_stream[seq_id];

            const int64_t n_embd = v->ne[0];
            const size_t  size   = ggml_row_size(v->type, n_embd);

            const auto view = [&](int64_t cell) {
                return v_trans
                    ? ggml_view_2d(ctx, v, policy.n_sink, n_embd, ggml_row_size(v->type, v->ne[1]), ggml_row_size(v->type, cell))
                    : ggml_view_2d(ctx, v, n_embd, policy.n_sink, size, size*cell);
            };
            ggml_build_forward_expand(gf, ggml_cpy(ctx, view(0), view(dst)));
        }
    };

    return get_runner().run(0, 1, build, []() {});
}

bool lminf_kv_cache::rebase(llama_seq_id seq_id, int64_t base) {
    auto & seq = seqs[seq_id];

    const int64_t delta = base - seq.base;

    // what a rollback could bring back is rotated too; what was forgotten or overwritten is not
    std::vector<key_move> moves;
    for (int64_t j = seq.oldest; j < seq.n_past; ++j) {
        const int64_t cell = global_cell(seq_id, policy.ring_cell(j));
        moves.push_back({ cell, cell, -delta });
    }
    if (!shift_keys(moves)) {
        return false;
    }

    seq.base = base;
    seq.n_rebases++;

    return true;
}

//
// graph
//

ggml_tensor * lminf_kv_cache::build_input_k_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const {
    const auto & c = capture;
    if (c.sinks.empty()) {
        return llama_kv_cache::build_input_k_idxs(ctx, ubatch);
    }

    // [cells of the tokens, rows of the originals, cells of the placements]
    ggml_tensor * k_idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, ubatch.n_tokens + c.sinks.size() + c.placements.size());
    ggml_set_input(k_idxs);
    ggml_set_name(k_idxs, "attn_inp_k_idxs");

    const size_t n_values = c.values.empty() ? 0 : ubatch.n_tokens + c.values.size();

    capture.ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 2*c.sinks.size() + 2*c.placements.size() + n_values);
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

    const auto & rope = ropes[ikv];

    // keep the originals
    ggml_tensor * cur = ggml_view_2d(ctx, k_cur, n_embd, n_tokens, k_cur->nb[2], 0);

    cur = ggml_get_rows(ctx, cur, view_ids(ctx, c.ids, n_sinks, 0));
    cur = ggml_reshape_3d(ctx, cur, n_embd_head, n_head_kv, n_sinks);
    if (k_rot[ikv]) {
        cur = llama_mul_mat_hadamard(ctx, cur, k_rot[ikv]);
    }
    cur = rope.unrotate(ctx, cur, view_ids(ctx, c.ids, n_sinks, n_sinks));
    cur = ggml_reshape_2d(ctx, cur, n_embd, n_sinks);

    ggml_tensor * originals = ggml_set_rows(ctx, sink_k[ikv], cur, view_ids(ctx, k_idxs, n_sinks, n_tokens));

    // place them
    cur = ggml_get_rows(ctx, originals, view_ids(ctx, c.ids, n_placements, 2*n_sinks));
    cur = ggml_reshape_3d(ctx, cur, n_embd_head, n_head_kv, n_placements);
    cur = rope.rotate(ctx, cur, view_ids(ctx, c.ids, n_placements, 2*n_sinks + n_placements));
    if (k_rot[ikv]) {
        cur = llama_mul_mat_hadamard(ctx, cur, k_rot[ikv]);
    }
    cur = ggml_reshape_2d(ctx, cur, n_embd, n_placements);

    ggml_tensor * k = ggml_set_rows(ctx, k_rows(ctx, ikv), cur, view_ids(ctx, k_idxs, n_placements, n_tokens + n_sinks));

    // store the micro-batch
    cur = ggml_view_2d(ctx, k_cur, n_embd, n_tokens, k_cur->nb[2], 0);

    return ggml_set_rows(ctx, k, cur, view_ids(ctx, k_idxs, n_tokens, 0));
}

ggml_tensor * lminf_kv_cache::cpy_v(
        ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il, const slot_info & sinfo) const {
    const auto & c = capture;
    if (!c.values.empty()) {
        const int64_t n_embd_head = v_cur->ne[0];
        const int64_t n_head_kv   = v_cur->ne[1];

        const size_t n_tokens = v_cur->ne[2];
        const size_t n_values = n_tokens + c.values.size();

        v_cur = ggml_view_2d(ctx, v_cur, n_embd_head*n_head_kv, n_tokens, v_cur->nb[2], 0);
        v_cur = ggml_get_rows(ctx, v_cur, view_ids(ctx, c.ids, n_values, 2*c.sinks.size() + 2*c.placements.size()));
        v_cur = ggml_reshape_3d(ctx, v_cur, n_embd_head, n_head_kv, n_values);
    }

    return llama_kv_cache::cpy_v(ctx, v_cur, v_idxs, il, sinfo);
}

void lminf_kv_cache::set_input_k_idxs(ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const {
    llama_kv_cache::set_input_k_idxs(dst, ubatch, sinfo);

    const auto & c = capture;
    if (c.sinks.empty()) {
        return;
    }

    int64_t * cells = (int64_t *) dst->data + ubatch->n_tokens;

    std::vector<int32_t> ids;
    for (const auto & sink : c.sinks) {
        ids.push_back(sink.i_token);
        *cells++ = sink.row;
    }
    for (const auto & sink : c.sinks) {
        ids.push_back((int32_t) -sink.pos);
    }
    for (const auto & placement : c.placements) {
        ids.push_back((int32_t) placement.row);
        *cells++ = placement.cell;
    }
    for (const auto & placement : c.placements) {
        ids.push_back((int32_t) placement.pos);
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
static void fill_kq_mask(
        const lminf_policy & policy, T * row, int64_t n_kv, int64_t p, int64_t oldest, int64_t n_sinks, T keep, T drop) {
    std::fill(row, row + n_kv, drop);

    const int64_t icopy = policy.copy(p);
    for (int64_t j = 0; j < std::min(n_sinks, p + 1); ++j) {
        row[policy.sink_cell(icopy, j)] = keep;
    }

    // the ring is contiguous but for its end
    int64_t j = std::max(policy.window_begin(p), oldest);
    while (j <= p) {
        const int64_t cell = policy.ring_cell(j);
        const int64_t n    = std::min(p - j + 1, policy.n_cells() - cell);

        std::fill(row + cell, row + cell + n, keep);
        j += n;
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
            fill_kq_mask(policy, (ggml_fp16_t *) dst->data + n_kv*i, n_kv, p, seq.oldest, policy.n_sink,
                    ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
        } else {
            fill_kq_mask(policy, (float *) dst->data + n_kv*i, n_kv, p, seq.oldest, policy.n_sink, 0.0f, -INFINITY);
        }
    }
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
    for (const auto & [_, size] : memory_breakdown()) {
        res.n_bytes += size;
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
