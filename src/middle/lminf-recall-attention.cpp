#include "lminf-recall-impl.h"
#include "lminf-scan.h"

// visible cells at a time
static constexpr int64_t N_TILE = 64;

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
    const size_t  row_size  = ggml_row_size(k->type, k->ne[0]);
    const int64_t n_stream_tokens = n_tokens/k->ne[3];

    lminf_scan_queries queries(k->type, k->ne[0]);

    std::vector<int64_t> cells;
    std::vector<uint8_t> rows(N_TILE*row_size); // of a head, side by side
    std::vector<float>   weights(n_rep*N_TILE), value(n_embd_v);
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

        const auto & recalling = op.self->tokens.at(token);
        const auto & keys      = op.self->cells.at(recalling.seq);

        const int64_t end = n_kv*(split + 1)/n_split;
        for (int64_t cell = n_kv*split/n_split; cell < end;) {
            cells.clear();
            for (; cell < end && (int64_t) cells.size() < N_TILE; ++cell) {
                if (mask_at(mask, visible, cell) > -INFINITY && keys[cell] >= recalling.end) {
                    cells.push_back(cell);
                }
            }
            const auto n = (int64_t) cells.size();
            if (n == 0) {
                continue;
            }
            for (int64_t c = 0; c < n; ++c) {
                memcpy(rows.data() + c*row_size, element(k, head, cells[c], stream), row_size);
            }
            queries.multiply(rows.data(), row_size, n, 0, n_rep, weights.data());
            op.apply(weights.data(), n_rep*n);
            for (int64_t r = 0; r < n_rep; ++r) {
                float * w = weights.data() + r*n;
                parts[r].raise(*std::max_element(w, w + n), n_embd_v);
                for (int64_t c = 0; c < n; ++c) {
                    w[c] = expf(w[c] - parts[r].max);
                    parts[r].sum += w[c];
                }
            }
            for (int64_t c = 0; c < n; ++c) {
                if (!v_trans) {
                    to_floats(v->type, element(v, head, cells[c], stream), value.data(), n_embd_v);
                } else {
                    for (int64_t d = 0; d < n_embd_v; ++d) {
                        to_floats(v->type, element(v, head, d, stream) + cells[c]*v->nb[0], &value[d], 1);
                    }
                }
                for (int64_t r = 0; r < n_rep; ++r) {
                    add_scaled(parts[r].values, value.data(), weights[r*n + c], n_embd_v);
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

        if (self.is_checked && (self.per_head || head % n_rep == 0)) {
            self.n_checked += (int64_t) n_found;
            self.n_found   += std::count_if(found.begin(), found.end(), [](const auto & e) { return e.is_candidate != 0; });
        }
        if (token.record >= 0) {
            auto * record = self.records[op.layer].data() + (token.record*n_head + head)*self.n_best;
            for (int64_t j = 0; j < self.n_best; ++j) {
                record[j] = j < (int64_t) n_found ? lminf_recalled{ token.begin + found[j].index, logits[j]/part.sum } : lminf_recalled{ 0, 0.0f };
            }
        }
    }
}
