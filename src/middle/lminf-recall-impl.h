// What the parts of lminf_recall share: what an operation is told, and heaps of keys.

#pragma once

#include "lminf-recall.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

struct lminf_recall::layer_op {
    lminf_recall * self;
    size_t         layer;
    float          scale   = 1.0f;
    float          softcap = 0.0f;

    float logit(float product) const {
        const float x = product*scale;
        return softcap == 0.0f ? x : softcap*tanhf(x/softcap);
    }

    // products become logits
    void apply(float * products, int64_t n) const {
        for (int64_t i = 0; i < n; ++i) {
            products[i] *= scale;
        }
        for (int64_t i = 0; softcap != 0.0f && i < n; ++i) {
            products[i] = softcap*tanhf(products[i]/softcap);
        }
    }

    // the product that has this logit; infinite if none has
    float product(float logit) const {
        if (softcap == 0.0f) {
            return logit/scale;
        }
        return logit >= softcap ? INFINITY : logit <= -softcap ? -INFINITY : softcap*atanhf(logit/softcap)/scale;
    }
};

// The best keys that one thread found for one query (or the queries of one KV head), a heap in the memory of a tensor.
struct lminf_recall::best {
    struct entry {
        float    score;
        uint32_t index : 31; // from the first key that the query can recall
        uint32_t is_candidate : 1; // a first pass chose it, or would have
    };

    static uint32_t index(int64_t n) { return (uint32_t) n & 0x7fffffff; }

    static int64_t n_floats(int64_t n_best) { return 2*(1 + n_best); }

    int64_t n = 0; // so far
    entry   entries[1]; // n_best

    // of equal scores the newer key is the better one, so that the result does not depend on how keys are shared out
    static bool is_better(const entry & a, const entry & b) {
        return a.score > b.score || (a.score == b.score && a.index > b.index);
    }

    // the score below which nothing is kept any more
    float worst(int64_t n_best) const { return n < n_best ? -INFINITY : entries[0].score; }

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

inline char * element(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3 = 0) {
    return (char *) t->data + i1*t->nb[1] + i2*t->nb[2] + i3*t->nb[3];
}

inline void to_floats(ggml_type type, const void * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else if (type == GGML_TYPE_F16) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}
