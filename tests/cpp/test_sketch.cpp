// Sketches: how near estimated products are to true ones, and that all ways to compute them agree.

#include "check.h"

#include "lminf-sketch.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace {

std::mt19937 random_engine(7);

std::vector<float> random_vector(int64_t n, float mean) {
    std::normal_distribution<float> normal(mean, 1.0f);
    std::vector<float> res(n);
    for (auto & x : res) {
        x = normal(random_engine);
    }
    return res;
}

float dot(const std::vector<float> & a, const std::vector<float> & b) {
    float res = 0.0f;
    for (size_t i = 0; i < a.size(); ++i) {
        res += a[i]*b[i];
    }
    return res;
}

// keys with a large part in common, as those of a head are
struct keys {
    static constexpr int64_t N      = 200;
    static constexpr int64_t STRIDE = 203;

    std::vector<float>              mean;
    std::vector<std::vector<float>> vectors;
    std::vector<uint64_t>           words;
    std::vector<ggml_fp16_t>        factors;

    explicit keys(int64_t n_embd) :
        mean(random_vector(n_embd, 3.0f)), words(lminf_sketcher::n_words(n_embd)*STRIDE), factors(STRIDE) {
        lminf_sketcher sketcher(n_embd);
        for (int64_t i = 0; i < N; ++i) {
            vectors.push_back(random_vector(n_embd, 0.0f));
            for (int64_t d = 0; d < n_embd; ++d) {
                vectors[i][d] += mean[d];
            }
            factors[i] = ggml_fp32_to_fp16(sketcher.write(vectors[i].data(), mean.data(), words.data() + i, STRIDE));
        }
    }

    lminf_sketches sketches() const { return { words.data(), factors.data(), STRIDE }; }
};

void test_products(int64_t n_embd) {
    const keys all(n_embd);

    double errors = 0.0;
    double bias   = 0.0;
    for (int i = 0; i < 50; ++i) {
        const auto vector = random_vector(n_embd, 0.0f);
        const auto query  = lminf_sketcher(n_embd).query(vector.data(), all.mean.data());
        for (int64_t j = 0; j < keys::N; ++j) {
            float product;
            query.multiply(all.sketches().from(j), 1, &product);
            const double error = (product - dot(vector, all.vectors[j]))/(double) n_embd;
            errors += error*error/(50*keys::N);
            bias   += error/(50*keys::N);
        }
    }
    // products of random vectors, by their number of components, have the deviation 1/sqrt(n)
    CHECK(std::sqrt(errors*(double) n_embd) < 0.9);
    CHECK(std::fabs(bias)*std::sqrt((double) n_embd) < 0.05);
}

void test_tiles(int64_t n_embd) {
    const keys all(n_embd);

    const auto vector = random_vector(n_embd, 0.0f);
    auto       query  = lminf_sketcher(n_embd).query(vector.data(), all.mean.data());
    for (const int64_t n : { 1, 7, 8, 9, 33, 63, 64 }) {
        std::vector<float> products(n), one(1);
        query.limit = -INFINITY;
        CHECK(query.multiply(all.sketches().from(5), n, products.data()) == UINT64_MAX >> (64 - n));
        query.limit = dot(vector, all.mean);
        const uint64_t above = query.multiply(all.sketches().from(5), n, products.data());
        for (int64_t i = 0; i < n; ++i) {
            query.multiply(all.sketches().from(5 + i), 1, one.data());
            CHECK(std::fabs(products[i] - one[0]) < 1e-3f);
            CHECK((above >> i & 1) == (products[i] > query.limit));
        }
        query.limit = INFINITY;
        CHECK(query.multiply(all.sketches().from(5), n, products.data()) == 0);
    }
}

void test_nothing() {
    const std::vector<float> zero(64);
    uint64_t                 word = 0;
    CHECK(lminf_sketcher(64).write(zero.data(), zero.data(), &word, 1) == 0.0f);

    const ggml_fp16_t factor = ggml_fp32_to_fp16(1.0f);
    float             product = 1.0f;
    lminf_sketcher(64).query(zero.data(), zero.data()).multiply({ &word, &factor, 1 }, 1, &product);
    CHECK(product == 0.0f);
}

} // namespace

int main() {
    CHECK(lminf_sketcher::n_words(1) == 1 && lminf_sketcher::n_words(64) == 1 && lminf_sketcher::n_words(65) == 2);
    CHECK(lminf_sketcher::n_words(192) == 4 && lminf_sketcher::n_words(256) == 4);
    for (const int64_t n_embd : { 20, 64, 80, 128, 256 }) {
        test_products(n_embd);
        test_tiles(n_embd);
    }
    test_nothing();

    printf("%d failed\n", n_failed);
    return n_failed != 0;
}
