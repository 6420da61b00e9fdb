// The arithmetic of a block of keys and of a part: unpacking, scores, softmax, values. Included by lminf-attention.cpp alone.

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
constexpr int64_t BLOCK = 32;  // keys that are unpacked together
constexpr int64_t PART  = 256; // keys that are weighted together, for threads to share

constexpr int     W        = simd::WIDTH;
constexpr int     N_VEC    = BLOCK / W; // vectors of a block's scores
constexpr int64_t N_BLOCKS = PART / BLOCK;
constexpr float   NOTHING  = -INFINITY;

int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// rows of floats in the work area are whole units
int64_t padded(int64_t n) {
    return divide_up(n, LMINF_SIMD_UNIT) * LMINF_SIMD_UNIT;
}

// ---- unpacking a block's rows ----

constexpr int64_t unit_bytes(ggml_type type) {
    return type == GGML_TYPE_F32 ? 128 : type == GGML_TYPE_Q8_0 ? 34 : type == GGML_TYPE_Q4_0 ? 18 : 64;
}

// the cache lines of a row, unit by unit: its first byte's, and where each unit ends
template <ggml_type TYPE> void prefetch_unit(const char * unit, bool first) {
    if (first) {
        simd::prefetch(unit);
    }
    for (int64_t end = unit_bytes(TYPE); end > 0; end -= 64) {
        simd::prefetch(unit + end - 1);
    }
}

// f(units, their first component) for all units of N rows; the last is filled up with zeros. What lies `ahead` will be
// read soon, most likely the next block's.
template <ggml_type TYPE, int N, class F>
void for_units(const char * const * rows, int64_t n_embd, size_t ahead, const F & f) {
    constexpr int64_t UNIT  = LMINF_SIMD_UNIT;
    constexpr int64_t BYTES = unit_bytes(TYPE);

    const char * units[N];
    for (int64_t i = 0; i < n_embd / UNIT; ++i) {
        repeat<N>([&](auto r) {
            units[r] = rows[r] + i * BYTES;
            prefetch_unit<TYPE>(units[r] + ahead, i == 0);
        });
        f(units, i * UNIT);
    }
    const int64_t n_rest = n_embd % UNIT; // never of a quantised type
    if (n_rest) {
        char rest[N][BYTES] = {};
        repeat<N>([&](auto r) {
            memcpy(rest[r], rows[r] + n_embd / UNIT * BYTES, n_rest * (BYTES / UNIT));
            units[r] = rest[r];
        });
        f(units, n_embd - n_rest);
    }
}

// Values: one row of floats after the other, without their units' factors: a weight is multiplied with them before,
// once for all the numbers of a unit.
template <ggml_type TYPE>
LMINF_SIMD_FLATTEN void unpack_values(
    const char * const * rows, int64_t first, int64_t last, int64_t n_embd, size_t ahead, float * dst) {
    for (int64_t i = first; i < last; ++i) {
        float * row = dst + i * padded(n_embd);
        for_units<TYPE, 1>(rows + i, n_embd, ahead, [&](const char * const * units, int64_t component) {
            simd::unpack_numbers<TYPE>(units[0], [&](auto j, vec x) { simd::store(row + component + j * W, x); });
        });
    }
}

// factors of a block's rows, times `scale`: [unit][BLOCK]
template <ggml_type TYPE>
void unpack_factors(
    const char * const * rows, int64_t first, int64_t last, int64_t n_embd, float scale, float * dst) {
    for (int64_t unit = 0; unit < n_embd / LMINF_SIMD_UNIT; ++unit) {
        for (int64_t i = first / W * W; i < last; i += W) {
            const vec factor = simd::gather_f16(rows + i, unit * unit_bytes(TYPE));
            simd::store(dst + unit * BLOCK + i, simd::mul(factor, simd::set1(scale)));
        }
    }
}

