// Products of many stored rows with a few queries: the inner loop of a scan over middle tokens.
//
// Called by lminf-recall-attention.cpp and lminf-recall-scan.cpp. Compiled with the options of ggml's CPU backend, whose kernels it uses where it has none of its own.

#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// Queries in the form that rows of a type are multiplied with.
class lminf_scan_queries {
public:
    // n components each, of rows of this type
    lminf_scan_queries(ggml_type type, int64_t n);

    void clear() { n_queries = 0; }
    void add(const float * query);

    // dst[i*n_rows + r] = row r times query i0 + i, for i < n_i
    void multiply(const uint8_t * rows, size_t row_size, int64_t n_rows, int64_t i0, int64_t n_i, float * dst) const;

private:
    const ggml_type type;
    const int64_t   n;

    int64_t n_queries = 0;

    size_t               query_size = 0; // bytes of a query as ggml's kernel takes it
    std::vector<uint8_t> queries;
    std::vector<int16_t> wide;   // the same of Q8_0 blocks, for kernels of our own: whole numbers
    std::vector<float>   scales; // and the factor of each block

    // false: there is no kernel of our own for these rows on this machine
    bool multiply_fast(const uint8_t * rows, int64_t n_rows, int64_t i0, int64_t n_i, float * dst) const;

    template <int N_BLOCKS>
    void multiply_q8_0(const uint8_t * rows, int64_t n_rows, int64_t i0, int64_t n_i, float * dst) const;
};
