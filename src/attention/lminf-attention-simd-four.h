// Vectors of four: NEON, and what GCC and Clang make of them on any machine. Included by lminf-attention-simd.h alone,
// inside its namespace.

#pragma once

static constexpr int WIDTH  = 4;
static constexpr int GROUPS = 2;

#if defined(LMINF_SIMD_NEON)
static constexpr const char * NAME = "NEON";
static constexpr int          ROWS = 4;
using vec                          = float32x4_t;
using ivec                         = int32x4_t;
static inline vec fma(vec a, vec b, vec c) {
    return vfmaq_f32(c, a, b);
}
static inline ivec load_s8_integers(const char * x) {
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(read<uint32_t>(x))))));
}
static inline vec load_f16(const char * x) {
    return vcvt_f32_f16(vreinterpret_f16_u64(vdup_n_u64(read<uint64_t>(x))));
}
static inline vec to_float(ivec a) {
    return vcvtq_f32_s32(a);
}
#else
static constexpr const char * NAME = "portable";
static constexpr int          ROWS = 3;
typedef float                 vec __attribute__((vector_size(16)));
typedef int32_t               ivec __attribute__((vector_size(16)));
static inline vec             fma(vec a, vec b, vec c) {
    return a * b + c;
}
static inline ivec load_s8_integers(const char * x) {
    return ivec{(int8_t)x[0], (int8_t)x[1], (int8_t)x[2], (int8_t)x[3]};
}
static inline vec to_float(ivec a) {
    return vec{(float)a[0], (float)a[1], (float)a[2], (float)a[3]};
}
static inline ivec load_words(const char * x) {
    const uint64_t words = read<uint64_t>(x);
    return ivec{(int)(words & 0xffff), (int)(words >> 16 & 0xffff), (int)(words >> 32 & 0xffff), (int)(words >> 48)};
}
// exponent and mantissa at their places in a float; the product makes up for the other bias, also where it is subnormal
static inline vec load_f16(const char * x) {
    const ivec a         = load_words(x);
    const vec  magnitude = (vec)((a & 0x7fff) << 13) * 0x1p112f;
    const ivec infinite  = (a & 0x7c00) == 0x7c00; // or not a number
    return (vec)((ivec)magnitude | (infinite & 0x7f800000) | (a & 0x8000) << 16);
}
#endif

static inline vec load(const float * x) {
    return read<vec>((const char *)x);
}
static inline void store(float * x, vec a) {
    memcpy(x, &a, sizeof(a));
}
static inline vec set1(float x) {
    return vec{x, x, x, x};
}
static inline vec add(vec a, vec b) {
    return a + b;
}
static inline vec sub(vec a, vec b) {
    return a - b;
}
static inline vec mul(vec a, vec b) {
    return a * b;
}
static inline vec div(vec a, vec b) {
    return a / b;
}
static inline vec blend(ivec mask, vec a, vec b) {
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
}
static inline vec max(vec a, vec b) {
    return blend((ivec)(a > b), a, b);
}
static inline vec min(vec a, vec b) {
    return blend((ivec)(a < b), a, b);
}
static inline float max_of(vec a) {
    const float x = a[0] > a[1] ? a[0] : a[1];
    const float y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
}

static inline vec load_group(const float * x) {
    return load(x);
}
static inline void transpose_groups(vec *) {}

static inline vec add_groups(vec a0, vec a1, vec a2, vec a3) {
#if defined(LMINF_SIMD_NEON)
    return vpaddq_f32(vpaddq_f32(a0, a1), vpaddq_f32(a2, a3));
#else
    const vec even  = {a0[0], a1[0], a2[0], a3[0]};
    const vec odd   = {a0[1], a1[1], a2[1], a3[1]};
    const vec even2 = {a0[2], a1[2], a2[2], a3[2]};
    const vec odd2  = {a0[3], a1[3], a2[3], a3[3]};
    return (even + odd) + (even2 + odd2);
#endif
}

static inline vec select(uint32_t bits, vec a, vec b) {
    const ivec lanes = {1, 2, 4, 8};
    const int  all   = (int)bits;
    return blend((ivec)((ivec{all, all, all, all} & lanes) == lanes), a, b);
}

