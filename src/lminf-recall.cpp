#include "lminf-recall.h"

#include "lminf-scan.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

// rows that are multiplied with all queries before the next ones: they stay in the nearest cache
static constexpr int64_t N_TILE = 64;

// queries at a time, so that their products with a tile stay there too
static constexpr int64_t N_QUERIES = 64;

// of all heaps together
static constexpr int64_t N_HEAP_FLOATS = int64_t(1) << 24;

struct lminf_recall::layer_op {
    lminf_recall * self;
    size_t         layer;
    float          scale   = 1.0f;
    float          softcap = 0.0f;

    float logit(float product) const {
        const float x = product*scale;
        return softcap == 0.0f ? x : softcap*tanhf(x/softcap);
    }
};

// The best keys that one thread found for one query (or the queries of one KV head), a heap in the memory of a tensor.
struct lminf_recall::best {
    struct entry {
        float   score;
        int32_t index; // from the first key that the query can recall
    };

    static int64_t n_floats(int64_t n_best) { return 2*(1 + n_best); }

    int64_t n = 0; // so far
    entry   entries[1]; // n_best

    // of equal scores the newer key is the better one, so that the result does not depend on how keys are shared out
    static bool is_better(const entry & a, const entry & b) {
        return a.score > b.score || (a.score == b.score && a.index > b.index);
    }

    void offer(const entry & e, int64_t n_best) {
        if (n < n_best) {
            entries[n++] = e;
            std::push_heap(entries, entries + n, is_better);
        } else if (is_better(e, entries[0])) {
            std::pop_heap(entries, entries + n, is_better);
            entries[n - 1] = e;
            std::push_heap(entries, entries + n, is_better);
        }
    }
};

lminf_recall::lminf_recall(lminf_store & store, std::vector<int64_t> n_heads, int64_t n_best, bool per_head) :
    store(store), n_heads(std::move(n_heads)), n_best(n_best), per_head(per_head) {
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

        const bool is_last = i + 1 == this->tokens.size() || this->tokens[i + 1].seq != token.seq;
        token.record = is_last ? (int64_t) recorded.size() : -1;
        if (is_last) {
            recorded.push_back(token.seq);
        }
    }
    for (auto & record : records) {
        record.clear();
    }
    for (size_t il = 0; il < records.size(); ++il) {
        records[il].resize(recorded.size()*n_heads[il]*n_best);
    }
}

void lminf_recall::clear_records() {
    recorded.clear();
}

