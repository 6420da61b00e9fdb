#include "lminf-scan.h"

#include "ggml-cpu.h"

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC 12 warns of its own definitions of AVX-512 intrinsics
#endif
#endif

static constexpr int64_t N_BLOCK = 32; // components of a Q8_0 block

static constexpr size_t Q8_0_SIZE = sizeof(ggml_fp16_t) + N_BLOCK; // one scale, then whole numbers

lminf_scan_queries::lminf_scan_queries(ggml_type type, int64_t n) : type(type), n(n) {
    query_size = ggml_row_size(ggml_get_type_traits_cpu(type)->vec_dot_type, n);
}

void lminf_scan_queries::add(const float * query) {
    const ggml_type query_type = ggml_get_type_traits_cpu(type)->vec_dot_type;

    queries.resize((n_queries + 1)*query_size);
    uint8_t * dst = queries.data() + n_queries*query_size;
    ggml_get_type_traits_cpu(query_type)->from_float(query, dst, n);

    if (type == GGML_TYPE_Q8_0) {
        const int64_t n_blocks = n/N_BLOCK;
        wide  .resize((n_queries + 1)*n);
        scales.resize((n_queries + 1)*n_blocks);
        for (int64_t b = 0; b < n_blocks; ++b) {
            const uint8_t * block = dst + b*Q8_0_SIZE;

            ggml_fp16_t scale;
            memcpy(&scale, block, sizeof(scale));
            scales[n_queries*n_blocks + b] = ggml_fp16_to_fp32(scale);

            const auto * values = (const int8_t *) (block + sizeof(scale));
            for (int64_t i = 0; i < N_BLOCK; ++i) {
                wide[n_queries*n + b*N_BLOCK + i] = values[i];
            }
        }
    }
    n_queries++;
}

void lminf_scan_queries::multiply(
        const uint8_t * rows, size_t row_size, int64_t n_rows, int64_t i0, int64_t n_i, float * dst) const {
    if (n_rows > 1 && multiply_fast(rows, n_rows, i0, n_i, dst)) {
        return;
    }
    const auto vec_dot = ggml_get_type_traits_cpu(type)->vec_dot;
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t i = 0; i < n_i; ++i) {
            vec_dot((int) n, dst + i*n_rows + r, 0, rows + r*row_size, 0, queries.data() + (i0 + i)*query_size, 0, 1);
        }
    }
}

#if defined(__AVX2__)

static float half_to_float(const uint8_t * bytes) {
    uint16_t half;
    memcpy(&half, bytes, sizeof(half));
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    return ggml_fp16_to_fp32(half);
#endif
}

// rows that are multiplied together: the sums over their lanes share additions
static constexpr int N_ROWS = 4;

// the sums over the lanes of each
static __m128 sums(const __m256 (&x)[N_ROWS]) {
    const __m256 res = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    return _mm_add_ps(_mm256_castps256_ps128(res), _mm256_extractf128_ps(res, 1));
}

// A block as whole numbers of 16 bits, and its products with those of a query, as floats in lanes.
#if defined(__AVX512BW__)

using lanes = __m512;
struct wide_block {
    __m512i x;

    void load(const uint8_t * values) { x = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *) values)); }

    lanes times(const int16_t * query) const { return _mm512_cvtepi32_ps(_mm512_madd_epi16(x, _mm512_loadu_si512(query))); }
};
static lanes broadcast(float x) { return _mm512_set1_ps(x); }
static lanes times(lanes a, lanes b) { return _mm512_mul_ps(a, b); }
static lanes add_times(lanes acc, lanes a, lanes b) { return _mm512_fmadd_ps(a, b, acc); }
static __m256 halved(lanes acc) {
    return _mm256_add_ps(_mm512_castps512_ps256(acc), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(acc), 1)));
}

#else

using lanes = __m256;
struct wide_block {
    __m256i low;
    __m256i high;

