#include "lminf-recall-impl.h"

#include "ggml-cpu.h"

#include <map>
#include <optional>

// of all heaps together
static constexpr int64_t N_HEAP_FLOATS = int64_t(1) << 24;

lminf_recall::lminf_recall(lminf_store & store, std::vector<int64_t> n_heads, int64_t n_best, bool per_head, int64_t n_candidates) :
    store(store), n_heads(std::move(n_heads)), n_best(n_best), per_head(per_head), n_candidates(n_candidates) {
    for (size_t i = 0; i < store.n_layers(); ++i) {
        ops.push_back(std::make_unique<layer_op>(layer_op{ this, i }));
    }
    records.resize(store.n_layers());
}

lminf_recall::~lminf_recall() = default;

void lminf_recall::begin(std::vector<lminf_recall_token> tokens, bool recalls, bool gated) {
    this->tokens = std::move(tokens);
    this->gated  = gated;
    if (!recalls) {
        return;
    }
    recorded.clear();
    for (size_t i = 0; i < this->tokens.size(); ++i) {
        auto & token = this->tokens[i];

        const size_t i_later = i + N_RECORDED;
        const bool   is_last = i_later >= this->tokens.size() || this->tokens[i_later].seq != token.seq;
        token.record = is_last ? (int64_t) recorded.size() : -1;
        if (is_last) {
            recorded.emplace_back(token.seq, token.pos);
        }
    }
    for (size_t il = 0; il < records.size(); ++il) {
        records[il].resize(recorded.size()*n_heads[il]*n_best);
    }
}

//
// storing
//

ggml_tensor * lminf_recall::store_keys(ggml_context * ctx, size_t layer, ggml_tensor * cur, ggml_tensor * keys) {
    return ggml_custom_inplace(ctx, cur, &keys, 1, compute_store_k, GGML_N_TASKS_MAX, ops[layer].get());
}

ggml_tensor * lminf_recall::store_values(ggml_context * ctx, size_t layer, ggml_tensor * cur) {
    return ggml_custom_inplace(ctx, cur, nullptr, 0, compute_store_v, GGML_N_TASKS_MAX, ops[layer].get());
}

// Calls f(row, seq, head, slot) for each row of F32 [n_embd, n_head, n_tokens].
template <typename F>
static void for_each_row(const lminf_store & store, const std::vector<lminf_recall_token> & tokens, const ggml_tensor * rows,
        int ith, int nth, F && f) {
    for (int64_t i = ith; i < rows->ne[1]*rows->ne[2]; i += nth) {
        const int64_t head  = i % rows->ne[1];
        const auto &  token = tokens[i/rows->ne[1]];

        f((const float *) element(rows, head, i/rows->ne[1]), token.seq, head, token.pos % store.n_slots);
    }
}

static void store_sketch(const lminf_store & store, lminf_sketcher & sketcher, const float * key, int64_t seq, size_t layer,
        int64_t head, int64_t slot) {
    const float factor = sketcher.write(
            key, store.mean(seq, layer, head) + 1, store.sketches(seq, layer, head) + slot, store.n_slots);
    store.factors(seq, layer, head)[slot] = ggml_fp32_to_fp16(factor);
}

void lminf_recall::find_means(int64_t seq, int64_t slot, int64_t n) {
    for (size_t layer = 0; layer < store.n_layers(); ++layer) {
        const int64_t n_embd = store.n_embd_k(layer);

        lminf_sketcher     sketcher(n_embd);
        std::vector<float> keys(n*n_embd);

        for (int64_t head = 0; head < store.n_heads(layer); ++head) {
            float * mean = store.mean(seq, layer, head);
            if (mean[0] != 0.0f) {
                continue;
            }
            std::vector<double> sums(n_embd);
            for (int64_t i = 0; i < n; ++i) {
                float * key = keys.data() + i*n_embd;
                to_floats(store.type, store.k_rows(seq, layer, head) + (slot + i) % store.n_slots*store.k_row_size(layer), key, n_embd);
                for (int64_t d = 0; d < n_embd; ++d) {
                    sums[d] += key[d];
                }
            }
            for (int64_t d = 0; d < n_embd; ++d) {
                mean[1 + d] = (float) (sums[d]/(double) n);
            }
            mean[0] = 1.0f;
            for (int64_t i = 0; i < n; ++i) {
                store_sketch(store, sketcher, keys.data() + i*n_embd, seq, layer, head, (slot + i) % store.n_slots);
            }
        }
    }
}

