#include "lminf-sinks.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>

lminf_sinks::lminf_sinks(const lminf_policy & policy, const lminf_layers & layers, bool no_alloc) :
    policy(policy), layers(layers), no_alloc(no_alloc), tensors(layers.all.size(), nullptr) {
    if (policy.n_sink == 0) {
        return;
    }

    std::map<ggml_backend_buffer_type_t, std::vector<size_t>> by_buft;
    for (size_t i = 0; i < layers.all.size(); ++i) {
        by_buft[ggml_backend_buffer_get_type(layers.all[i].k->buffer)].push_back(i);
    }
    for (const auto & [buft, ids_of_buft] : by_buft) {
        const ggml_init_params iparams = {
            /*.mem_size   =*/ ggml_tensor_overhead()*ids_of_buft.size(),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };
        ggml_context_ptr ctx { ggml_init(iparams) };

        for (const size_t i : ids_of_buft) {
            const auto & layer = layers.all[i];
            tensors[i] = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, layer.k->ne[0], policy.n_sink*layers.n_stream);
            ggml_format_name(tensors[i], "sink_k_l%d", layer.il);
        }
        ggml_backend_buffer_ptr buf;
        if (no_alloc) { // nothing will be computed
            buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
            for (const size_t i : ids_of_buft) {
                tensors[i]->buffer = buf.get();
            }
        } else {
            buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
            if (!buf) {
                throw std::runtime_error("failed to allocate the sink tokens' originals");
            }
            ggml_backend_buffer_clear(buf.get(), 0);
        }
        buffers.emplace_back(std::move(ctx), std::move(buf));
    }
}

void lminf_sinks::add_memory(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const {
    for (const auto & [ctx, buf] : buffers) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());

        breakdown[buft] += no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft)
                                    : ggml_backend_buffer_get_size(buf.get());
    }
}

std::pair<size_t, size_t> lminf_sinks::slice(const ggml_tensor * original, int64_t seq_id) const {
    const size_t n = policy.n_sink*original->nb[1];
    return { seq_id*n, n };
}

//
// copies
//

void lminf_sinks::plan::commit() const {
    for (const auto & result : results) {
        auto & copy = result.seq->copies[result.copy];

        const bool is_placed = copy.shift != result.holds.shift || copy.base != result.holds.base || copy.n_k != result.holds.n_k;
        result.seq->n_placements += is_placed ? 1 : 0;
        copy = result.holds;
    }
}

void lminf_sinks::plan::forget() const {
    for (const auto & result : results) {
        auto & copy = result.seq->copies[result.copy];
        copy.n_k = 0;
        copy.n_v = result.copy == 0 ? copy.n_v : 0; // values stay at home
    }
}

void lminf_sinks::add_to(plan & plan, int64_t seq_id, lminf_sequence & seq, int64_t p0, int64_t p1, int64_t base) const {
    const int64_t n_stored = std::min(policy.n_sink, p0); // those of this very micro-batch are captured
    if (n_stored == 0) {
        return;
    }
    for (const auto & [icopy, shift] : policy.plan_placements(p0, p1)) {
        const auto & copy = seq.copies[icopy];

        const lminf_sequence::sink_copy wanted = { shift, base, n_stored, n_stored };

        const bool has_keys   = copy.shift == shift && copy.base == base && copy.n_k >= n_stored;
        const bool has_values = copy.n_v >= n_stored;
        for (int64_t j = 0; j < n_stored; ++j) {
            const int64_t cell = global_cell(seq_id, policy.sink_cell(icopy, j));
            if (!has_keys) {
                plan.keys.push_back({ seq_id*policy.n_sink + j, cell, (int32_t) (policy.sink_pos(j, shift) - base) });
            }
            if (!has_values) {
                plan.values.push_back({ global_cell(seq_id, policy.sink_cell(0, j)), cell });
            }
        }
        if (!has_keys || !has_values) {
            plan.results.push_back({ &seq, icopy, wanted });
        }
    }
}

//
// capturing
//

void lminf_sinks::begin_capture() {
    sinks.clear();
    placements.clear();
    values.clear();
}

void lminf_sinks::capture(int64_t seq_id, lminf_sequence & seq, int64_t p0, int64_t p1, int32_t i_token) {
    const int64_t n_stored = std::min(policy.n_sink, p1 + 1);

    const int64_t row0 = seq_id*policy.n_sink;

    for (int64_t j = p0; j < n_stored; ++j) {
        sinks.push_back({ i_token + (int32_t) (j - p0), row0 + j, j - seq.base });
    }

    const auto place = [&](int64_t icopy, int64_t shift, int64_t begin) {
        for (int64_t j = begin; j < n_stored; ++j) {
            placements.push_back({ row0 + j, global_cell(seq_id, policy.sink_cell(icopy, j)), policy.sink_pos(j, shift) - seq.base });
        }
        seq.copies[icopy] = { shift, seq.base, n_stored, n_stored };
    };
    // The home is placed too, and overwritten right away by the keys as the model computed them: it makes the originals an
    // ancestor of the write that the graph waits for.
    place(0, 0, p0);
    for (const auto & [icopy, shift] : policy.plan_placements(p0, p1)) {
        if (icopy == 0) {
            continue;
        }
        place(icopy, shift, 0);
        for (int64_t j = p0; j < n_stored; ++j) {
            values.push_back({ i_token + (int32_t) (j - p0), seq_id, policy.sink_cell(icopy, j) });
        }
        seq.n_placements++;
    }
}