// Keys: W of them interleaved, four components at a time, so that a vector holds components of W/4 keys, and sums over
// components end up in lanes by themselves. Vector i of a component is of the keys i, i + 4 ...
template <ggml_type TYPE>
LMINF_SIMD_FLATTEN void unpack_keys(
    const char * const * rows, int64_t first, int64_t last, int64_t n_embd, size_t ahead, float * dst) {
    constexpr int N = W / 4;
    for (int64_t i = first / W * W; i < last; i += W) {
        for (int64_t k = 0; k < 4; ++k) {
            const char * some[N];
            repeat<N>([&](auto r) { some[r] = rows[i + k + 4 * r]; });
            float * row = dst + i * padded(n_embd) + k * W;
            for_units<TYPE, N>(some, n_embd, ahead, [&](const char * const * units, int64_t component) {
                vec x[LMINF_SIMD_UNIT / W][N];
                repeat<N>([&](auto r) { simd::unpack_numbers<TYPE>(units[r], [&](auto j, vec y) { x[j][r] = y; }); });
                repeat<LMINF_SIMD_UNIT / W>([&](auto j) {
                    simd::transpose_groups(x[j]);
                    repeat<N>([&](auto r) { simd::store(row + (component + j * W + 4 * r) * W, x[j][r]); });
                });
            });
        }
    }
}

// Quantised keys in integers: pairs of components of GROUPS vectors of keys beside each other, unit by unit.
constexpr int64_t CHUNK      = simd::GROUPS * W;
constexpr int64_t PAIRS      = LMINF_SIMD_UNIT / 2;
constexpr int64_t CHUNK_SIZE = PAIRS * CHUNK; // of a unit

template <ggml_type TYPE>
LMINF_SIMD_FLATTEN void unpack_key_pairs(
    const char * const * rows, int64_t first, int64_t last, int64_t n_embd, size_t ahead, int32_t * dst) {
    const int64_t n_units = n_embd / LMINF_SIMD_UNIT;
    for (int64_t i = first / CHUNK * CHUNK; i < last; i += CHUNK) {
        for (int64_t unit = 0; unit < n_units; ++unit) {
            int32_t * chunk = dst + (i / CHUNK * n_units + unit) * CHUNK_SIZE;
            for (int64_t group = 0; group < simd::GROUPS; ++group) {
                const char * units[W];
                repeat<W>([&](auto r) {
                    units[r] = rows[i + group * W + r] + unit * unit_bytes(TYPE);
                    prefetch_unit<TYPE>(units[r] + ahead, unit == 0);
                });
                simd::unpack_pairs<TYPE>(
                    units, [&](auto pair, simd::ivec x) { memcpy(chunk + pair * CHUNK + group * W, &x, sizeof(x)); });
            }
        }
    }
}

// Queries for integer products: each unit's components in sixteen bits, in the order of pairs.
struct integer_rows {
    int16_t * numbers; // [n_embd] of each row
    float *   factors; // [n_embd / LMINF_SIMD_UNIT]
    int32_t * sums;    // the same, of the numbers

    integer_rows row(int64_t i, int64_t n_embd) const {
        const int64_t n_units = n_embd / LMINF_SIMD_UNIT;
        return {numbers + i * n_embd, factors + i * n_units, sums + i * n_units};
    }
};

// Below 2^15, and of a size that the sum of a unit's products with bytes stays below 2^31. 127*256: a number could also
// be split into two signed bytes, for instructions that multiply bytes only, with the same results.
constexpr float MAX_NUMBER = 32512.0f;