void lminf_recall::compute_store_k(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & op    = *(const layer_op *) data;
    const auto & store = op.self->store;

    const ggml_tensor * keys = dst->src[1];

    const auto from_float = ggml_get_type_traits_cpu(store.type)->from_float;

    std::optional<lminf_sketcher> sketcher;
    if (store.n_words(op.layer) > 0) {
        sketcher.emplace(keys->ne[0]);
    }

    for_each_row(store, op.self->tokens, keys, ith, nth, [&](const float * key, int64_t seq, int64_t head, int64_t slot) {
        from_float(key, store.k_rows(seq, op.layer, head) + slot*store.k_row_size(op.layer), keys->ne[0]);
        if (sketcher && store.mean(seq, op.layer, head)[0] != 0.0f) {
            store_sketch(store, *sketcher, key, seq, op.layer, head, slot);
        }
    });
}

void lminf_recall::compute_store_v(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & op    = *(const layer_op *) data;
    const auto & store = op.self->store;

    const auto from_float = ggml_get_type_traits_cpu(store.type)->from_float;

    for_each_row(store, op.self->tokens, dst, ith, nth, [&](const float * value, int64_t seq, int64_t head, int64_t slot) {
        from_float(value, store.v_rows(seq, op.layer, head) + slot*store.v_row_size(op.layer), dst->ne[0]);
    });
}

//
// the three operations
//

ggml_tensor * lminf_recall::attend(ggml_context * ctx, size_t layer, const inputs & in) {
    layer_op * op = ops[layer].get();
    op->scale   = in.scale;
    op->softcap = in.softcap;
    const int64_t n_embd_v = in.window->ne[0] - 2;
    const int64_t n_head   = in.q_far->ne[1];
    const int64_t n_tokens = in.q_far->ne[2];
    const int64_t n_group  = per_head ? n_head : store.n_heads(layer);

    // threads that scan: each has heaps of its own, whose size is bounded
    const int64_t n_floats = best::n_floats(n_best)*n_group*n_tokens;
    const int64_t n_share  = std::clamp<int64_t>(N_HEAP_FLOATS/n_floats, 1, in.n_threads);

    ggml_tensor * for_scan[] = { in.q_far, in.window, in.stored_k };
    ggml_tensor * scan = ggml_custom_4d(ctx, GGML_TYPE_F32, best::n_floats(n_best), n_group, n_tokens, n_share,
            for_scan, 3, compute_scan, GGML_N_TASKS_MAX, op);

    ggml_tensor * for_merge[] = { in.window, scan, in.q_far, in.stored_v };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, n_embd_v*n_head, n_tokens, 1, 1,
            for_merge, 4, compute_merge, GGML_N_TASKS_MAX, op);
}

//
// what was looked up
//

std::vector<lminf_recalled> lminf_recall::record(int64_t seq, int64_t pos) const {
    const auto is_asked = [&](const auto & token) { return token.first == seq && (pos < 0 || token.second == pos); };
    const auto found    = std::find_if(recorded.rbegin(), recorded.rend(), is_asked);
    if (found == recorded.rend()) {
        return {};
    }
    const int64_t i_record = recorded.rend() - found - 1;
    std::map<int64_t, float> weights;
    for (const auto & layer : records) {
        const size_t n = layer.size()/recorded.size();
        for (size_t i = i_record*n; i < (i_record + 1)*n; ++i) {
            if (layer[i].weight > 0.0f) {
                weights[layer[i].pos] += layer[i].weight;
            }
        }
    }
    std::vector<lminf_recalled> res;
    for (const auto & [at, weight] : weights) {
        res.push_back({ at, weight });
    }
    std::stable_sort(res.begin(), res.end(), [](const auto & a, const auto & b) { return a.weight > b.weight; });
    return res;
}