    void load(const uint8_t * values) {
        low  = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) values));
        high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) values + 1));
    }

    lanes times(const int16_t * query) const {
        const auto * y = (const __m256i *) query;
        return _mm256_cvtepi32_ps(_mm256_add_epi32(
                _mm256_madd_epi16(low, _mm256_loadu_si256(y)), _mm256_madd_epi16(high, _mm256_loadu_si256(y + 1))));
    }
};
static lanes broadcast(float x) { return _mm256_set1_ps(x); }
static lanes times(lanes a, lanes b) { return _mm256_mul_ps(a, b); }
static lanes add_times(lanes acc, lanes a, lanes b) { return _mm256_add_ps(acc, _mm256_mul_ps(a, b)); }
static __m256 halved(lanes acc) { return acc; }

#endif

// Rows are widened once for all queries, and their blocks are summed up before their lanes are.
template <int N_BLOCKS>
void lminf_scan_queries::multiply_q8_0(const uint8_t * rows, int64_t n_rows, int64_t i0, int64_t n_i, float * dst) const {
    static constexpr size_t ROW_SIZE = N_BLOCKS*Q8_0_SIZE;

    for (int64_t r0 = 0; r0 < n_rows; r0 += N_ROWS) {
        const int64_t n_left = n_rows - r0;

        wide_block blocks [N_ROWS][N_BLOCKS];
        lanes      factors[N_ROWS][N_BLOCKS];
        for (int r = 0; r < N_ROWS; ++r) {
            const uint8_t * row = rows + (r0 + (r < n_left ? r : 0))*ROW_SIZE;
            _mm_prefetch((const char *) (row + 1024), _MM_HINT_T0);
            for (int b = 0; b < N_BLOCKS; ++b) {
                factors[r][b] = broadcast(half_to_float(row + b*Q8_0_SIZE));
                blocks [r][b].load(row + b*Q8_0_SIZE + sizeof(uint16_t));
            }
        }
        for (int64_t i = 0; i < n_i; ++i) {
            const int16_t * query = wide  .data() + (i0 + i)*n;
            const float   * scale = scales.data() + (i0 + i)*N_BLOCKS;

            __m256 parts[N_ROWS];
            for (int r = 0; r < N_ROWS; ++r) {
                lanes acc = times(blocks[r][0].times(query), times(factors[r][0], broadcast(scale[0])));
                for (int b = 1; b < N_BLOCKS; ++b) {
                    acc = add_times(acc, blocks[r][b].times(query + b*N_BLOCK), times(factors[r][b], broadcast(scale[b])));
                }
                parts[r] = halved(acc);
            }
            float * out = dst + i*n_rows + r0;
            if (n_left >= N_ROWS) {
                _mm_storeu_ps(out, sums(parts));
            } else {
                float rest[N_ROWS];
                _mm_storeu_ps(rest, sums(parts));
                memcpy(out, rest, n_left*sizeof(float));
            }
        }
    }
}

bool lminf_scan_queries::multiply_fast(const uint8_t * rows, int64_t n_rows, int64_t i0, int64_t n_i, float * dst) const {
    if (type != GGML_TYPE_Q8_0) {
        return false;
    }
    switch (n/N_BLOCK) {
        case 1: multiply_q8_0<1>(rows, n_rows, i0, n_i, dst); return true;
        case 2: multiply_q8_0<2>(rows, n_rows, i0, n_i, dst); return true;
        case 3: multiply_q8_0<3>(rows, n_rows, i0, n_i, dst); return true;
        case 4: multiply_q8_0<4>(rows, n_rows, i0, n_i, dst); return true;
        case 8: multiply_q8_0<8>(rows, n_rows, i0, n_i, dst); return true;
        default: return false;
    }
}

#else

bool lminf_scan_queries::multiply_fast(const uint8_t *, int64_t, int64_t, int64_t, float *) const {
    return false;
}

#endif
