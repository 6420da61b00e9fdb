#include "lminf-sketch.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <string>

#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LMINF_HAS_VECTOR_COUNTS
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC 12 warns of its own definitions of AVX-512 intrinsics
#endif
#endif

static constexpr int64_t N_WORD = 64; // bits

static constexpr int64_t N_BITS_MAX = 4096; // of a sketch

static int count_bits(uint64_t x) {
#if defined(__GNUC__)
    return __builtin_popcountll(x);
#else
    x -= (x >> 1) & 0x5555555555555555;
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return (int) (x*0x0101010101010101 >> 56);
#endif
}

//
// making sketches
//

int64_t lminf_sketcher::n_words(int64_t n_embd) {
    int64_t res = 1;
    while (res*N_WORD < n_embd) {
        res *= 2;
    }
    return res;
}

// 1 or -1 for each bit of a sketch, the same for all sketches ever: they are in files. Drawn once.
static const std::vector<float> & random_flips() {
    static const std::vector<float> flips = [] {
        std::vector<float> res(N_BITS_MAX);
        std::mt19937 random(1);
        for (auto & flip : res) {
            flip = (random() & 1) != 0 ? 1.0f : -1.0f;
        }
        return res;
    }();
    return flips;
}

lminf_sketcher::lminf_sketcher(int64_t n_embd) :
    n_embd(n_embd), flips(random_flips().data()), rotated(n_words(n_embd)*N_WORD) {
    if (rotated.size() > random_flips().size()) {
        throw std::runtime_error("a key of " + std::to_string(n_embd) + " components is too long for a sketch");
    }
}

void lminf_sketcher::rotate() {
    const size_t n = rotated.size();
    for (size_t i = 0; i < n; ++i) {
        rotated[i] *= flips[i]/sqrtf((float) n);
    }
    for (size_t half = 1; half < n; half *= 2) {
        for (size_t i = 0; i < n; i += 2*half) {
            for (size_t j = i; j < i + half; ++j) {
                const float a = rotated[j];
                const float b = rotated[j + half];
                rotated[j]        = a + b;
                rotated[j + half] = a - b;
            }
        }
    }
}

void lminf_sketcher::write_signs(uint64_t * dst, int64_t stride) const {
    for (size_t i0 = 0; i0 < rotated.size(); i0 += N_WORD) {
        uint64_t word = 0;
        for (size_t i = 0; i < N_WORD; ++i) {
            word |= (uint64_t) (rotated[i0 + i] > 0.0f) << i;
        }
        dst[(int64_t) i0/N_WORD*stride] = word;
    }
}

float lminf_sketcher::write(const float * key, const float * mean, uint64_t * dst, int64_t stride) {
    std::fill(rotated.begin(), rotated.end(), 0.0f);
    for (int64_t i = 0; i < n_embd; ++i) {
        rotated[i] = key[i] - mean[i];
    }
    rotate();
    write_signs(dst, stride);

    // so that the product with the key itself is right
    float squares = 0.0f;
    float sizes   = 0.0f;
    for (const float x : rotated) {
        squares += x*x;
        sizes   += fabsf(x);
    }
    return sizes > 0.0f ? squares/sizes : 0.0f;
}

lminf_sketch_query lminf_sketcher::query(const float * query, const float * mean) {
    lminf_sketch_query res;

    res.limit  = -INFINITY;
    res.offset = 0.0f;
    std::fill(rotated.begin(), rotated.end(), 0.0f);
    for (int64_t i = 0; i < n_embd; ++i) {
        rotated[i] = query[i];
        res.offset += query[i]*mean[i];
    }
    rotate();
    res.signs.resize(rotated.size()/N_WORD);
    write_signs(res.signs.data(), 1);

    float size = 0.0f;
    for (const float x : rotated) {
        size += fabsf(x)/(float) rotated.size();
    }
    res.slope   = size/2;
    res.largest = 0.0f;
    res.large.resize(res.signs.size());
    for (size_t i = 0; i < rotated.size(); ++i) {
        const bool is_large = fabsf(rotated[i]) > size;
        res.large[i/N_WORD] |= (uint64_t) is_large << i % N_WORD;
        res.largest += is_large ? 3.0f : 1.0f;
    }
    return res;
}

//
// multiplying
//

float lminf_sketch_query::product(const lminf_sketches & key) const {
    int64_t lost = 0; // sizes of the components whose signs differ
    for (size_t w = 0; w < signs.size(); ++w) {
        const uint64_t differ = signs[w] ^ key.words[(int64_t) w*key.stride];
        lost += count_bits(differ) + 2*count_bits(differ & large[w]);
    }
    return offset + slope*ggml_fp16_to_fp32(*key.factors)*(largest - 2.0f*(float) lost);
}

uint64_t lminf_sketch_query::multiply(const lminf_sketches & keys, int64_t n, float * dst) const {
    uint64_t res = 0;
    int64_t  i   = 0;
#ifdef LMINF_HAS_VECTOR_COUNTS
    static constexpr int64_t N_LANES = 8;

    // in registers: the compiler cannot know that dst is none of the query's members
    const size_t n_words = signs.size();
    const __m512i sign   = _mm512_set1_epi64((long long) signs[0]);
    const __m512i weight = _mm512_set1_epi64((long long) large[0]);
    const __m256  least  = _mm256_set1_ps(limit);
    const __m256  start  = _mm256_set1_ps(offset);
    const __m256  step   = _mm256_set1_ps(2.0f*slope);
    const __m256  most   = _mm256_set1_ps(slope*largest);

    const auto count = [](__m512i key, __m512i query, __m512i counts_thrice) {
        const __m512i differ = _mm512_xor_si512(key, query);
        const __m512i twice  = _mm512_popcnt_epi64(_mm512_and_si512(differ, counts_thrice));
        return _mm512_add_epi64(_mm512_popcnt_epi64(differ), _mm512_add_epi64(twice, twice));
    };
    for (; i + N_LANES <= n; i += N_LANES) {
        __m512i lost = count(_mm512_loadu_si512(keys.words + i), sign, weight);
        for (size_t w = 1; w < n_words; ++w) {
            lost = _mm512_add_epi64(lost, count(_mm512_loadu_si512(keys.words + (int64_t) w*keys.stride + i),
                    _mm512_set1_epi64((long long) signs[w]), _mm512_set1_epi64((long long) large[w])));
        }
        const __m256 factors  = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (keys.factors + i)));
        const __m256 kept     = _mm256_fnmadd_ps(step, _mm512_cvtepi64_ps(lost), most);
        const __m256 products = _mm256_fmadd_ps(factors, kept, start);
        _mm256_storeu_ps(dst + i, products);
        res |= (uint64_t) _mm256_cmp_ps_mask(products, least, _CMP_GT_OQ) << i;
    }
#endif
    for (; i < n; ++i) {
        dst[i] = product(keys.from(i));
        res |= (uint64_t) (dst[i] > limit) << i;
    }
    return res;
}