static char * element(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3 = 0) {
    return (char *) t->data + i1*t->nb[1] + i2*t->nb[2] + i3*t->nb[3];
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

// rows: F32 [n_embd, n_head, n_tokens]; first: where a head's rows begin
template <typename F>
static void store_rows(const lminf_store & store, const std::vector<lminf_recall_token> & tokens, const ggml_tensor * rows,
        size_t row_size, int ith, int nth, F && first) {
    const auto from_float = ggml_get_type_traits_cpu(store.type)->from_float;

    for (int64_t i = ith; i < rows->ne[1]*rows->ne[2]; i += nth) {
        const int64_t head  = i % rows->ne[1];
        const int64_t token = i/rows->ne[1];

        uint8_t * dst = first(tokens[token].seq, head) + tokens[token].pos % store.n_slots*row_size;
        from_float((const float *) element(rows, head, token), dst, rows->ne[0]);
    }
}

void lminf_recall::compute_store_k(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & op = *(const layer_op *) data;
    const auto & store = op.self->store;

    store_rows(store, op.self->tokens, dst->src[1], store.k_row_size(op.layer), ith, nth,
        [&](int64_t seq, int64_t head) { return store.k_rows(seq, op.layer, head); });
}

void lminf_recall::compute_store_v(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & op = *(const layer_op *) data;
    const auto & store = op.self->store;

    store_rows(store, op.self->tokens, dst, store.v_row_size(op.layer), ith, nth,
        [&](int64_t seq, int64_t head) { return store.v_rows(seq, op.layer, head); });
}

//
// the three operations
//

ggml_tensor * lminf_recall::attend(ggml_context * ctx, size_t layer, const inputs & in) {
    layer_op * op = ops[layer].get();
    op->scale   = in.scale;
    op->softcap = in.softcap;
    const int64_t n_embd_v = in.v->nb[1] > in.v->nb[2] ? in.v->ne[2] : in.v->ne[0];
    const int64_t n_head   = in.q->ne[1];
    const int64_t n_tokens = in.q->ne[2];
    const int64_t n_group  = per_head ? n_head : in.k->ne[1];

    // few queries: the threads share the cells of each
    const int64_t n_split = n_tokens*in.k->ne[1] < 8*in.n_threads ? in.n_threads : 1;

    ggml_tensor * for_window[] = { in.q, in.k, in.v, in.mask };
    ggml_tensor * window = ggml_custom_4d(ctx, GGML_TYPE_F32, n_embd_v + 2, n_head, n_tokens, n_split,
            for_window, 4, compute_window, GGML_N_TASKS_MAX, op);

    // threads that scan: each has heaps of its own, whose size is bounded
    const int64_t n_floats = best::n_floats(n_best)*n_group*n_tokens;
    const int64_t n_share  = std::clamp<int64_t>(N_HEAP_FLOATS/n_floats, 1, in.n_threads);

    ggml_tensor * for_scan[] = { in.q_far, window, in.stored_k };
    ggml_tensor * scan = ggml_custom_4d(ctx, GGML_TYPE_F32, best::n_floats(n_best), n_group, n_tokens, n_share,
            for_scan, 3, compute_scan, GGML_N_TASKS_MAX, op);

    ggml_tensor * for_merge[] = { window, scan, in.q_far, in.stored_v };
    return ggml_custom_4d(ctx, GGML_TYPE_F32, n_embd_v*n_head, n_tokens, 1, 1,
            for_merge, 4, compute_merge, GGML_N_TASKS_MAX, op);
}

// A part of a softmax: the values, weighted relative to the largest logit, and the sum of the weights.
struct softmax_part {
    float * values;
    float   max = -INFINITY;
    float   sum = 0.0f;

    // makes room for a logit
    void raise(float logit, int64_t n) {
        if (logit > max) {
            const float factor = expf(max - logit);
            for (int64_t i = 0; i < n; ++i) {
                values[i] *= factor;
            }
            sum *= factor;
            max = logit;
        }
    }

    float log_sum_exp() const { return max + logf(sum); }
};

static void add_scaled(float * dst, const float * src, float factor, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        dst[i] += factor*src[i];
    }
}