inline void to_integers(const float * x, int64_t n_embd, const integer_rows & dst) {
    for (int64_t i = 0; i < n_embd; i += LMINF_SIMD_UNIT) {
        vec largest = simd::set1(0.0f);
        vec invalid = simd::set1(0.0f); // not a number if a component is infinite or none
        for (int64_t j = 0; j < LMINF_SIMD_UNIT; j += W) {
            const vec component = simd::load(x + i + j);
            largest             = simd::max(largest, simd::copysign(component, simd::set1(1.0f)));
            invalid             = simd::fma(component, simd::set1(0.0f), invalid);
        }
        const float max     = simd::max_of(largest);
        const vec   inverse = simd::set1(max > 0.0f ? MAX_NUMBER / max : 0.0f);
        const vec   magic   = simd::set1(12582912.0f); // 1.5*2^23: adding it leaves an integer in the lowest bits
        int32_t     rounded[LMINF_SIMD_UNIT];
        for (int64_t j = 0; j < LMINF_SIMD_UNIT; j += W) {
            const vec sum = simd::fma(simd::load(x + i + j), inverse, magic);
            memcpy(rounded + j, &sum, sizeof(sum));
        }
        int32_t total = 0;
        for (int j = 0; j < LMINF_SIMD_UNIT; ++j) {
            dst.numbers[i + j] = (int16_t)rounded[simd::pair_component(j)];
            total += dst.numbers[i + j];
        }
        dst.sums[i / LMINF_SIMD_UNIT]    = total;
        dst.factors[i / LMINF_SIMD_UNIT] = max / MAX_NUMBER + simd::sum_of(invalid);
    }
}

// ---- products: N query rows at a time, as many as there are registers for; each row gets the same whatever N is ----

// scores of W keys: lanes sum every fourth component, then in pairs
template <int N>
LMINF_SIMD_FLATTEN void multiply_keys(const float * const * q, const float * k, int64_t n_embd, float * scores) {
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
            const vec y = simd::in_register(simd::load(k + component * W + i * W));
            repeat<N>([&](auto r) { sum[r][i] = simd::fma(x[r], y, sum[r][i]); });
        });
    }
    repeat<N>(
        [&](auto r) { simd::store(scores + r * PART, simd::add_groups(sum[r][0], sum[r][1], sum[r][2], sum[r][3])); });
}

// scores of CHUNK keys from what unpack_key_pairs() left: a unit's products are exact, their factors are multiplied
// one unit after the other
template <int N>
LMINF_SIMD_FLATTEN void multiply_key_pairs(const integer_rows & q, int32_t offset, const int32_t * k,
    const float * k_factors, int64_t n_embd, float * scores) {
    constexpr int G       = simd::GROUPS;
    const int64_t n_units = n_embd / LMINF_SIMD_UNIT;
    for (int64_t unit = 0; unit < n_units; ++unit, k += CHUNK_SIZE, k_factors += BLOCK) {
        simd::isum sum[N][G];
        repeat<N>([&](auto r) {
            const auto start = simd::set1_sum(-offset * q.sums[r * n_units + unit]);
            repeat<G>([&](auto g) { sum[r][g] = start; });
        });
        const int16_t * numbers = q.numbers + unit * LMINF_SIMD_UNIT;
        for (int64_t pair = 0; pair < PAIRS; ++pair) {
            simd::ivec x[N];
            repeat<N>([&](auto r) { x[r] = simd::set1_pair(numbers + r * n_embd + 2 * pair); });
            repeat<G>([&](auto g) {
                simd::ivec y;
                memcpy(&y, k + pair * CHUNK + g * W, sizeof(y));
                y = simd::in_register(y);
                repeat<N>([&](auto r) { sum[r][g] = simd::in_register(simd::add_pairs(x[r], y, sum[r][g])); });
            });
        }
        repeat<N>([&](auto r) {
            const vec factor = simd::set1(q.factors[r * n_units + unit]);
            repeat<G>([&](auto g) {
                float *   dst     = scores + r * PART + g * W;
                const vec product = simd::mul(simd::to_float(simd::total(sum[r][g])), factor);
                const vec key     = simd::load(k_factors + g * W);
                simd::store(dst, unit == 0 ? simd::mul(product, key) : simd::fma(product, key, simd::load(dst)));
            });
        });
    }
}

template <int N, class F> void with_constant(int64_t n, const F & f) {
    if (n == N) {
        f(std::integral_constant<int, N>());
    } else if constexpr (N > 1) {
        with_constant<N - 1>(n, f);
    }
}

// N rows of weights, `stride` apart
struct weight_rows {
    const float * data;
    int64_t       stride;
};

