// A first look at many stored keys: the signs of their components, one bit each.
//
// A key without the mean of all keys is rotated at random (signs, then a Hadamard transform), so that the signs of its components
// and one factor tell its product with any query nearly as well as the key does: Gao and Long, "RaBitQ", arXiv 2405.12497. The
// query is rotated, too, and rounded to two bits a component, so that a product is two counts of bits. A key of 64 components
// takes 10 bytes instead of 68.
// Called by lminf-recall*.cpp. Compiled with the options of ggml's CPU backend.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

// sketches of the keys of one head
struct lminf_sketches {
    const uint64_t *    words; // word w of key i is [w*stride + i]
    const ggml_fp16_t * factors;
    int64_t             stride;

    lminf_sketches from(int64_t i) const { return { words + i, factors + i, stride }; }
};

// A query as sketches are multiplied with it.
class lminf_sketch_query {
public:
    float limit; // what has no larger product is of no interest

    // About the products of the query and n <= 64 keys; returns which of them are above the limit.
    uint64_t multiply(const lminf_sketches & keys, int64_t n, float * dst) const;

private:
    friend class lminf_sketcher;

    float product(const lminf_sketches & key) const;

    // components are slope*(+-1 or +-3)
    std::vector<uint64_t> signs;
    std::vector<uint64_t> large;

    float offset; // product with the mean of all keys
    float slope;
    float largest; // sum of the sizes of all components, in slopes
};

class lminf_sketcher {
public:
    explicit lminf_sketcher(int64_t n_embd);

    static int64_t n_words(int64_t n_embd); // of a sketch

    // word w of a key's sketch goes to dst[w*stride]; returns the key's factor. mean: of all keys
    float write(const float * key, const float * mean, uint64_t * dst, int64_t stride);

    lminf_sketch_query query(const float * query, const float * mean);

private:
    const int64_t n_embd;

    const float * const flips; // 1 or -1, [bits]
    std::vector<float>  rotated;

    void rotate(); // in place
    void write_signs(uint64_t * dst, int64_t stride) const;
};
