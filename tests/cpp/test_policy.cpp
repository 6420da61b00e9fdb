// LM-Infinite's decisions without a model: exact small cases first, then properties over many parameter sets.

#include "check.h"
#include "lminf-policy.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <vector>

static lminf_policy make(int64_t S, int64_t W, int64_t L, int64_t B, int64_t n_ubatch = 8, int64_t n_rollback = 5) {
    lminf_policy res;
    res.n_sink     = S;
    res.n_window   = W;
    res.n_clamp    = L;
    res.n_block    = B;
    res.n_ubatch   = n_ubatch;
    res.n_rollback = n_rollback;
    res.n_rebase   = 1000;
    return res;
}

static void test_visible() {
    const lminf_policy policy = make(2, 3, 3, 1);

    // query 6 sees the sink tokens 0 and 1 and its window 4, 5, 6
    const std::vector<bool> expected = { true, true, false, false, true, true, true, false };
    for (int64_t j = 0; j < (int64_t) expected.size(); ++j) {
        CHECK(policy.visible(6, j) == expected[j]);
    }
    CHECK(!policy.visible(0, 1)); // a sink token of the future
    CHECK(!policy.visible(6, -1));
    CHECK(policy.window_begin(6) == 4);
    CHECK(policy.window_begin(1) == 2); // sink tokens are not in the window
}

static void test_clamp() {
    const lminf_policy paper = make(4, 10, 10, 1);
    CHECK(paper.sink_shift(10) == 0);
    CHECK(paper.sink_shift(11) == 1);
    CHECK(paper.sink_pos(0, paper.sink_shift(100)) == 90); // distance exactly L
    CHECK(paper.sink_pos(3, paper.sink_shift(100)) == 90);
    CHECK(paper.sink_pos(3, paper.sink_shift(12)) == 3);   // not far yet

    const lminf_policy blocks = make(4, 10, 10, 4);
    CHECK(blocks.block_end(100) == 103);
    CHECK(blocks.sink_pos(0, blocks.sink_shift(103)) == 93);
    CHECK(blocks.sink_pos(0, blocks.sink_shift(100)) == 93); // distance 7 = L - B + 1
    CHECK(blocks.sink_shift(100) == blocks.sink_shift(103));

    lminf_policy kept = make(4, 7, 10, 4);
    kept.kept_order = true;
    CHECK(kept.sink_pos(0, kept.sink_shift(103)) == 93);
    CHECK(kept.sink_pos(3, kept.sink_shift(103)) == 96);
    CHECK(kept.sink_pos(3, 0) == 3);
}

static void test_far_positions() {
    const lminf_policy policy = make(4, 2048, 2048, 64, 512, 256);

    const int64_t p = (int64_t(1) << 40) + 17;
    CHECK(policy.sink_pos(0, policy.sink_shift(p)) == policy.block_end(p) - 2048);
    CHECK(policy.visible(p, p - 2047));
    CHECK(!policy.visible(p, p - 2048));
    CHECK(policy.visible(p, 3));
    CHECK(policy.ring_cell(p) >= policy.n_sink_cells() && policy.ring_cell(p) < policy.n_cells());
}

// distances that a query sees are at most max(L, W - 1), and true for all but far sink tokens
static void test_distances(const lminf_policy & policy) {
    for (int64_t p = 0; p < 300; ++p) {
        for (int64_t j = 0; j <= p; ++j) {
            if (!policy.visible(p, j)) {
                continue;
            }
            const bool    is_sink  = j < policy.n_sink;
            const int64_t distance = p - (is_sink ? policy.sink_pos(j, policy.sink_shift(p)) : j);
            CHECK(distance <= std::max(policy.n_clamp, policy.n_window - 1));
            if (!is_sink) {
                CHECK(distance == p - j && j >= policy.window_begin(p));
            } else if (policy.sink_shift(p) > j) {
                CHECK(distance <= policy.n_clamp && distance >= policy.n_clamp - policy.n_block + 1);
            } else {
                CHECK(distance == p - j);
            }
        }
    }
}