// acc += weights of keys [first, last) times their values: D vectors, which values(key, put) puts
template <int N, int D, class V>
LMINF_SIMD_FLATTEN void add_values(
    const weight_rows & weights, const V & values, int64_t first, int64_t last, float * acc, int64_t stride) {
    vec sum[N][D];
    repeat<N>([&](auto r) { repeat<D>([&](auto i) { sum[r][i] = simd::load(acc + r * stride + i * W); }); });
    for (int64_t j = first; j < last; ++j) {
        vec x[N];
        repeat<N>([&](auto r) { x[r] = simd::set1(weights.data[r * weights.stride + j]); });
        values(j, [&](auto i, vec y) {
            const vec value = simd::in_register(y);
            repeat<N>([&](auto r) { sum[r][i] = simd::fma(x[r], value, sum[r][i]); });
        });
    }
    repeat<N>([&](auto r) { repeat<D>([&](auto i) { simd::store(acc + r * stride + i * W, sum[r][i]); }); });
}

// Weights of N rows for a unit's numbers: times its factors where it has any. All go the same way to the same bits.
template <int N> weight_rows unit_weights(const float * weights, const float * v_factors, int64_t unit, float * dst) {
    if (!v_factors) {
        return {weights, PART};
    }
    for (int64_t i = 0; i < BLOCK; i += W) {
        const vec factor = simd::load(v_factors + unit * BLOCK + i);
        repeat<N>(
            [&](auto r) { simd::store(dst + r * BLOCK + i, simd::mul(simd::load(weights + r * PART + i), factor)); });
    }
    return {dst, BLOCK};
}

constexpr int UNIT_VECS = LMINF_SIMD_UNIT / W;
constexpr int MAX_VECS  = UNIT_VECS < 4 ? UNIT_VECS : 4;

// from what unpack_values() left
template <int N>
void add_unpacked_values(const float * weights, const float * v, const float * v_factors, int64_t first, int64_t last,
    int64_t n_embd, float * acc) {
    const int64_t stride = padded(n_embd);
    const int64_t n_vec  = divide_up(n_embd, W);
    weight_rows   w      = {weights, PART};
    float         buffer[N * BLOCK];
    for (int64_t i_vec = 0; i_vec < n_vec; i_vec += MAX_VECS) {
        if (i_vec % UNIT_VECS == 0) {
            w = unit_weights<N>(weights, v_factors, i_vec / UNIT_VECS, buffer);
        }
        with_constant<MAX_VECS>(std::min<int64_t>(n_vec - i_vec, MAX_VECS), [&](auto d) {
            const auto values = [=](int64_t j, const auto & put) {
                repeat<d>([&](auto i) { put(i, simd::load(v + j * stride + (i_vec + i) * W)); });
            };
            add_values<N, d>(w, values, first, last, acc + i_vec * W, stride);
        });
    }
}

// From packed rows, where so few query rows need them that they fit into the registers beside a unit. The same bits.
constexpr int PACKED_ROWS = simd::ROWS * 4 / UNIT_VECS < simd::ROWS ? simd::ROWS * 4 / UNIT_VECS : simd::ROWS;