static void to_floats(ggml_type type, const void * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else if (type == GGML_TYPE_F16) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

static float mask_at(const ggml_tensor * mask, const char * row, int64_t i) {
    return mask->type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(((const ggml_fp16_t *) row)[i]) : ((const float *) row)[i];
}

// 1. [values, max, sum] of what each head sees anyway, in n_split parts
void lminf_recall::compute_window(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & op = *(const layer_op *) data;

    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    const bool v_trans = v->nb[1] > v->nb[2];

    const int64_t n_embd_v  = dst->ne[0] - 2;
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_rep     = q->ne[1]/n_head_kv;
    const int64_t n_tokens  = q->ne[2];
    const int64_t n_kv      = k->ne[2];
    const int64_t n_split   = dst->ne[3];
    const int64_t n_stream_tokens = n_tokens/k->ne[3];

    lminf_scan_queries queries(k->type, k->ne[0]);

    std::vector<int64_t> cells;
    std::vector<float>   products(n_rep), weights(n_rep*N_TILE), value(n_embd_v);
    std::vector<softmax_part> parts(n_rep);

    for (int64_t i = ith; i < n_tokens*n_head_kv*n_split; i += nth) {
        const int64_t split  = i % n_split;
        const int64_t head   = i/n_split % n_head_kv;
        const int64_t token  = i/n_split/n_head_kv;
        const int64_t stream = token/n_stream_tokens;

        queries.clear();
        for (int64_t r = 0; r < n_rep; ++r) {
            queries.add((const float *) element(q, head*n_rep + r, token));

            parts[r] = { (float *) element(dst, head*n_rep + r, token, split) };
            std::fill(parts[r].values, parts[r].values + n_embd_v, 0.0f);
        }
        const char * visible = element(mask, token % n_stream_tokens, 0, stream);

        const int64_t end = n_kv*(split + 1)/n_split;
        for (int64_t cell = n_kv*split/n_split; cell < end;) {
            cells.clear();
            for (; cell < end && (int64_t) cells.size() < N_TILE; ++cell) {
                if (mask_at(mask, visible, cell) > -INFINITY) {
                    cells.push_back(cell);
                }
            }
            for (size_t c = 0; c < cells.size(); ++c) {
                queries.multiply((const uint8_t *) element(k, head, cells[c], stream), 0, 1, 0, n_rep, products.data());
                for (int64_t r = 0; r < n_rep; ++r) {
                    weights[r*N_TILE + c] = op.logit(products[r]);
                }
            }
            for (int64_t r = 0; r < n_rep && !cells.empty(); ++r) {
                float * w = weights.data() + r*N_TILE;
                parts[r].raise(*std::max_element(w, w + cells.size()), n_embd_v);
                for (size_t c = 0; c < cells.size(); ++c) {
                    w[c] = expf(w[c] - parts[r].max);
                    parts[r].sum += w[c];
                }
            }
            for (size_t c = 0; c < cells.size(); ++c) {
                if (!v_trans) {
                    to_floats(v->type, element(v, head, cells[c], stream), value.data(), n_embd_v);
                } else {
                    for (int64_t d = 0; d < n_embd_v; ++d) {
                        to_floats(v->type, element(v, head, d, stream) + cells[c]*v->nb[0], &value[d], 1);
                    }
                }
                for (int64_t r = 0; r < n_rep; ++r) {
                    add_scaled(parts[r].values, value.data(), weights[r*N_TILE + c], n_embd_v);
                }
            }
        }
        for (const auto & part : parts) {
            part.values[n_embd_v]     = part.max;
            part.values[n_embd_v + 1] = part.sum;
        }
    }
}

// all that a head sees anyway; the values go into dst
static softmax_part join_parts(const ggml_tensor * window, int64_t head, int64_t token, float * dst) {
    const int64_t n = window->ne[0] - 2;

    softmax_part res = { dst };
    std::fill(dst, dst + n, 0.0f);
    for (int64_t split = 0; split < window->ne[3]; ++split) {
        const auto * part = (const float *) element(window, head, token, split);
        if (part[n + 1] > 0.0f) {
            res.raise(part[n], n);

            const float factor = expf(part[n] - res.max);
            add_scaled(res.values, part, factor, n);
            res.sum += factor*part[n + 1];
        }
    }
    return res;
}

static float log_sum_exp(const ggml_tensor * window, int64_t head, int64_t token) {
    const int64_t n = window->ne[0] - 2;

    softmax_part res = { nullptr };
    for (int64_t split = 0; split < window->ne[3]; ++split) {
        const auto * part = (const float *) element(window, head, token, split);
        if (part[n + 1] > 0.0f) {
            res.raise(part[n], 0);
            res.sum += expf(part[n] - res.max)*part[n + 1];
        }
    }
    return res.log_sum_exp();
}

// 2. the best keys of each query, or of the queries of each KV head, as each thread finds them in its share of the keys
void lminf_recall::compute_scan(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & op   = *(const layer_op *) data;
    auto       & self = *op.self;

    const int64_t t_start = ggml_time_us();

    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * window = dst->src[1];

    const int64_t n_best    = self.n_best;
    const int64_t n_head_kv = self.store.n_heads(op.layer);
    const int64_t n_rep     = q->ne[1]/n_head_kv;
    const int64_t n_share   = std::min<int64_t>(nth, dst->ne[3]);
    const int64_t n_slots   = self.store.n_slots;
    const size_t  row_size  = self.store.k_row_size(op.layer);

    const auto heap = [&](int64_t group, int64_t token, int64_t share) {
        return (best *) element(dst, group, token, share);
    };
    for (int64_t share = ith; share < dst->ne[3]; share += nth) {
        for (int64_t i = 0; i < dst->ne[1]*dst->ne[2]; ++i) {
            heap(i % dst->ne[1], i/dst->ne[1], share)->n = 0;
        }
    }
    if (ith >= n_share) {
        return;
    }

    lminf_scan_queries queries(self.store.type, q->ne[0]);

    const int64_t n_chunk = std::max<int64_t>(1, N_QUERIES/n_rep); // tokens

    std::vector<float> products(n_chunk*n_rep*N_TILE), scores(N_TILE), seen;

    const auto & tokens = self.tokens;
    for (size_t t0 = 0, t1; t0 < tokens.size(); t0 = t1) {
        // the tokens of one sequence, and what any of them can recall
        int64_t begin = INT64_MAX;
        int64_t end   = 0;
        for (t1 = t0; t1 < tokens.size() && tokens[t1].seq == tokens[t0].seq; ++t1) {
            if (tokens[t1].begin < tokens[t1].end) {
                begin = std::min(begin, tokens[t1].begin);
                end   = std::max(end,   tokens[t1].end);
            }
        }
        if (begin >= end) {
            continue;
        }
        const int64_t my_begin = begin + (end - begin)*ith/n_share;
        const int64_t my_end   = begin + (end - begin)*(ith + 1)/n_share;

        for (int64_t head = 0; head < n_head_kv; ++head) {
            const uint8_t * rows = self.store.k_rows(tokens[t0].seq, op.layer, head);

            queries.clear();
            seen.clear();
            for (size_t t = t0; t < t1; ++t) {
                for (int64_t r = 0; r < n_rep; ++r) {
                    queries.add((const float *) element(q, head*n_rep + r, (int64_t) t));
                    seen.push_back(self.per_head ? 0.0f : log_sum_exp(window, head*n_rep + r, (int64_t) t));
                }
            }

            int64_t n;
            for (int64_t j = my_begin; j < my_end; j += n) {
                n = std::min({ N_TILE, my_end - j, n_slots - j % n_slots });

                for (size_t c0 = t0; c0 < t1; c0 += n_chunk) {
                    const int64_t n_c = std::min<int64_t>(n_chunk, t1 - c0);
                    queries.multiply(rows + j % n_slots*row_size, row_size, n, (c0 - t0)*n_rep, n_c*n_rep, products.data());

                    for (int64_t c = 0; c < n_c; ++c) {
                        const auto & token = tokens[c0 + c];

                        const int64_t r0 = std::clamp<int64_t>(token.begin - j, 0, n);
                        const int64_t r1 = std::clamp<int64_t>(token.end   - j, 0, n);

                        const auto offer = [&](best * found) {
                            for (int64_t r = r0; r < r1; ++r) {
                                if (found->n < n_best || scores[r] >= found->entries[0].score) {
                                    found->offer({ scores[r], (int32_t) (j + r - token.begin) }, n_best);
                                }
                            }
                        };
                        for (int64_t i = 0; i < n_rep; ++i) {
                            const float * product = products.data() + (c*n_rep + i)*n;
                            const float   minus   = seen[(c0 - t0 + c)*n_rep + i];
                            const bool    is_first = i == 0 || self.per_head;
                            for (int64_t r = 0; r < n; ++r) {
                                const float score = op.logit(product[r]) - minus;
                                scores[r] = is_first ? score : std::max(scores[r], score);
                            }
                            if (self.per_head) {
                                offer(heap(head*n_rep + i, (int64_t) c0 + c, ith));
                            }
                        }
                        if (!self.per_head) {
                            offer(heap(head, (int64_t) c0 + c, ith));
                        }
                    }
                }
            }
        }
    }
    if (ith == 0) {
        self.n_us_scan += ggml_time_us() - t_start;
    }
}

// 3. the best of all threads, in one softmax with what is seen anyway
void lminf_recall::compute_merge(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & op   = *(const layer_op *) data;
    auto       & self = *op.self;

    const ggml_tensor * window = dst->src[0];
    const ggml_tensor * scan   = dst->src[1];
    const ggml_tensor * q      = dst->src[2];

    const ggml_type type      = self.store.type;
    const int64_t   n_embd_v  = window->ne[0] - 2;
    const int64_t   n_head    = window->ne[1];
    const int64_t   n_head_kv = self.store.n_heads(op.layer);
    const int64_t   n_rep     = n_head/n_head_kv;
    const int64_t   n_slots   = self.store.n_slots;
    const size_t    k_size    = self.store.k_row_size(op.layer);
    const size_t    v_size    = self.store.v_row_size(op.layer);

    lminf_scan_queries queries(type, q->ne[0]);

    std::vector<best::entry> found;
    std::vector<float>       logits(self.n_best), value(n_embd_v);

    for (int64_t i = ith; i < window->ne[2]*n_head; i += nth) {
        const int64_t head    = i % n_head;
        const int64_t head_kv = head/n_rep;
        const int64_t i_token = i/n_head;

        const auto & token = self.tokens.at(i_token);

        const uint8_t * k_rows = self.store.k_rows(token.seq, op.layer, head_kv);
        const uint8_t * v_rows = self.store.v_rows(token.seq, op.layer, head_kv);

        found.clear();
        for (int64_t share = 0; share < scan->ne[3]; ++share) {
            const auto * heap = (const best *) element(scan, self.per_head ? head : head_kv, i_token, share);
            found.insert(found.end(), heap->entries, heap->entries + heap->n);
        }
        const size_t n_found = std::min<size_t>(found.size(), self.n_best);
        std::partial_sort(found.begin(), found.begin() + n_found, found.end(), best::is_better);
        found.resize(n_found);

        softmax_part part = join_parts(window, head, i_token, (float *) element(dst, i_token, 0) + head*n_embd_v);

        const float seen = part.log_sum_exp();

        queries.clear();
        queries.add((const float *) element(q, head, i_token));
        for (size_t j = 0; j < n_found; ++j) {
            const int64_t slot = (token.begin + found[j].index) % n_slots;

            float product;
            queries.multiply(k_rows + slot*k_size, k_size, 1, 0, 1, &product);

            const float logit = op.logit(product);
            logits[j] = self.gated && logit <= seen ? -INFINITY : logit;
            part.raise(logits[j], n_embd_v);
        }
        for (size_t j = 0; j < n_found; ++j) {
            const int64_t slot = (token.begin + found[j].index) % n_slots;

            logits[j] = expf(logits[j] - part.max);
            if (logits[j] > 0.0f) {
                to_floats(type, v_rows + slot*v_size, value.data(), n_embd_v);
                add_scaled(part.values, value.data(), logits[j], n_embd_v);
                part.sum += logits[j];
            }
        }
        for (int64_t d = 0; d < n_embd_v; ++d) {
            part.values[d] /= part.sum;
        }

        if (token.record >= 0) {
            auto * record = self.records[op.layer].data() + (token.record*n_head + head)*self.n_best;
            for (size_t j = 0; j < n_found; ++j) {
                record[j] = { token.begin + found[j].index, logits[j]/part.sum };
            }
        }
    }
}

//
// what was looked up
//

std::vector<lminf_recalled> lminf_recall::record(int64_t seq) const {
    const auto it = std::find(recorded.begin(), recorded.end(), seq);
    if (it == recorded.end()) {
        return {};
    }
    std::map<int64_t, float> weights;
    for (const auto & layer : records) {
        const size_t n = layer.size()/recorded.size();
        for (size_t i = (it - recorded.begin())*n; i < (it - recorded.begin() + 1)*n; ++i) {
            if (layer[i].weight > 0.0f) {
                weights[layer[i].pos] += layer[i].weight;
            }
        }
    }
    std::vector<lminf_recalled> res;
    for (const auto & [pos, weight] : weights) {
        res.push_back({ pos, weight });
    }
    std::stable_sort(res.begin(), res.end(), [](const auto & a, const auto & b) { return a.weight > b.weight; });
    return res;
}
