// Vectors of floats for the attention kernel (lminf-attention.cpp), one set of primitives per instruction set: AVX-512,
// AVX2 with FMA and F16C, and vectors of four for NEON and everything else that GCC and Clang compile for.
//
// The kernel relies on each primitive doing the same to every lane, always, and on nothing else about the machine: so
// its results have the same bits however often and in whatever tile a primitive is called. Products that are added to
// something are `lminf_fma`, written out, so that a compiler has nothing to contract in one place and not in another.

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

// a group of lanes is four: as many as every instruction set can broadcast and add in pairs
#define LMINF_SIMD_GROUP 4

// for functions whose inner ones have to be part of them, so that vectors stay in registers
#if defined(__GNUC__)
#define LMINF_SIMD_FLATTEN __attribute__((flatten))
#else
#define LMINF_SIMD_FLATTEN
#endif

// the unit in which rows are unpacked: a block of a quantised type
#define LMINF_SIMD_UNIT 32

namespace lminf_simd {

template <class T> static inline T read(const char * data) {
    T res;
    memcpy(&res, data, sizeof(T));
    return res;
}

#if defined(LMINF_SIMD_AVX512)

static constexpr const char * NAME  = "AVX-512";
static constexpr int          WIDTH = 16;
static constexpr int          ROWS  = 6; // rows of queries in registers at a time

using vec = __m512;

static inline vec load(const float * x) { return _mm512_loadu_ps(x); }
static inline void store(float * x, vec a) { _mm512_storeu_ps(x, a); }
static inline vec set1(float x) { return _mm512_set1_ps(x); }
static inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
static inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec div(vec a, vec b) { return _mm512_div_ps(a, b); }
static inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
// where one is not a number it is b that counts
static inline vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline float max_of(vec a) {
    const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
    __m128       y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y              = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

// the same four floats in every group of lanes
static inline vec load_group(const float * x) { return _mm512_broadcast_f32x4(_mm_loadu_ps(x)); }

// group g of x[i] and group i of x[g] change places
static inline void transpose_groups(vec * x) {
    const vec x01 = _mm512_shuffle_f32x4(x[0], x[1], 0x44);
    const vec x23 = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
    const vec y01 = _mm512_shuffle_f32x4(x[0], x[1], 0xee);
    const vec y23 = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
    x[0]          = _mm512_shuffle_f32x4(x01, x23, 0x88);
    x[1]          = _mm512_shuffle_f32x4(x01, x23, 0xdd);
    x[2]          = _mm512_shuffle_f32x4(y01, y23, 0x88);
    x[3]          = _mm512_shuffle_f32x4(y01, y23, 0xdd);
}

// (0 + 1) + (2 + 3) of each group: lane 4 g + i is group g of the i-th
static inline vec add_groups(vec a0, vec a1, vec a2, vec a3) {
    const vec a01 = add(_mm512_shuffle_ps(a0, a1, 0x88), _mm512_shuffle_ps(a0, a1, 0xdd));
    const vec a23 = add(_mm512_shuffle_ps(a2, a3, 0x88), _mm512_shuffle_ps(a2, a3, 0xdd));
    return add(_mm512_shuffle_ps(a01, a23, 0x88), _mm512_shuffle_ps(a01, a23, 0xdd));
}

// a where the lane's bit is set, otherwise b
static inline vec select(uint32_t bits, vec a, vec b) { return _mm512_mask_blend_ps((__mmask16) bits, b, a); }

// a, but 0 where x < limit
static inline vec zero_below(vec a, vec x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, set1(limit), _CMP_NLT_UQ), a);
}

static inline vec copysign(vec a, vec sign) {
    const vec bit = set1(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(bit, a), _mm512_and_ps(bit, sign));
}

// 2^n where the lowest bits of a are the integer n
static inline vec pow2(vec a) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(a), 23), _mm512_castps_si512(set1(1.0f))));
}

static inline vec load_f16(const char * x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x)); }
static inline vec load_bf16(const char * x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) x)), 16));
}
static inline vec set1_f16(const char * x) { return _mm512_cvtph_ps(_mm256_set1_epi16(read<int16_t>(x))); }
static inline vec load_s8(const char * x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) x)));
}

// sixteen bytes: 16 d (low nibble - 8), then the high ones; a nibble is looked up in a table of products
static inline void load_s4(const char * x, vec d, vec * low, vec * high) {
    const vec     table = mul(d, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) x));
    *low = _mm512_permutexvar_ps(bytes, table);
    *high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
}

#elif defined(LMINF_SIMD_AVX2)

static constexpr const char * NAME  = "AVX2";
static constexpr int          WIDTH = 8;
static constexpr int          ROWS  = 3;

using vec = __m256;

