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
    res.n_pinned   = S;
    res.n_reach    = W;
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

// blocks of one micro-batch that need different copies have different copies, and its plan names each of them once; sink tokens are
// written at home while no other placement is needed there
static void test_copies(const lminf_policy & policy) {
    for (int64_t p0 = 0; p0 < 300; ++p0) {
        std::map<int64_t, int64_t> shift_of;
        for (int64_t p = p0; p < p0 + policy.n_ubatch; ++p) {
            const int64_t copy = policy.copy(p);
            CHECK(copy >= 0 && copy < policy.n_copies());
            CHECK(shift_of.emplace(copy, policy.sink_shift(p)).first->second == policy.sink_shift(p));
            CHECK(p0 >= policy.n_sink || copy != 0 || policy.sink_shift(p) == 0);
        }
        const auto plan = policy.plan_placements(p0, p0 + policy.n_ubatch - 1);
        CHECK(plan.size() == (policy.n_sink > 0 ? shift_of.size() : 0));
        for (const auto & placement : plan) {
            CHECK(shift_of.at(placement.copy) == placement.shift);
        }
    }
}

// pinned prompts of any length: their cells and one spare copy, if blocks are as long as micro-batches
static void test_many_sink_tokens() {
    CHECK(make(2000, 2048, 2048, 256, 256).n_sink_cells() == 2*2000);
    CHECK(make(2000, 2048, 2048, 512, 512).n_sink_cells() == 2*2000);
    CHECK(make(4, 2048, 2048, 64, 256).n_copies() == 5);

    lminf_policy rotated = make(2000, 2048, 2048, 64, 512);
    rotated.rotates_queries = true;
    CHECK(rotated.n_sink_cells() == 2000);
    // near sink tokens stand at home, and once all of them are far nothing has to be placed
    CHECK(rotated.plan_placements(3000, 3600).size() == 1 && rotated.plan_placements(3000, 3600)[0].shift == 0);
    CHECK(rotated.plan_placements(2048 + 2000, 5000).empty());
    CHECK(rotated.sinks_far(2047) == 0 && rotated.sinks_far(2048) == 63 && rotated.sinks_far(5000) == 2000);

    rotated.kept_order = true; // they move all together
    CHECK(rotated.sinks_far(2047) == 0 && rotated.sinks_far(2048) == 2000 && rotated.plan_placements(2048, 3000).empty());
}

static void test_chunks() {
    lminf_policy policy = make(0, 8, 8, 1);
    policy.chunked = true;

    CHECK(policy.window_begin(7) == 0);
    CHECK(policy.window_begin(8) == 8);
    CHECK(policy.visible(15, 8) && !policy.visible(15, 7) && !policy.visible(16, 15));
    CHECK(policy.evict_before(20) == 8); // with n_rollback = 5: as query 15 sees it
}

static void test_alibi() {
    lminf_policy policy = make(2, 8, 8, 1);
    policy.alibi = true;

    CHECK(policy.n_copies() == 1 && policy.copy(1000) == 0);
    CHECK(policy.distance(1000, 0) == 8 && policy.distance(1000, 1) == 8); // the clamped bias
    CHECK(policy.distance(1000, 995) == 5);
    CHECK(policy.distance(5, 0) == 5);

    policy.n_clamp = 3; // below the window: clamps there too
    CHECK(policy.distance(1000, 998) == 2 && policy.distance(1000, 994) == 3);
}

static void test_evict_and_cut() {
    const lminf_policy policy = make(4, 100, 100, 1);

    CHECK(policy.evict_before(0) == 4);
    CHECK(policy.evict_before(1000) == 1000 - 5 - 100 + 1); // what query 995 sees stays

    CHECK(policy.can_cut(0, 50, 4));
    CHECK(policy.can_cut(50, 50, 4));
    CHECK(!policy.can_cut(51, 50, 4));
    CHECK(!policy.can_cut(-1, 50, 4));

    CHECK(policy.can_cut(995, 1000, policy.evict_before(1000)));
    CHECK(!policy.can_cut(994, 1000, policy.evict_before(1000)));
    CHECK(policy.can_cut(4, 1000, policy.evict_before(1000))); // down to the sink tokens
}

static void test_rebase(const lminf_policy & policy) {
    int64_t base   = 0;
    int64_t p_last = 0; // of the last rebase
    for (int64_t p0 = 0; p0 < 20000;) {
        const int64_t n    = 1 + rand() % policy.n_ubatch;
        const int64_t next = policy.base(p0, p0 + n - 1, base);
        if (next != base) {
            CHECK(next > base && next % policy.n_block == 0);
            CHECK(p_last == 0 || policy.evict_before(p0) >= p_last); // no key lives through two
            CHECK(next <= policy.evict_before(p0));
            p_last = p0;
            base   = next;
        }
        CHECK(p0 >= base && p0 + n - 1 - base < policy.rebase_limit());
        p0 += n;
    }
    CHECK(base > 0);
    CHECK(policy.base(3, 3, 10*policy.n_block) == 0); // back to the beginning
}

// of the newest n_middle tokens behind the sink tokens, a query sees or can recall each one, and none twice
static void test_middle(lminf_policy policy) {
    for (const int64_t n_middle : { policy.n_window + 1, policy.n_window + 30, int64_t(1000) }) {
        policy.n_middle = n_middle;
        policy.n_near   = 1 + n_middle % policy.n_clamp;
        for (int64_t p = 0; p < 300; ++p) {
            for (int64_t j = -2; j < p + 3; ++j) {
                const bool is_new = j >= policy.n_sink && j <= p && p - j < n_middle;
                const bool is_seen = policy.visible(p, j) && (j < policy.n_sink || p - j < policy.n_near);
                CHECK((j >= policy.middle_begin(p) && j < policy.near_begin(p)) == (is_new && !is_seen));
            }
        }
        // rows that a query wants have slots of their own, also when its micro-batch is aborted or tokens are removed
        const int64_t p = 5000;
        const int64_t oldest = policy.middle_begin(p - policy.n_rollback);
        CHECK(p + policy.n_ubatch - 1 - policy.n_slots() < oldest);
        CHECK(policy.can_cut_middle(p - policy.n_rollback, p + policy.n_ubatch - policy.n_slots()));
        CHECK(!policy.can_cut_middle(p - policy.n_rollback, oldest + 1));
    }
    policy.n_middle = 0;
    CHECK(policy.n_slots() == 0 && policy.can_cut_middle(50, 100));
}

int main() {
    test_visible();
    test_clamp();
    test_far_positions();
    test_evict_and_cut();
    test_chunks();
    test_alibi();
    test_many_sink_tokens();

    srand(1);
    for (const int64_t S : { 0, 1, 4, 16 }) {
        for (const int64_t W : { 1, 8, 40, 64 }) {
            for (const int64_t L : { 8, 40, 64, 100 }) {
                for (const int64_t B : { 1, 3, 8 }) {
                    test_distances(make(S, W, L, B));
                    test_middle(make(S, W, L, B));
                    test_copies(make(S, W, L, B, 1));
                    test_copies(make(S, W, L, B, 37));
                    test_rebase(make(S, W, L, B, 37));
                }
            }
        }
    }

    printf("%d failed\n", n_failed);
    return n_failed != 0;
}
