// What a query sees, as a row of the mask of llama.cpp's attention: one value for each cell. Filled by stretches of cells, so that a row
// costs what it takes to write it.

#pragma once

#include "lminf-policy.h"
#include "lminf-run.h"

#include <algorithm>
#include <cstdint>
#include <vector>

// row: [n_kv]. kept: the sequence's keys, see lminf_sequence. hidden, seen: the values; with ALiBi, bias(distance) takes the place of seen.
template <typename T, typename F>
void lminf_fill_mask_row(
        const lminf_policy & policy, const std::vector<lminf_run> & kept, int64_t p, T * row, int64_t n_kv, T hidden, T seen, F && bias) {
    std::fill(row, row + n_kv, hidden);

    const auto show = [&](int64_t cell, int64_t j, int64_t n) {
        if (!policy.alibi) {
            std::fill(row + cell, row + cell + n, seen);
            return;
        }
        for (int64_t i = 0; i < n; ++i) {
            row[cell + i] = bias(policy.distance(p, j + i));
        }
    };

    if (policy.n_sink > 0) {
        show(policy.sink_cell(policy.copy(p), 0), 0, std::min(policy.n_sink, p + 1));
    }
    const int64_t begin = policy.window_begin(p);
    for (const auto & run : kept) {
        const int64_t j0 = std::max(run.pos, begin);
        const int64_t j1 = std::min(run.pos + run.n, p + 1);
        if (j0 < j1) {
            show(run.cell + j0 - run.pos, j0, j1 - j0);
        }
    }
}