template <ggml_type TYPE>
void add_packed_values(int64_t n_rows, const float * weights, const char * const * rows, const float * v_factors,
    int64_t first, int64_t last, int64_t n_embd, size_t ahead, float * acc) {
    float buffer[PACKED_ROWS * BLOCK];
    for (int64_t unit = 0; unit < n_embd / LMINF_SIMD_UNIT; ++unit) {
        const int64_t offset = unit * unit_bytes(TYPE);
        const auto    values = [=](int64_t j, const auto & put) {
            prefetch_unit<TYPE>(rows[j] + offset + ahead, unit == 0);
            simd::unpack_numbers<TYPE>(rows[j] + offset, put);
        };
        with_constant<PACKED_ROWS>(n_rows, [&](auto n) {
            const weight_rows w = unit_weights<n>(weights, v_factors, unit, buffer);
            add_values<n, UNIT_VECS>(w, values, first, last, acc + unit * LMINF_SIMD_UNIT, n_embd);
        });
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

// ---- the one dispatch: what is done with rows of a type ----

struct type_functions {
    decltype(&unpack_keys<GGML_TYPE_F32>)       keys; // NULL: as pairs of integers
    decltype(&unpack_key_pairs<GGML_TYPE_Q8_0>) key_pairs;
    decltype(&unpack_values<GGML_TYPE_F32>)     values;
    decltype(&unpack_factors<GGML_TYPE_Q8_0>)   factors; // NULL: it has none
    decltype(&add_packed_values<GGML_TYPE_F32>) add_packed;

    int32_t offset; // see number_offset()
    float   scale;  // see number_scale()
};

template <ggml_type TYPE> const type_functions & functions_of() {
    if constexpr (simd::has_factor(TYPE)) {
        static const type_functions res = {nullptr, unpack_key_pairs<TYPE>, unpack_values<TYPE>, unpack_factors<TYPE>,
            add_packed_values<TYPE>, simd::number_offset(TYPE), simd::number_scale(TYPE)};
        return res;
    } else {
        static const type_functions res = {
            unpack_keys<TYPE>, nullptr, unpack_values<TYPE>, nullptr, add_packed_values<TYPE>, 0, 1.0f};
        return res;
    }
}

// other types are unpacked by ggml before
inline bool is_unpacked_here(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0: return true;
        default: return false;
    }
}

const type_functions & functions_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32: return functions_of<GGML_TYPE_F32>();
        case GGML_TYPE_F16: return functions_of<GGML_TYPE_F16>();
        case GGML_TYPE_BF16: return functions_of<GGML_TYPE_BF16>();
        case GGML_TYPE_Q8_0: return functions_of<GGML_TYPE_Q8_0>();
        default: return functions_of<GGML_TYPE_Q4_0>();
    }
}

// ---- softmax ----

// how a score becomes a logit
struct logit_params {
    float scale;
    float softcap;
    float slope;
    float distance; // of the part's first key, at most clamp + PART
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
            distances[i] = std::min(params.distance - (float)(lane + i), params.clamp);
        }
        x = simd::fma(simd::set1(-params.slope), simd::load(distances), x);
    }
    return x;
}

// A row's scores of a part become weights in place, and 0 where nothing is visible; `visible` has a bit for each key of
// a block. Returns the largest logit; sums are by lanes.
LMINF_SIMD_FLATTEN float soften(
    float * scores, const uint32_t * visible, int64_t n_blocks, const logit_params & params, float * sums) {
    const bool plain = params.softcap == 0.0f && params.slope == 0.0f;
    vec        best  = simd::set1(NOTHING);
    for (int64_t i = 0; i < n_blocks; ++i) {
        float *    block  = scores + i * BLOCK;
        const auto become = [&](const auto & logits_of_lanes) {
            repeat<N_VEC>([&](auto j) {
                const vec x = logits_of_lanes(simd::load(block + j * W), j * W);
                simd::store(block + j * W, x);
                best = simd::max(best, x);
            });
        };
        if (plain && visible[i] == UINT32_MAX) {
            become([&](vec x, int) { return simd::mul(x, simd::set1(params.scale)); });
        } else if (visible[i]) {
            become([&](vec x, int lane) {
                return simd::select(visible[i] >> lane, logits_of(x, params, i * BLOCK + lane), simd::set1(NOTHING));
            });
        }
    }
    const float max   = simd::max_of(best);
    const vec   shift = simd::set1(max == NOTHING ? 0.0f : max);
    vec         sum   = simd::set1(0.0f);
    for (int64_t i = 0; i < n_blocks; ++i) {
        float * block = scores + i * BLOCK;
        if (!visible[i]) {
            std::fill_n(block, BLOCK, 0.0f);
            continue;
        }
        repeat<N_VEC>([&](auto j) {
            const vec x = simd::exp(simd::sub(simd::load(block + j * W), shift));
            simd::store(block + j * W, x);
            sum = simd::add(sum, x);
        });
    }
    simd::store(sums, sum);
    return max;
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
        sum() = std::fma(other.sum(), other_factor, sum() * factor);
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
