// What the memory's books cost beside a token's computation, for large windows and many sequences, without a model.
//
//   g++ -O3 -std=c++17 -Isrc/policy benchmarks/bookkeeping.cpp src/policy/*.cpp -o build/bookkeeping && build/bookkeeping
//
// Prints medians in microseconds: a row of the mask (a token), 256 rows (a micro-batch), trying a token of each of 16 sequences on copies of
// their books and compacting them, and loading saved books.

#include "lminf-mask.h"
#include "lminf-sequence.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <vector>

template <typename F>
static double median_us(int n, F && f) {
    std::vector<double> times;
    for (int i = 0; i < n; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        f();
        times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
    }
    std::nth_element(times.begin(), times.begin() + n/2, times.end());
    return times[n/2];
}

int main() {
    printf("%10s %12s %12s %12s %12s\n", "window", "mask row", "256 rows", "16 trials", "load");
    for (const int64_t n_window : { 2048, 32768, 131072 }) {
        lminf_policy policy;
        policy.n_window = policy.n_clamp = policy.n_reach = n_window;
        policy.n_ubatch = 256;

        lminf_sequence seq(policy);
        while (seq.n_past < 2*n_window) { // a prompt, then tokens one by one
            seq.append(256);
        }
        for (int i = 0; i < 1000; ++i) {
            seq.append(1);
        }

        const int64_t n_kv = policy.n_cells();
        std::vector<uint16_t> mask(256*n_kv);
        const auto fill = [&](int64_t n) {
            const auto kept = seq.kept();
            for (int64_t i = 0; i < n; ++i) {
                lminf_fill_mask_row<uint16_t>(policy, kept, seq.n_past - n + i, mask.data() + i*n_kv, n_kv, 0xfc00, 0, [](int64_t) { return uint16_t(0); });
            }
        };
        std::vector<lminf_sequence> seqs(16, seq);
        const auto try_all = [&]() {
            for (auto & s : seqs) {
                s.compact();
                lminf_sequence trial = s;
                trial.append(1);
            }
        };
        const auto books = seq.save();
        lminf_sequence loaded(policy);

        const double row   = median_us(200, [&]() { fill(1); });
        const double rows  = median_us(20,  [&]() { fill(256); });
        const double tried = median_us(200, try_all);
        const double load  = median_us(200, [&]() { loaded.load(books); });
        printf("%10lld %12.2f %12.1f %12.2f %12.2f\n", (long long) n_window, row, rows, tried, load);
    }
    return 0;
}