// Streams in micro-batches of random sizes: every key that a query sees is in its cell, whatever was written since
static void test_cells(const lminf_policy & policy) {
    std::map<int64_t, int64_t> stored; // cell -> position

    for (int64_t p0 = 0; p0 < 2000;) {
        const int64_t n = 1 + rand() % policy.n_ubatch;

        for (int64_t p = p0; p < p0 + n; ++p) {
            const int64_t cell = policy.cell(p);
            CHECK(cell >= 0 && cell < policy.n_cells());
            CHECK((p < policy.n_sink) == (cell < policy.n_sink_cells()));
            stored[cell] = p;
        }
        // blocks of one micro-batch that need different copies have different copies
        std::map<int64_t, int64_t> shift_of;
        for (int64_t p = p0; p < p0 + n; ++p) {
            const int64_t copy = policy.copy(p);
            CHECK(copy >= 0 && copy < policy.n_copies());
            const auto it = shift_of.emplace(copy, policy.sink_shift(p)).first;
            CHECK(it->second == policy.sink_shift(p));
        }
        for (int64_t p = p0; p < p0 + n; ++p) {
            for (int64_t j = 0; j <= p; ++j) {
                if (policy.visible(p, j)) {
                    CHECK(stored.at(policy.cell(j)) == j);
                }
            }
        }
        p0 += n;

        // undoing this micro-batch and n_rollback tokens more loses nothing either
        const int64_t n_keep = std::max<int64_t>(0, p0 - n - policy.n_rollback);
        CHECK(policy.can_cut(n_keep, p0, p0));
        for (int64_t j = policy.window_begin(n_keep); j < n_keep; ++j) {
            CHECK(stored.at(policy.cell(j)) == j);
        }
    }
}

static void test_can_cut() {
    const lminf_policy policy = make(4, 100, 100, 1);

    CHECK(policy.can_cut(0, 50, 50));
    CHECK(policy.can_cut(50, 50, 50));
    CHECK(!policy.can_cut(51, 50, 50));
    CHECK(!policy.can_cut(-1, 50, 50));

    const int64_t n = 10000;
    CHECK(policy.can_cut(n - 5, n, n));
    CHECK(policy.can_cut(n - policy.n_ring() + 99, n, n)); // the oldest key needed is the oldest one stored
    CHECK(!policy.can_cut(n - policy.n_ring() + 98, n, n));
    CHECK(policy.can_cut(4, n, n)); // down to the sink tokens
    CHECK(!policy.can_cut(n - 5, n - 4, n + 1000)); // more was written before
}

static void test_rebase(const lminf_policy & policy) {
    int64_t base   = 0;
    int64_t p_last = 0; // of the last rebase
    for (int64_t p0 = 0; p0 < 20000;) {
        const int64_t n    = 1 + rand() % policy.n_ubatch;
        const int64_t next = policy.base(p0, p0 + n - 1, base);
        if (next != base) {
            CHECK(next > base && next % policy.n_block == 0);
            CHECK(p_last == 0 || p0 - p_last >= policy.n_ring()); // no key lives through two
            CHECK(p0 - policy.n_window - policy.n_rollback >= next - policy.n_block);
            p_last = p0;
            base   = next;
        }
        CHECK(p0 >= base && p0 + n - 1 - base < policy.rebase_limit());
        p0 += n;
    }
    CHECK(base > 0);
    CHECK(policy.base(3, 3, 10*policy.n_block) == 0); // back to the beginning
}

int main() {
    test_visible();
    test_clamp();
    test_far_positions();
    test_can_cut();

    srand(1);
    for (const int64_t S : { 0, 1, 4, 16 }) {
        for (const int64_t W : { 1, 8, 40, 64 }) {
            for (const int64_t L : { 8, 40, 64, 100 }) {
                for (const int64_t B : { 1, 3, 8 }) {
                    test_distances(make(S, W, L, B));
                    test_cells(make(S, W, L, B, 1));
                    test_cells(make(S, W, L, B, 37));
                    test_rebase(make(S, W, L, B, 37));
                }
            }
        }
    }

    printf("%d failed\n", n_failed);
    return n_failed != 0;
}