static inline vec load(const float * x) { return _mm256_loadu_ps(x); }
static inline void store(float * x, vec a) { _mm256_storeu_ps(x, a); }
static inline vec set1(float x) { return _mm256_set1_ps(x); }
static inline vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
static inline vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
static inline vec div(vec a, vec b) { return _mm256_div_ps(a, b); }
static inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec min(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline float max_of(vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x        = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

static inline vec load_group(const float * x) { return _mm256_broadcast_ps((const __m128 *) x); }

static inline void transpose_groups(vec * x) {
    const vec low = _mm256_permute2f128_ps(x[0], x[1], 0x20);
    x[1]          = _mm256_permute2f128_ps(x[0], x[1], 0x31);
    x[0]          = low;
}

static inline vec add_groups(vec a0, vec a1, vec a2, vec a3) {
    return _mm256_hadd_ps(_mm256_hadd_ps(a0, a1), _mm256_hadd_ps(a2, a3));
}

static inline vec select(uint32_t bits, vec a, vec b) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i mask  = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int) bits), lanes), lanes);
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(mask));
}

static inline vec zero_below(vec a, vec x, float limit) {
    return _mm256_and_ps(a, _mm256_cmp_ps(x, set1(limit), _CMP_NLT_UQ));
}

static inline vec copysign(vec a, vec sign) {
    const vec bit = set1(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, a), _mm256_and_ps(bit, sign));
}

static inline vec pow2(vec a) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(a), 23), _mm256_castps_si256(set1(1.0f))));
}

static inline vec load_f16(const char * x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x)); }
static inline vec load_bf16(const char * x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) x)), 16));
}
static inline vec set1_f16(const char * x) { return _mm256_cvtph_ps(_mm_set1_epi16(read<int16_t>(x))); }
static inline vec load_s8(const char * x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) x)));
}

// eight bytes: 8 d (low nibble - 8), then the high ones; as signed numbers in the highest four bits
static inline void load_s4(const char * x, vec d, vec * low, vec * high) {
    const vec     factor = mul(d, set1(1.0f/(1 << 28)));
    const __m128i flip   = _mm_set1_epi8((char) 0x88); // nibble - 8 as a signed number of four bits
    const __m256i bytes  = _mm256_cvtepu8_epi32(_mm_xor_si128(_mm_loadl_epi64((const __m128i *) x), flip));
    const __m256i upper  = _mm256_and_si256(_mm256_slli_epi32(bytes, 24), _mm256_set1_epi32((int) 0xf0000000));
    *low = mul(_mm256_cvtepi32_ps(_mm256_slli_epi32(bytes, 28)), factor);
    *high = mul(_mm256_cvtepi32_ps(upper), factor);
}

#elif defined(__GNUC__) // GCC and Clang: vectors of four, in whatever registers there are

static constexpr int WIDTH = 4;

#if defined(LMINF_SIMD_NEON)
static constexpr const char * NAME = "NEON";
static constexpr int          ROWS = 4;
using vec                          = float32x4_t;
using ivec                         = int32x4_t;
static inline vec  fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline ivec load_bytes(const char * x) {
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(read<uint32_t>(x))))));
}
static inline vec load_f16(const char * x) {
    return vcvt_f32_f16(vreinterpret_f16_u64(vdup_n_u64(read<uint64_t>(x))));
}
static inline vec to_float(ivec a) { return vcvtq_f32_s32(a); }
#else
static constexpr const char * NAME = "portable";
static constexpr int          ROWS = 3;
typedef float   vec __attribute__((vector_size(16)));
typedef int32_t ivec __attribute__((vector_size(16)));
static inline vec  fma(vec a, vec b, vec c) { return a*b + c; }
static inline ivec load_bytes(const char * x) { return ivec{ (int8_t) x[0], (int8_t) x[1], (int8_t) x[2], (int8_t) x[3] }; }
static inline vec  to_float(ivec a) { return vec{ (float) a[0], (float) a[1], (float) a[2], (float) a[3] }; }
static inline ivec load_words(const char * x) {
    const uint64_t words = read<uint64_t>(x);
    return ivec{ (int) (words & 0xffff), (int) (words >> 16 & 0xffff), (int) (words >> 32 & 0xffff), (int) (words >> 48) };
}
// exponent and mantissa at their places in a float; the product makes up for the other bias, also where it is subnormal
static inline vec load_f16(const char * x) {
    const ivec a         = load_words(x);
    const vec  magnitude = (vec) ((a & 0x7fff) << 13)*0x1p112f;
    const ivec infinite  = (a & 0x7c00) == 0x7c00; // or not a number
    return (vec) ((ivec) magnitude | (infinite & 0x7f800000) | (a & 0x8000) << 16);
}
#endif

