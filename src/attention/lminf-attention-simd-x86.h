// AVX-512 and AVX2. Included by lminf-attention-simd.h alone, inside its namespace.

#pragma once

#if defined(LMINF_SIMD_AVX512)

static constexpr const char * NAME   = "AVX-512";
static constexpr int          WIDTH  = 16;
static constexpr int          ROWS   = 6; // rows of queries in registers at a time
static constexpr int          GROUPS = 2; // sums of vectors of keys for each of them

using vec = __m512;

static inline vec load(const float * x) {
    return _mm512_loadu_ps(x);
}
static inline void store(float * x, vec a) {
    _mm512_storeu_ps(x, a);
}
static inline vec set1(float x) {
    return _mm512_set1_ps(x);
}
static inline vec add(vec a, vec b) {
    return _mm512_add_ps(a, b);
}
static inline vec sub(vec a, vec b) {
    return _mm512_sub_ps(a, b);
}
static inline vec mul(vec a, vec b) {
    return _mm512_mul_ps(a, b);
}
static inline vec div(vec a, vec b) {
    return _mm512_div_ps(a, b);
}
static inline vec fma(vec a, vec b, vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
// where one is not a number it is b that counts
static inline vec max(vec a, vec b) {
    return _mm512_max_ps(a, b);
}
static inline vec min(vec a, vec b) {
    return _mm512_min_ps(a, b);
}
static inline float max_of(vec a) {
    const __m256 x =
        _mm256_max_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y        = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

// the same four floats in every group of lanes
static inline vec load_group(const float * x) {
    return _mm512_broadcast_f32x4(_mm_loadu_ps(x));
}

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
static inline vec select(uint32_t bits, vec a, vec b) {
    return _mm512_mask_blend_ps((__mmask16)bits, b, a);
}

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

static inline vec load_f16(const char * x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
}
static inline vec load_bf16(const char * x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}
static inline vec gather_f16(const char * const * rows, size_t offset) {
    const auto word = [&](int i) { return read<int16_t>(rows[i] + offset); };
    return _mm512_cvtph_ps(_mm256_setr_epi16(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7), word(8),
        word(9), word(10), word(11), word(12), word(13), word(14), word(15)));
}
static inline vec load_s8(const char * x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
}

using ivec = __m512i;
using isum = __m512i;

static inline vec to_float(ivec a) {
    return _mm512_cvtepi32_ps(a);
}
static inline ivec set1_pair(const int16_t * x) {
    return _mm512_set1_epi32(read<int32_t>((const char *)x));
}
static inline isum set1_sum(int32_t x) {
    return _mm512_set1_epi32(x);
}
static inline isum add_pairs(ivec a, ivec b, isum sum) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}
static inline ivec total(isum sum) {
    return sum;
}

// group g: sixteen bytes of rows[4 g]
static inline ivec load_bytes(const char * const * rows, size_t offset) {
    const auto row = [&](int i) { return _mm_loadu_si128((const __m128i *)(rows[i] + offset)); };
    ivec       res = _mm512_castsi128_si512(row(0));
    res            = _mm512_inserti32x4(res, row(4), 1);
    res            = _mm512_inserti32x4(res, row(8), 2);
    return _mm512_inserti32x4(res, row(12), 3);
}
// in each group: x[i] gets the i-th four bytes of each x
static inline void transpose_fours(ivec * x) {
    const ivec low01  = _mm512_unpacklo_epi32(x[0], x[1]);
    const ivec low23  = _mm512_unpacklo_epi32(x[2], x[3]);
    const ivec high01 = _mm512_unpackhi_epi32(x[0], x[1]);
    const ivec high23 = _mm512_unpackhi_epi32(x[2], x[3]);
    x[0]              = _mm512_unpacklo_epi64(low01, low23);
    x[1]              = _mm512_unpackhi_epi64(low01, low23);
    x[2]              = _mm512_unpacklo_epi64(high01, high23);
    x[3]              = _mm512_unpackhi_epi64(high01, high23);
}
static inline ivec flip_signs(ivec bytes) {
    return _mm512_xor_si512(bytes, _mm512_set1_epi8((char)0x80));
}
static inline ivec low_nibbles(ivec bytes) {
    return _mm512_and_si512(bytes, _mm512_set1_epi8(15));
}
static inline ivec high_nibbles(ivec bytes) {
    return low_nibbles(_mm512_srli_epi16(bytes, 4));
}
static inline ivec even_bytes(ivec bytes) {
    return _mm512_and_si512(bytes, _mm512_set1_epi16(255));
}
static inline ivec odd_bytes(ivec bytes) {
    return _mm512_srli_epi16(bytes, 8);
}

