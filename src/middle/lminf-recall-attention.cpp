#include "lminf-recall-impl.h"
#include "lminf-scan.h"

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

// all that a head sees anyway; the values go into dst
static softmax_part take_window(const ggml_tensor * window, int64_t head, int64_t token, float * dst) {
    const int64_t n    = window->ne[0] - 2;
    const auto *  part = (const float *) element(window, head, token);

    std::copy(part, part + n, dst);
    return { dst, part[n], part[n + 1] };
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

        softmax_part part = take_window(window, head, i_token, (float *) element(dst, i_token, 0) + head*n_embd_v);

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
