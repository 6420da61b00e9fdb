// Keys and values that the memory itself moves: sink tokens placed for a block, the window rebased.

#include "lminf-kv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

// keys that are rotated in one graph: bounds its compute buffer
static constexpr size_t N_MOVES_MAX = 256;

lminf_runner & lminf_kv_cache::get_runner() {
    if (!runner) {
        // a moved key takes at most 10 nodes, a copied value 3
        runner = std::make_unique<lminf_runner>(*lctx, 64 + 16*layers.size());
    }
    return *runner;
}

bool lminf_kv_cache::place_keys(const std::vector<key_move> & moves) {
    if (layers.empty()) { // all layers have sliding windows
        return true;
    }
    // a few small rows: more threads would only wait for each other
    return move_keys(moves, true, 1);
}

bool lminf_kv_cache::shift_keys(const std::vector<key_move> & moves) {
    if (std::all_of(ropes.begin(), ropes.end(), [](const lminf_rope & rope) { return rope.state == lminf_rope::PLAIN; })) {
        return true; // layers without RoPE: a key is the same at every position
    }
    return move_keys(moves, false, lctx->n_threads());
}

std::vector<int32_t> lminf_kv_cache::rope_positions(const std::vector<int32_t> & pos) const {
    std::vector<int32_t> res;
    for (uint32_t i = 0; i < hparams.n_pos_per_embd(); ++i) {
        for (const int32_t p : pos) {
            res.push_back(i < 3 ? p : 0);
        }
    }
    return res;
}

bool lminf_kv_cache::move_keys(const std::vector<key_move> & moves, bool from_originals, int n_threads) {
    for (size_t i0 = 0; i0 < moves.size(); i0 += N_MOVES_MAX) {
        const size_t n = std::min(N_MOVES_MAX, moves.size() - i0);

        const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) {
            inp_moves.src  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
            inp_moves.pos  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n*hparams.n_pos_per_embd());
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
                if (!from_originals && hadamard(i)) {
                    cur = llama_mul_mat_hadamard(ctx, cur, hadamard(i));
                }
                cur = from_originals ? rope.rotate(ctx, cur, inp_moves.pos) : rope.shift(ctx, cur, inp_moves.pos);
                if (hadamard(i)) {
                    cur = llama_mul_mat_hadamard(ctx, cur, hadamard(i));
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
                ggml_backend_tensor_set(inp_moves.pos, rope_positions(pos).data(), 0, ggml_nbytes(inp_moves.pos));
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
    if (layers.empty() || !layers[0].v) { // latent attention: values are a part of the keys
        return true;
    }
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
    seq.for_each_key([&](int64_t, int64_t cell) {
        moves.push_back({ global_cell(seq_id, cell), global_cell(seq_id, cell), -delta });
    });
    if (!shift_keys(moves)) {
        return false;
    }

    seq.base = base;
    seq.n_rebases++;

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
