// Vectors of floats for the attention kernel (lminf-attention.cpp), one set of primitives per instruction set: AVX-512,
// AVX2 with FMA and F16C, and vectors of four for NEON and everything else that GCC and Clang compile for.
//
// The kernel relies on each primitive doing the same to every lane, always, and on nothing else about the machine: so
// its results have the same bits however often and in whatever tile a primitive is called. Products that are added to
// something are written as fma(), so that a compiler has nothing to contract in one place and not in another.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__FAST_MATH__)
#error "the attention kernel promises the same bits everywhere: compile it without -ffast-math"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LMINF_SIMD_AVX512
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// its own header leaves the destinations of unmasked instructions undefined on purpose (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LMINF_SIMD_AVX2
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define LMINF_SIMD_NEON
#include <arm_neon.h>
#endif

// for functions whose inner ones have to be part of them, so that vectors stay in registers
#if defined(__GNUC__)
#define LMINF_SIMD_FLATTEN __attribute__((flatten))
#else
#define LMINF_SIMD_FLATTEN
#endif

// the unit in which rows are unpacked: a block of a quantised type
#define LMINF_SIMD_UNIT 32

// A group of lanes is four: as many as every instruction set can broadcast and add in pairs.
namespace lminf_simd {

template <class T> static inline T read(const char * data) {
    T res;
    memcpy(&res, data, sizeof(T));
    return res;
}

#if defined(LMINF_SIMD_AVX512) || defined(LMINF_SIMD_AVX2)
#include "lminf-attention-simd-x86.h"
#elif defined(__GNUC__)
#include "lminf-attention-simd-four.h"
#else
#error "the attention kernel has no vectors for this compiler"
#endif

// ---- the same for all ----

static inline void prefetch(const char * x) {
#if defined(__GNUC__)
    __builtin_prefetch(x);
#else
    (void)x;
#endif
}

// x in a register: where it is used several times, a compiler may prefer to load it each time
template <class T> static inline T in_register(T x) {
#if defined(LMINF_SIMD_AVX512)
    __asm__("" : "+v"(x));
#elif defined(LMINF_SIMD_AVX2)
    __asm__("" : "+x"(x));
#endif
    return x;
}

// f(0) ... f(N - 1), each a constant: what a loop indexes with them stays in registers
template <class F, int... I> void repeat(const F & f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}

template <int N, class F> void repeat(const F & f) {
    repeat(f, std::make_integer_sequence<int, N>());
}

// whether a unit is numbers with a factor in half precision before them
constexpr bool has_factor(ggml_type type) {
    return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;
}

// what the numbers of a unit are to be multiplied with, besides the factor
constexpr float number_scale(ggml_type type) {
    return type == GGML_TYPE_Q4_0 ? 1.0f / S4_SCALE : 1.0f;
}

// put(i, the i-th vector of a unit of a row), without its factor
template <ggml_type TYPE, class F> static inline void unpack_numbers(const char * unit, const F & put) {
    constexpr int N = LMINF_SIMD_UNIT / WIDTH;
    if constexpr (TYPE == GGML_TYPE_F32) {
        repeat<N>([&](auto i) { put(i, load((const float *)unit + i * WIDTH)); });
    } else if constexpr (TYPE == GGML_TYPE_F16) {
        repeat<N>([&](auto i) { put(i, load_f16(unit + 2 * i * WIDTH)); });
    } else if constexpr (TYPE == GGML_TYPE_BF16) {
        repeat<N>([&](auto i) { put(i, load_bf16(unit + 2 * i * WIDTH)); });
    } else if constexpr (TYPE == GGML_TYPE_Q8_0) {
        repeat<N>([&](auto i) { put(i, load_s8(unit + 2 + i * WIDTH)); });
    } else {
        static_assert(TYPE == GGML_TYPE_Q4_0, "a type that is not served");
        // 16 bytes: their low nibbles, then their high ones
        repeat<N / 2>([&](auto i) {
            vec low;
            vec high;
            load_s4(unit + 2 + i * WIDTH, &low, &high);
            put(i, low);
            put(std::integral_constant<int, i + N / 2>(), high);
        });
    }
}

// A quantised unit in integers without signs: its numbers and this.
constexpr int32_t number_offset(ggml_type type) {
    return type == GGML_TYPE_Q4_0 ? 8 : 128;
}

// put(i, pair i of a unit of WIDTH rows), each pair two words in the lane of its row. The pairs are those of
// pair_component().
template <ggml_type TYPE, class F> static inline void unpack_pairs(const char * const * units, const F & put) {
    const auto fours = [&](size_t offset, const auto & put_four) {
        ivec x[4];
        repeat<4>([&](auto i) { x[i] = load_bytes(units + i, offset); });
        transpose_fours(x);
        repeat<4>([&](auto i) { put_four(i, x[i]); });
    };
    if constexpr (TYPE == GGML_TYPE_Q8_0) {
        repeat<2>([&](auto half) {
            fours(sizeof(uint16_t) + half * 16, [&](auto i, ivec x) {
                const ivec bytes = flip_signs(x);
                put(std::integral_constant<int, half * 8 + 2 * i>(), even_bytes(bytes));
                put(std::integral_constant<int, half * 8 + 2 * i + 1>(), odd_bytes(bytes));
            });
        });
    } else {
        static_assert(TYPE == GGML_TYPE_Q4_0, "a type without integers");
        fours(sizeof(uint16_t), [&](auto i, ivec x) {
            const ivec low  = low_nibbles(x);
            const ivec high = high_nibbles(x);
            put(std::integral_constant<int, 2 * i>(), even_bytes(low));
            put(std::integral_constant<int, 2 * i + 1>(), odd_bytes(low));
            put(std::integral_constant<int, 8 + 2 * i>(), even_bytes(high));
            put(std::integral_constant<int, 8 + 2 * i + 1>(), odd_bytes(high));
        });
    }
}

// which component of a unit the i-th word of its pairs is
constexpr int pair_component(int i) {
    return i / 4 * 4 + (i % 2) * 2 + i / 2 % 2;
}

// e^x = scale + scale*res, for x in [-87.3, 88]: Cephes' polynomial on [-ln 2/2, ln 2/2]
static inline vec exp_parts(vec x, vec * scale) {
    const vec magic = set1(12582912.0f); // 1.5*2^23: adding it rounds to an integer, left in the lowest bits
    const vec sum   = fma(x, set1(1.44269504f), magic);
    const vec n     = sub(sum, magic);
    vec       r     = fma(n, set1(-0.693359375f), x);
    r               = fma(n, set1(2.12194440e-4f), r);
    vec p           = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
    p               = fma(p, r, set1(8.3334519073e-3f));
    p               = fma(p, r, set1(4.1665795894e-2f));
    p               = fma(p, r, set1(1.6666665459e-1f));
    p               = fma(p, r, set1(5.0000001201e-1f));
    *scale          = pow2(sum);
    return fma(p, mul(r, r), r);
}

// e^x for x <= 0; what would be smaller than the smallest normal number is 0, e^-infinity among it
static inline vec exp(vec x) {
    constexpr float LOWEST = -87.3f;
    vec             scale;
    const vec       res = exp_parts(max(set1(LOWEST), x), &scale);
    return zero_below(fma(scale, res, scale), x, LOWEST);
}

static inline float exp(float x) {
    float res[WIDTH];
    store(res, exp(set1(x)));
    return res[0];
}

// by e^(-2 |x|) - 1, which keeps what is small
static inline vec tanh(vec x) {
    vec       scale;
    const vec positive = copysign(x, set1(1.0f));
    const vec res      = exp_parts(max(set1(-40.0f), mul(positive, set1(-2.0f))), &scale);
    const vec expm1    = fma(scale, res, sub(scale, set1(1.0f)));
    return copysign(div(expm1, add(expm1, set1(2.0f))), x);
}

// in a fixed order, for what is needed rarely
static inline float sum_of(vec a) {
    float x[WIDTH];
    store(x, a);
    float res = 0.0f;
    for (int i = 0; i < WIDTH; ++i) {
        res += x[i];
    }
    return res;
}

} // namespace lminf_simd