static inline vec zero_below(vec a, vec x, float limit) {
    return (vec)((ivec)a & ~(ivec)(x < set1(limit)));
}

static inline vec copysign(vec a, vec sign) {
    const int bit = INT32_MIN;
    return blend(ivec{bit, bit, bit, bit}, sign, a);
}

static inline vec pow2(vec a) {
    return (vec)(((ivec)a << 23) + 0x3f800000);
}

static inline vec load_bf16(const char * x) {
    const uint64_t words = read<uint64_t>(x);
    return (vec)ivec{(int)(words << 16), (int)(words & 0xffff0000), (int)(words >> 16 & 0xffff0000),
        (int)(words >> 32 & 0xffff0000)};
}
static inline vec gather_f16(const char * const * rows, size_t offset) {
    const uint16_t words[4] = {read<uint16_t>(rows[0] + offset), read<uint16_t>(rows[1] + offset),
        read<uint16_t>(rows[2] + offset), read<uint16_t>(rows[3] + offset)};
    return load_f16((const char *)words);
}
static inline vec load_s8(const char * x) {
    return to_float(load_s8_integers(x));
}

// two sums of each pair are enough: their order does not matter
struct isum {
    ivec low;
    ivec high;
};

typedef int16_t  words __attribute__((vector_size(16)));
typedef uint16_t uwords __attribute__((vector_size(16)));

static inline ivec set1_pair(const int16_t * x) {
    const int32_t pair = read<int32_t>((const char *)x);
    return ivec{pair, pair, pair, pair};
}
static inline isum set1_sum(int32_t x) {
    return {ivec{x, 0, x, 0}, ivec{x, 0, x, 0}};
}
#if defined(LMINF_SIMD_NEON)
static inline isum add_pairs(ivec a, ivec b, isum sum) {
    const int16x8_t x = vreinterpretq_s16_s32(a);
    const int16x8_t y = vreinterpretq_s16_s32(b);
    return {vmlal_s16(sum.low, vget_low_s16(x), vget_low_s16(y)), vmlal_high_s16(sum.high, x, y)};
}
static inline ivec total(isum sum) {
    return vpaddq_s32(sum.low, sum.high);
}
#else
static inline isum add_pairs(ivec a, ivec b, isum sum) {
    const words x = (words)a;
    const words y = (words)b;
    return {sum.low + ivec{x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3]},
        sum.high + ivec{x[4] * y[4], x[5] * y[5], x[6] * y[6], x[7] * y[7]}};
}
static inline ivec total(isum sum) {
    return ivec{sum.low[0] + sum.low[1], sum.low[2] + sum.low[3], sum.high[0] + sum.high[1], sum.high[2] + sum.high[3]};
}
#endif

static inline ivec load_bytes(const char * const * rows, size_t offset) {
    return read<ivec>(rows[0] + offset);
}
static inline void transpose_fours(ivec * x) {
    const ivec y[4] = {x[0], x[1], x[2], x[3]};
    for (int i = 0; i < 4; ++i) {
        x[i] = ivec{y[0][i], y[1][i], y[2][i], y[3][i]};
    }
}
static inline ivec flip_signs(ivec bytes) {
    return bytes ^ (int)0x80808080;
}
static inline ivec low_nibbles(ivec bytes) {
    return bytes & 0x0f0f0f0f;
}
static inline ivec high_nibbles(ivec bytes) {
    return (ivec)((uwords)bytes >> 4) & 0x0f0f0f0f;
}
static inline ivec even_bytes(ivec bytes) {
    return bytes & 0x00ff00ff;
}
static inline ivec odd_bytes(ivec bytes) {
    return (ivec)((uwords)bytes >> 8);
}

static constexpr float S4_SCALE = 1.0f;
static inline void     load_s4(const char * x, vec * low, vec * high) {
    const ivec bytes = load_s8_integers(x);
    *low             = to_float((bytes & 15) - 8);
    *high            = to_float((bytes >> 4 & 15) - 8);
}
