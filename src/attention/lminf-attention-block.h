// The arithmetic of one block of keys: unpacking, scores, softmax, values. Included by lminf-attention.cpp alone.

#pragma once

#include "lminf-attention-simd.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace {

namespace simd = lminf_simd;
using simd::repeat;
using simd::vec;

// results depend on these, so they depend on nothing
constexpr int64_t BLOCK = 32;  // keys that are unpacked, scored and weighted together
constexpr int64_t PART  = 256; // keys that start from nothing, for threads to share

constexpr int   W       = simd::WIDTH;
constexpr int   N_VEC   = BLOCK/W; // vectors of a block's scores
constexpr float NOTHING = -INFINITY;

int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1)/b;
}

// rows of floats in the work area are whole units
int64_t padded(int64_t n) {
    return divide_up(n, LMINF_SIMD_UNIT)*LMINF_SIMD_UNIT;
}

// ---- unpacking a block's rows ----

constexpr int64_t unit_bytes(ggml_type type) {
    return type == GGML_TYPE_F32 ? 128 : type == GGML_TYPE_Q8_0 ? 34 : type == GGML_TYPE_Q4_0 ? 18 : 64;
}

// f(units, their first component) for all units of N rows; the last is filled up with zeros. What lies `ahead` will be
// read soon, most likely the next block's.
template <ggml_type TYPE, int N, class F>
void for_units(const char * const * rows, int64_t n_embd, size_t ahead, const F & f) {
    constexpr int64_t UNIT  = LMINF_SIMD_UNIT;
    constexpr int64_t BYTES = unit_bytes(TYPE);

    const char * units[N];
    for (int64_t i = 0; i < n_embd/UNIT; ++i) {
        repeat<N>([&](auto r) {
            units[r] = rows[r] + i*BYTES;
            for (int64_t j = 0; j < BYTES; j += 64) {
                simd::prefetch(units[r] + ahead + j);
            }
        });
        f(units, i*UNIT);
    }
    const int64_t n_rest = n_embd%UNIT; // never of a quantised type
    if (n_rest) {
        char rest[N][BYTES] = {};
        repeat<N>([&](auto r) {
            memcpy(rest[r], rows[r] + n_embd/UNIT*BYTES, n_rest*(BYTES/UNIT));
            units[r] = rest[r];
        });
        f(units, n_embd - n_rest);
    }
}

// Values: one row of floats after the other.
template <ggml_type TYPE>
LMINF_SIMD_FLATTEN void unpack_values(const char * const * rows, int64_t first, int64_t last, int64_t n_embd, size_t ahead, float * dst) {
    for (int64_t i = first; i < last; ++i) {
        float * row = dst + i*padded(n_embd);
        for_units<TYPE, 1>(rows + i, n_embd, ahead, [&](const char * const * units, int64_t component) {
            simd::unpack<TYPE>(units[0], [&](auto j, vec x) { simd::store(row + component + j*W, x); });
        });
    }
}

// Keys: W of them interleaved, four components at a time, so that a vector holds components of W/4 keys, and sums over
// components end up in lanes by themselves. Vector i of a component is of the keys i, i + 4 ...
template <ggml_type TYPE>
LMINF_SIMD_FLATTEN void unpack_keys(const char * const * rows, int64_t first, int64_t last, int64_t n_embd, size_t ahead, float * dst) {
    constexpr int N = W/4;
    for (int64_t i = first/W*W; i < last; i += W) {
        for (int64_t k = 0; k < 4; ++k) {
            const char * some[N];
            repeat<N>([&](auto r) { some[r] = rows[i + k + 4*r]; });
            float * row = dst + i*padded(n_embd) + k*W;
            for_units<TYPE, N>(some, n_embd, ahead, [&](const char * const * units, int64_t component) {
                vec x[LMINF_SIMD_UNIT/W][N];
                repeat<N>([&](auto r) { simd::unpack<TYPE>(units[r], [&](auto j, vec y) { x[j][r] = y; }); });
                repeat<LMINF_SIMD_UNIT/W>([&](auto j) {
                    simd::transpose_groups(x[j]);
                    repeat<N>([&](auto r) { simd::store(row + (component + j*W + 4*r)*W, x[j][r]); });
                });
            });
        }
    }
}

using unpacker = void (*)(const char * const * rows, int64_t first, int64_t last, int64_t n_embd, size_t ahead, float * dst);

template <ggml_type TYPE> unpacker unpacker_of(bool keys) {
    return keys ? unpack_keys<TYPE> : unpack_values<TYPE>;
}

unpacker unpacker_of(ggml_type type, bool keys) {
    switch (type) {
        case GGML_TYPE_F32: return unpacker_of<GGML_TYPE_F32>(keys);
        case GGML_TYPE_F16: return unpacker_of<GGML_TYPE_F16>(keys);
        case GGML_TYPE_BF16: return unpacker_of<GGML_TYPE_BF16>(keys);
        case GGML_TYPE_Q8_0: return unpacker_of<GGML_TYPE_Q8_0>(keys);
        default: return unpacker_of<GGML_TYPE_Q4_0>(keys);
    }
}

// ---- products: N query rows at a time, as many as there are registers for; each row gets the same whatever N is ----