// sixteen bytes: their low nibbles - 8, then the high ones; times S4_SCALE
static constexpr float S4_SCALE = 1.0f;
static inline void     load_s4(const char * x, vec * low, vec * high) {
    const vec     table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)x));
    *low                = _mm512_permutexvar_ps(bytes, table);
    *high               = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
}

#elif defined(LMINF_SIMD_AVX2)

static constexpr const char * NAME   = "AVX2";
static constexpr int          WIDTH  = 8;
static constexpr int          ROWS   = 3;
static constexpr int          GROUPS = 2;

using vec = __m256;

static inline vec load(const float * x) {
    return _mm256_loadu_ps(x);
}
static inline void store(float * x, vec a) {
    _mm256_storeu_ps(x, a);
}
static inline vec set1(float x) {
    return _mm256_set1_ps(x);
}
static inline vec add(vec a, vec b) {
    return _mm256_add_ps(a, b);
}
static inline vec sub(vec a, vec b) {
    return _mm256_sub_ps(a, b);
}
static inline vec mul(vec a, vec b) {
    return _mm256_mul_ps(a, b);
}
static inline vec div(vec a, vec b) {
    return _mm256_div_ps(a, b);
}
static inline vec fma(vec a, vec b, vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
static inline vec max(vec a, vec b) {
    return _mm256_max_ps(a, b);
}
static inline vec min(vec a, vec b) {
    return _mm256_min_ps(a, b);
}
static inline float max_of(vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x        = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

static inline vec load_group(const float * x) {
    return _mm256_broadcast_ps((const __m128 *)x);
}

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
    const __m256i mask  = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lanes), lanes);
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

static inline vec load_f16(const char * x) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
}
static inline vec load_bf16(const char * x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16));
}
static inline vec gather_f16(const char * const * rows, size_t offset) {
    const auto word = [&](int i) { return read<int16_t>(rows[i] + offset); };
    return _mm256_cvtph_ps(_mm_setr_epi16(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7)));
}
static inline vec load_s8(const char * x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
}

using ivec = __m256i;
using isum = __m256i;

static inline vec to_float(ivec a) {
    return _mm256_cvtepi32_ps(a);
}
static inline ivec set1_pair(const int16_t * x) {
    return _mm256_set1_epi32(read<int32_t>((const char *)x));
}
static inline isum set1_sum(int32_t x) {
    return _mm256_set1_epi32(x);
}
static inline isum add_pairs(ivec a, ivec b, isum sum) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
static inline ivec total(isum sum) {
    return sum;
}

static inline ivec load_bytes(const char * const * rows, size_t offset) {
    const auto row = [&](int i) { return _mm_loadu_si128((const __m128i *)(rows[i] + offset)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(4), 1);
}
static inline void transpose_fours(ivec * x) {
    const ivec low01  = _mm256_unpacklo_epi32(x[0], x[1]);
    const ivec low23  = _mm256_unpacklo_epi32(x[2], x[3]);
    const ivec high01 = _mm256_unpackhi_epi32(x[0], x[1]);
    const ivec high23 = _mm256_unpackhi_epi32(x[2], x[3]);
    x[0]              = _mm256_unpacklo_epi64(low01, low23);
    x[1]              = _mm256_unpackhi_epi64(low01, low23);
    x[2]              = _mm256_unpacklo_epi64(high01, high23);
    x[3]              = _mm256_unpackhi_epi64(high01, high23);
}
static inline ivec flip_signs(ivec bytes) {
    return _mm256_xor_si256(bytes, _mm256_set1_epi8((char)0x80));
}
static inline ivec low_nibbles(ivec bytes) {
    return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}
static inline ivec high_nibbles(ivec bytes) {
    return low_nibbles(_mm256_srli_epi16(bytes, 4));
}
static inline ivec even_bytes(ivec bytes) {
    return _mm256_and_si256(bytes, _mm256_set1_epi16(255));
}
static inline ivec odd_bytes(ivec bytes) {
    return _mm256_srli_epi16(bytes, 8);
}

// eight bytes: their low nibbles - 8, then the high ones; as signed numbers in the highest four bits
static constexpr float S4_SCALE = 1 << 28;
static inline void     load_s4(const char * x, vec * low, vec * high) {
    const __m128i flip  = _mm_set1_epi8((char)0x88); // nibble - 8 as a signed number of four bits
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_xor_si128(_mm_loadl_epi64((const __m128i *)x), flip));
    const __m256i upper = _mm256_and_si256(_mm256_slli_epi32(bytes, 24), _mm256_set1_epi32((int)0xf0000000));
    *low                = _mm256_cvtepi32_ps(_mm256_slli_epi32(bytes, 28));
    *high               = _mm256_cvtepi32_ps(upper);
}

#endif