void lminf_sinks::capture_most() {
    begin_capture();

    const int64_t n_tokens = std::min(policy.n_sink*layers.n_stream, policy.n_ubatch);
    sinks     .resize(n_tokens);
    placements.resize(n_tokens > 0 ? policy.n_sink_cells()*layers.n_stream : 0);
    values    .resize((policy.n_copies() - 1)*n_tokens);
}

ggml_tensor * lminf_sinks::build_k_idxs(ggml_context * ctx, int64_t n_tokens) const {
    const auto n_sinks      = (int64_t) sinks.size();
    const auto n_placements = (int64_t) placements.size();

    ggml_tensor * k_idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens + n_sinks + n_placements);
    ggml_set_input(k_idxs);
    ggml_set_name(k_idxs, "attn_inp_k_idxs");

    ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_sinks + n_placements + (values.empty() ? 0 : n_tokens + (int64_t) values.size()));
    ggml_set_input(ids);
    ggml_set_name(ids, "lminf_inp_sinks");

    pos_back      = layers.new_positions(ctx, n_sinks);
    pos_placement = layers.new_positions(ctx, n_placements);

    return k_idxs;
}

void lminf_sinks::set_k_idxs(ggml_tensor * k_idxs, int64_t n_tokens) const {
    int64_t * cells = (int64_t *) k_idxs->data + n_tokens;

    std::vector<int32_t> sources;
    std::vector<int32_t> back;
    std::vector<int32_t> placed;
    for (const auto & sink : sinks) {
        sources.push_back(sink.i_token);
        back   .push_back((int32_t) -sink.pos);
        *cells++ = sink.row;
    }
    for (const auto & placement : placements) {
        sources.push_back((int32_t) placement.row);
        placed .push_back((int32_t) placement.pos);
        *cells++ = placement.cell;
    }
    if (!values.empty()) {
        for (int64_t i = 0; i < n_tokens; ++i) {
            sources.push_back((int32_t) i);
        }
        for (const auto & value : values) {
            sources.push_back(value.i_token);
        }
    }
    assert((int64_t) sources.size() == ggml_nelements(ids));

    ggml_backend_tensor_set(ids, sources.data(), 0, ggml_nbytes(ids));
    layers.set_positions(pos_back, back);
    layers.set_positions(pos_placement, placed);
}

void lminf_sinks::set_v_idxs(ggml_tensor * v_idxs, int64_t n_tokens, int64_t n_embd_v) const {
    const int64_t n_cells = policy.n_cells();

    int64_t * data = (int64_t *) v_idxs->data + n_tokens*n_embd_v;
    for (const auto & value : values) {
        for (int64_t j = 0; j < n_embd_v; ++j) {
            *data++ = value.strm*n_cells*n_embd_v + j*n_cells + value.cell;
        }
    }
}

static ggml_tensor * part_of(ggml_context * ctx, ggml_tensor * t, size_t n, size_t i0) {
    return ggml_view_1d(ctx, t, (int64_t) n, i0*ggml_element_size(t));
}

ggml_tensor * lminf_sinks::cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, size_t ikv) const {
    const auto & layer = layers.all[ikv];

    const int64_t n_embd_head = k_cur->ne[0];
    const int64_t n_head_kv   = k_cur->ne[1];
    const int64_t n_tokens    = k_cur->ne[2];
    const int64_t n_embd      = n_embd_head*n_head_kv;

    const size_t n_sinks      = sinks.size();
    const size_t n_placements = placements.size();

    ggml_tensor * keys = ggml_view_2d(ctx, k_cur, n_embd, n_tokens, k_cur->nb[2], 0);

    // keep the originals
    ggml_tensor * cur = ggml_get_rows(ctx, keys, part_of(ctx, ids, n_sinks, 0));
    cur = layer.unstored(ctx, ggml_reshape_3d(ctx, cur, n_embd_head, n_head_kv, (int64_t) n_sinks), pos_back);
    cur = ggml_reshape_2d(ctx, cur, n_embd, (int64_t) n_sinks);

    ggml_tensor * kept = ggml_set_rows(ctx, tensors[ikv], cur, part_of(ctx, k_idxs, n_sinks, n_tokens));

    // place them
    cur = ggml_get_rows(ctx, kept, part_of(ctx, ids, n_placements, n_sinks));
    cur = layer.restored(ctx, ggml_reshape_3d(ctx, cur, n_embd_head, n_head_kv, (int64_t) n_placements), pos_placement);
    cur = ggml_reshape_2d(ctx, cur, n_embd, (int64_t) n_placements);

    ggml_tensor * k = ggml_set_rows(ctx, layer.k_rows(ctx), cur, part_of(ctx, k_idxs, n_placements, n_tokens + n_sinks));

    // store the micro-batch
    return ggml_set_rows(ctx, k, keys, part_of(ctx, k_idxs, n_tokens, 0));
}

ggml_tensor * lminf_sinks::add_values(ggml_context * ctx, ggml_tensor * v_cur, size_t ikv) const {
    const auto & layer = layers.all[ikv];
    const int64_t n_tokens = v_cur->ne[2];
    const int64_t n_rows   = n_tokens + (int64_t) values.size();

    v_cur = ggml_view_2d(ctx, v_cur, layer.n_embd_v*layer.n_head_kv, n_tokens, v_cur->nb[2], 0);
    v_cur = ggml_get_rows(ctx, v_cur, part_of(ctx, ids, n_rows, ids->ne[0] - n_rows));
    return ggml_reshape_3d(ctx, v_cur, layer.n_embd_v, layer.n_head_kv, n_rows);
}