// scores of W keys: lanes sum every fourth component, then in pairs
template <int N> LMINF_SIMD_FLATTEN void multiply_keys(const float * const * q, const float * k, int64_t n_embd, float * scores) {
    vec           sum[N][4];
    const float * rows[N];
    repeat<N>([&](auto r) {
        rows[r] = q[r];
        repeat<4>([&](auto i) { sum[r][i] = simd::set1(0.0f); });
    });
    for (int64_t component = 0; component < n_embd; component += 4) {
        vec x[N];
        repeat<N>([&](auto r) { x[r] = simd::load_group(rows[r] + component); });
        repeat<4>([&](auto i) {
            const vec y = simd::in_register(simd::load(k + component*W + i*W));
            repeat<N>([&](auto r) { sum[r][i] = simd::fma(x[r], y, sum[r][i]); });
        });
    }
    repeat<N>([&](auto r) {
        simd::store(scores + r*BLOCK, simd::add_groups(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
    });
}

// acc = factor*acc + weights of keys [first, last) times their values, for D vectors of the values
template <int N, int D>
LMINF_SIMD_FLATTEN void add_values(const float * weights, const float * factors, const float * v, int64_t stride, int64_t first, int64_t last,
    float * acc) {
    vec sum[N][D];
    repeat<N>([&](auto r) {
        const vec factor = simd::set1(factors[r]);
        repeat<D>([&](auto i) { sum[r][i] = simd::mul(simd::load(acc + r*stride + i*W), factor); });
    });
    for (int64_t j = first; j < last; ++j) {
        vec x[N];
        repeat<N>([&](auto r) { x[r] = simd::set1(weights[r*BLOCK + j]); });
        repeat<D>([&](auto i) {
            const vec y = simd::in_register(simd::load(v + j*stride + i*W));
            repeat<N>([&](auto r) { sum[r][i] = simd::fma(x[r], y, sum[r][i]); });
        });
    }
    repeat<N>([&](auto r) { repeat<D>([&](auto i) { simd::store(acc + r*stride + i*W, sum[r][i]); }); });
}

template <int N, class F> void with_constant(int64_t n, const F & f) {
    if (n == N) {
        f(std::integral_constant<int, N>());
    } else if constexpr (N > 1) {
        with_constant<N - 1>(n, f);
    }
}

// f(number of rows, first row), with numbers that are as equal as they can be
template <class F> void for_rows(int64_t first, int64_t last, const F & f) {
    while (first < last) {
        const int64_t n = divide_up(last - first, divide_up(last - first, simd::ROWS));
        with_constant<simd::ROWS>(n, [&](auto n_rows) { f(n_rows, first); });
        first += n;
    }
}

// ---- softmax ----

// how a score becomes a logit
struct logit_params {
    float scale;
    float softcap;
    float slope;
    float distance; // of the block's first key, at most clamp + BLOCK
    float clamp;
};

vec logits_of(vec scores, const logit_params & params, int64_t lane) {
    vec x = simd::mul(scores, simd::set1(params.scale));
    if (params.softcap != 0.0f) {
        x = simd::mul(simd::tanh(x), simd::set1(params.softcap));
    }
    if (params.slope != 0.0f) {
        float distances[W];
        for (int i = 0; i < W; ++i) {
            distances[i] = std::min(params.distance - (float) (lane + i), params.clamp);
        }
        x = simd::fma(simd::set1(-params.slope), simd::load(distances), x);
    }
    return x;
}

// A block's scores become weights in place. Returns the factor for what was summed before; sums are kept by lanes.
float soften(float * scores, uint32_t visible, const logit_params & params, float * max, float * sums) {
    vec x[N_VEC];
    vec best = simd::set1(NOTHING);
    for (int i = 0; i < N_VEC; ++i) {
        x[i] = simd::select(visible >> (i*W), logits_of(simd::load(scores + i*W), params, i*W), simd::set1(NOTHING));
        best = simd::max(best, x[i]);
    }
    const float new_max = std::max(*max, simd::max_of(best));
    if (new_max == NOTHING) {
        std::fill_n(scores, BLOCK, 0.0f);
        return 1.0f;
    }
    const vec shift  = simd::set1(new_max);
    const float factor = simd::exp(*max - new_max);
    vec       sum    = simd::set1(0.0f);
    for (int i = 0; i < N_VEC; ++i) {
        x[i] = simd::exp(simd::sub(x[i], shift));
        sum  = simd::add(sum, x[i]);
        simd::store(scores + i*W, x[i]);
    }
    simd::store(sums, simd::fma(simd::load(sums), simd::set1(factor), sum));
    *max = new_max;
    return factor;
}

// ---- joining ----

// a row of partial results: values that are not divided, then the largest logit and the sum
struct part_row {
    float * values;
    int64_t n; // padded

    float & max() const { return values[n]; }
    float & sum() const { return values[n + 1]; }

    static int64_t size(int64_t n_embd_v) { return padded(n_embd_v) + 2; }

    void clear() const {
        std::fill_n(values, n + 2, 0.0f);
        max() = NOTHING;
    }

    void rescale(float new_max, float * factor) const {
        *factor = max() == NOTHING ? 0.0f : simd::exp(max() - new_max);
        max()   = new_max;
    }

    void join(const part_row & other) const {
        if (other.max() == NOTHING) {
            return;
        }
        float       factor;
        const float new_max      = std::max(max(), other.max());
        const float other_factor = simd::exp(other.max() - new_max);
        rescale(new_max, &factor);
        for (int64_t i = 0; i < n; i += W) {
            const vec kept = simd::mul(simd::load(values + i), simd::set1(factor));
            simd::store(values + i, simd::fma(simd::load(other.values + i), simd::set1(other_factor), kept));
        }
        sum() = std::fma(other.sum(), other_factor, sum()*factor);
    }

    // a logit that counts without a value
    void join_logit(float logit) const {
        float       factor;
        const float new_max = std::max(max(), logit);
        rescale(new_max, &factor);
        for (int64_t i = 0; i < n; i += W) {
            simd::store(values + i, simd::mul(simd::load(values + i), simd::set1(factor)));
        }
        sum() = std::fma(sum(), factor, simd::exp(logit - new_max));
    }
};

} // namespace