static inline vec load(const float * x) { return read<vec>((const char *) x); }
static inline void store(float * x, vec a) { memcpy(x, &a, sizeof(a)); }
static inline vec set1(float x) { return vec{ x, x, x, x }; }
static inline vec add(vec a, vec b) { return a + b; }
static inline vec sub(vec a, vec b) { return a - b; }
static inline vec mul(vec a, vec b) { return a*b; }
static inline vec div(vec a, vec b) { return a/b; }
static inline vec blend(ivec mask, vec a, vec b) { return (vec) ((mask & (ivec) a) | (~mask & (ivec) b)); }
static inline vec max(vec a, vec b) { return blend((ivec) (a > b), a, b); }
static inline vec min(vec a, vec b) { return blend((ivec) (a < b), a, b); }
static inline float max_of(vec a) {
    const float x = a[0] > a[1] ? a[0] : a[1];
    const float y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
}

static inline vec load_group(const float * x) { return load(x); }
static inline void transpose_groups(vec *) {}

static inline vec add_groups(vec a0, vec a1, vec a2, vec a3) {
#if defined(LMINF_SIMD_NEON)
    return vpaddq_f32(vpaddq_f32(a0, a1), vpaddq_f32(a2, a3));
#else
    const vec even = { a0[0], a1[0], a2[0], a3[0] };
    const vec odd  = { a0[1], a1[1], a2[1], a3[1] };
    const vec even2 = { a0[2], a1[2], a2[2], a3[2] };
    const vec odd2  = { a0[3], a1[3], a2[3], a3[3] };
    return (even + odd) + (even2 + odd2);
#endif
}

static inline vec select(uint32_t bits, vec a, vec b) {
    const ivec lanes = { 1, 2, 4, 8 };
    const int  all   = (int) bits;
    return blend((ivec) ((ivec{ all, all, all, all } & lanes) == lanes), a, b);
}

static inline vec zero_below(vec a, vec x, float limit) { return (vec) ((ivec) a & ~(ivec) (x < set1(limit))); }

static inline vec copysign(vec a, vec sign) {
    const int bit = INT32_MIN;
    return blend(ivec{ bit, bit, bit, bit }, sign, a);
}

static inline vec pow2(vec a) { return (vec) (((ivec) a << 23) + 0x3f800000); }

static inline vec load_bf16(const char * x) {
    const uint64_t words = read<uint64_t>(x);
    return (vec) ivec{ (int) (words << 16), (int) (words & 0xffff0000), (int) (words >> 16 & 0xffff0000),
        (int) (words >> 32 & 0xffff0000) };
}
static inline vec set1_f16(const char * x) {
    const uint64_t word = read<uint16_t>(x);
    const uint64_t four = word*0x0001000100010001;
    return load_f16((const char *) &four);
}
static inline vec load_s8(const char * x) { return to_float(load_bytes(x)); }

static inline void load_s4(const char * x, vec d, vec * low, vec * high) {
    const ivec bytes = load_bytes(x);
    *low = mul(to_float((bytes & 15) - 8), d);
    *high = mul(to_float((bytes >> 4 & 15) - 8), d);
}

#else
#error "the attention kernel has no vectors for this compiler"
#endif

// ---- the same for all ----

static inline void prefetch(const char * x) {
#if defined(__GNUC__)
    __builtin_prefetch(x);
#else
    (void) x;
#endif
}

// x in a register: where it is used several times, a compiler may prefer to load it each time
static inline vec in_register(vec x) {
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

// put(i, the i-th vector of a unit of a row), exact: no type has more bits in its factor and number together than a float
template <ggml_type TYPE, class F> static inline void unpack(const char * unit, const F & put) {
    constexpr int N = LMINF_SIMD_UNIT/WIDTH;
    if constexpr (TYPE == GGML_TYPE_F32) {
        repeat<N>([&](auto i) { put(i, load((const float *) unit + i*WIDTH)); });
    } else if constexpr (TYPE == GGML_TYPE_F16) {
        repeat<N>([&](auto i) { put(i, load_f16(unit + 2*i*WIDTH)); });
    } else if constexpr (TYPE == GGML_TYPE_BF16) {
        repeat<N>([&](auto i) { put(i, load_bf16(unit + 2*i*WIDTH)); });
    } else if constexpr (TYPE == GGML_TYPE_Q8_0) {
        // a factor in half precision and 32 bytes
        const vec d = set1_f16(unit);
        repeat<N>([&](auto i) { put(i, mul(load_s8(unit + 2 + i*WIDTH), d)); });
    } else {
        static_assert(TYPE == GGML_TYPE_Q4_0, "a type that is not served");
        // a factor and 16 bytes: their low nibbles, then their high ones
        const vec d = set1_f16(unit);
        repeat<N/2>([&](auto i) {
            vec low;
            vec high;
            load_s4(unit + 2 + i*WIDTH, d, &low, &high);
            put(i, low);
            put(std::integral_constant<int, i + N/2>(), high);
        });
    }
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
