#include "lminf-mover.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>

// rows that are moved in one graph: bounds its compute buffer
static constexpr size_t N_MOVES_MAX = 256;

lminf_mover::lminf_mover(const llama_context & lctx, const lminf_layers & layers, const std::vector<ggml_tensor *> & originals) :
    // a moved row takes at most 14 nodes in each layer
    lctx(lctx), layers(layers), originals(originals), runner(lctx, 64 + 16*layers.all.size()) {
    const bool has_originals = std::any_of(originals.begin(), originals.end(), [](const auto * t) { return t != nullptr; });
    for (const bool from_originals : { false, true }) {
        if (!from_originals || has_originals) {
            runner.reserve([&](ggml_context * ctx, ggml_cgraph * gf) { build_keys(ctx, gf, N_MOVES_MAX, from_originals, true); });
        }
    }
    if (has_originals) {
        runner.reserve([&](ggml_context * ctx, ggml_cgraph * gf) {
            build_values(ctx, gf, std::vector<lminf_value_move>(N_MOVES_MAX, { 0, 0 }));
        });
    }
}

void lminf_mover::new_inputs(ggml_context * ctx, int64_t n) {
    src  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    cell = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n);
    pos  = layers.new_positions(ctx, n);
    ggml_set_input(src);
    ggml_set_input(cell);
}

void lminf_mover::build_keys(ggml_context * ctx, ggml_cgraph * gf, int64_t n, bool from_originals, bool is_reserved) {
    new_inputs(ctx, n);

    for (size_t i = 0; i < layers.all.size(); ++i) {
        lminf_layer layer = layers.all[i];
        if (is_reserved) {
            layer.rope = lminf_rope::any(layer.n_embd_k, layers.n_pos_per_embd);
            layer.rope.is_hadamard_rotated = layer.k_rot != nullptr;
        }
        if (!from_originals && layer.rope.state == lminf_rope::PLAIN) {
            continue; // a key is the same at every position
        }
        ggml_tensor * rows = layer.k_rows(ctx);

        ggml_tensor * cur = ggml_get_rows(ctx, from_originals ? originals[i] : rows, src);
        cur = ggml_reshape_3d(ctx, cur, layer.n_embd_k, layer.n_head_kv, n);
        if (!from_originals && layer.hadamard()) {
            cur = llama_mul_mat_hadamard(ctx, cur, layer.hadamard());
        }
        cur = layer.restored(ctx, cur, pos);
        cur = ggml_reshape_2d(ctx, cur, rows->ne[0], n);

        ggml_build_forward_expand(gf, ggml_set_rows(ctx, rows, cur, cell));
    }
}

// Quantised rows go through F32, which gives back the same bits: not every device copies them as they are.
void lminf_mover::build_values(ggml_context * ctx, ggml_cgraph * gf, const std::vector<lminf_value_move> & moves) {
    const auto n = (int64_t) moves.size();

    new_inputs(ctx, n);

    for (const auto & layer : layers.all) {
        if (!layer.v) {
            continue;
        }
        if (!layers.v_trans) {
            ggml_tensor * rows = layer.v_rows(ctx);
            ggml_build_forward_expand(gf, ggml_set_rows(ctx, rows, ggml_get_rows(ctx, rows, src), cell));
            continue;
        }
        // components are rows, the cells of a stream columns; both sides are consecutive cells
        const int64_t n_cells = layer.v->ne[1];
        const int64_t n_embd  = layer.v->ne[0];
        const auto view = [&](int64_t first) {
            ggml_tensor * v = layer.v_stream[first/n_cells];
            return ggml_view_2d(ctx, v, n, n_embd, n_cells*v->nb[0], first % n_cells*v->nb[0]);
        };
        ggml_build_forward_expand(gf, ggml_cpy(ctx, view(moves[0].src), view(moves[0].cell)));
    }
}

bool lminf_mover::place(const std::vector<lminf_key_move> & moves) {
    // a few small rows: more threads would only wait for each other
    return move_keys(moves, true, 1);
}

bool lminf_mover::shift(const std::vector<lminf_key_move> & moves) {
    return move_keys(moves, false, lctx.n_threads());
}

bool lminf_mover::move_keys(const std::vector<lminf_key_move> & moves, bool from_originals, int n_threads) {
    for (size_t i0 = 0; i0 < moves.size(); i0 += N_MOVES_MAX) {
        const size_t n = std::min(N_MOVES_MAX, moves.size() - i0);

        const auto build = [&](ggml_context * ctx, ggml_cgraph * gf) { build_keys(ctx, gf, (int64_t) n, from_originals, false); };

        const auto set_inputs = [&]() {
            std::vector<int32_t> srcs(n), positions(n);
            std::vector<int64_t> cells(n);
            for (size_t i = 0; i < n; ++i) {
                srcs     [i] = (int32_t) moves[i0 + i].src;
                positions[i] = moves[i0 + i].pos;
                cells    [i] = moves[i0 + i].cell;
            }
            ggml_backend_tensor_set(src,  srcs .data(), 0, ggml_nbytes(src));
            ggml_backend_tensor_set(cell, cells.data(), 0, ggml_nbytes(cell));
            layers.set_positions(pos, positions);
        };

        if (!runner.run(2*n + (from_originals ? 1 : 0), n_threads, build, set_inputs)) {
            LLAMA_LOG_ERROR("%s: failed to rotate %zu keys\n", __func__, n);
            return false;
        }
    }
    return true;
}

bool lminf_mover::copy_values(const std::vector<lminf_value_move> & moves) {
    for (size_t i0 = 0; i0 < moves.size();) {
        // one stretch of cells at a time: transposed values are copied as such
        size_t n = 1;
        while (n < N_MOVES_MAX && i0 + n < moves.size() && moves[i0 + n].src == moves[i0 + n - 1].src + 1 &&
                moves[i0 + n].cell == moves[i0 + n - 1].cell + 1) {
            ++n;
        }
        const std::vector<lminf_value_move> some(moves.begin() + (int64_t) i0, moves.begin() + (int64_t) (i0 + n));

        const auto set_inputs = [&]() {
            std::vector<int32_t> srcs;
            std::vector<int64_t> cells;
            for (const auto & move : some) {
                srcs .push_back((int32_t) move.src);
                cells.push_back(move.cell);
            }
            if (src->buffer) { // not if values are transposed
                ggml_backend_tensor_set(src,  srcs .data(), 0, ggml_nbytes(src));
                ggml_backend_tensor_set(cell, cells.data(), 0, ggml_nbytes(cell));
            }
        };
        if (!runner.run(0, 1, [&](ggml_context * ctx, ggml_cgraph * gf) { build_values(ctx, gf, some); }, set_inputs)) {
            LLAMA_LOG_ERROR("%s: failed to copy %zu values\n", __func__, n);
            return false;
        }
        i0 += n;
    }
    return true;
}
