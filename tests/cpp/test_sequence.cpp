// The bookkeeping of a sequence without a model: every key that a query may see is in its cell, whatever happened before,
// through streams in micro-batches of random sizes, removals, and a lifetime of 200 million tokens.

#include "check.h"
#include "lminf-sequence.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

static lminf_policy make(int64_t S, int64_t W, int64_t B, int64_t n_ubatch, int64_t n_rollback = 5) {
    lminf_policy res;
    res.n_sink     = S;
    res.n_window   = W;
    res.n_clamp    = std::max(W, B);
    res.n_block    = B;
    res.n_ubatch   = n_ubatch;
    res.n_rollback = n_rollback;
    res.n_rebase   = 1000;
    res.n_pinned   = S;
    res.n_reach    = W;
    return res;
}

// A stream and the keys that were written where: the memory that the sequence describes
struct stream {
    const lminf_policy & policy;
    lminf_sequence       seq;
    std::vector<int64_t> cells;

    int64_t forgotten = 0;
    int64_t p_high    = 0; // the last position at which a micro-batch began

    explicit stream(const lminf_policy & policy) : policy(policy), seq(policy), cells(policy.n_cells(), -1) {
    }

    void append(int64_t n) {
        const int64_t p0 = seq.n_past;

        p_high = std::max(p_high, p0);

        const auto ids = seq.append(n);
        CHECK((int64_t) ids.size() == n && seq.n_past == p0 + n);
        for (int64_t i = 0; i < n; ++i) {
            CHECK((p0 + i < policy.n_sink) == (ids[i] < policy.n_sink_cells()));
            cells.at(ids[i]) = p0 + i;
        }
        check(p0, p0 + n);
    }

    // what queries [p0, p1) see is stored, once
    void check(int64_t p0, int64_t p1) const {
        for (int64_t j = policy.window_begin(p0); j < p1; ++j) {
            const int64_t cell = seq.cell_of(j);
            if (j < forgotten && j >= policy.n_pinned) {
                CHECK(cell == -1);
            } else {
                CHECK(cell >= 0 && cells[cell] == j);
            }
        }
        for (int64_t j = 0; j < std::min(policy.n_sink, p1); ++j) {
            CHECK(cells[seq.cell_of(j)] == j);
        }
        CHECK(seq.n_used() <= policy.n_cells());
    }
};

static void test_stream(const lminf_policy & policy) {
    stream s(policy);

    for (int i = 0; i < 200; ++i) {
        s.append(1 + rand() % policy.n_ubatch);

        const int64_t n_past = s.seq.n_past;

        if (i % 5 == 0) {
            for (const auto & move : s.seq.compact()) {
                std::copy_n(s.cells.begin() + move.from, move.n, s.cells.begin() + move.to);
            }
            s.check(n_past, n_past);
            CHECK(s.seq.n_used() <= policy.n_sink_cells() + policy.ring_end());
        }
        // an aborted micro-batch is undone, and then as many tokens as promised
        if (i % 3 == 0) {
            s.append(1 + rand() % policy.n_ubatch);
            const int64_t n_keep = std::min(n_past, std::max<int64_t>(0, s.p_high - rand() % (policy.n_rollback + 1)));
            CHECK(s.seq.can_remove(n_keep, s.seq.n_past));
            s.seq.remove(n_keep, s.seq.n_past);
            CHECK(s.seq.n_past == n_keep);
            s.forgotten = std::min(s.forgotten, std::max(n_keep, policy.n_pinned));
            s.check(n_keep, n_keep);
        }
        // the oldest part of the window is forgotten on purpose
        if (i % 7 == 0 && s.seq.n_past > policy.n_pinned + 1) {
            const int64_t x = std::max(policy.n_pinned, s.seq.n_past - policy.n_window/2 - 1);
            CHECK(s.seq.can_remove(policy.n_pinned, x));
            s.seq.remove(policy.n_pinned, x);
            s.forgotten = std::max(s.forgotten, x);
            CHECK(x >= s.seq.n_past || s.seq.n_window() <= s.seq.n_past - x + policy.n_pinned);
        }
    }
    CHECK(s.seq.can_remove(0, s.seq.n_past));
    s.seq.remove(0, s.seq.n_past);
    CHECK(s.seq.n_past == 0 && s.seq.n_window() == 0 && s.seq.n_used() == policy.n_sink_cells());
}

static void test_refusals() {
    const lminf_policy policy = make(4, 100, 1, 8);

    lminf_sequence seq(policy);
    for (int i = 0; i < 1000; ++i) {
        seq.append(1);
    }
    CHECK(!seq.can_remove(900, 1000)); // beyond the slack
    CHECK(!seq.can_remove(950, 980));  // from the middle
    CHECK(!seq.can_remove(0, 980));    // with the sink tokens
    CHECK(seq.can_remove(1000, 2000) && seq.can_remove(7, 7));
    CHECK(seq.can_remove(4, 980) && seq.can_remove(900, 980));
}

// The tail can be cut however long it is if all that it pushed out of the window was forgotten on purpose
static void test_cut_after_forgetting() {
    lminf_policy policy = make(4, 100, 1, 8);
    {
        stream s(policy);
        s.append(4);
        for (int i = 0; i < 300; ++i) {
            s.append(3);
        }
        const int64_t n_past = s.seq.n_past;
        s.seq.remove(4, n_past - 70);
        s.forgotten = n_past - 70;
        for (int i = 0; i < 15; ++i) {
            s.append(2);
        }
        CHECK(s.seq.can_remove(n_past - 60, s.seq.n_past)); // 90 tokens, n_rollback is 5
        s.seq.remove(n_past - 60, s.seq.n_past);
        s.check(n_past - 60, n_past - 60);
        s.append(8);
        for (int i = 0; i < 100; ++i) {
            s.append(1);
        }
        CHECK(!s.seq.can_remove(s.seq.n_past - 60, s.seq.n_past)); // what was pushed out now was not forgotten
    }
    // a sliding layer of the model's own sees the pinned tokens while they are near, and has lost them here
    policy.n_sink   = 0;
    policy.n_window = 20;
    lminf_sequence sliding(policy);
    for (int i = 0; i < 60; ++i) {
        sliding.append(1);
    }
    sliding.remove(4, 50);
    CHECK(!sliding.can_remove(22, 60));
    CHECK(sliding.can_remove(23, 60)); // from here on the pinned tokens are out of sight, and the others were forgotten
}

// Saved books are the same when loaded; false ones, which would leave no cell free, are refused
static void test_saved() {
    const lminf_policy policy = make(4, 100, 1, 8);

    lminf_sequence seq(policy);
    for (int i = 0; i < 500; ++i) {
        seq.append(1);
    }
    const auto data = seq.save();

    lminf_sequence other(policy);
    CHECK(other.load(data) && other.save() == data);

    // the last three numbers are a run: position, cell, number of keys
    const auto refuses = [&](size_t i_from_end, int64_t change) {
        auto wrong = data;
        wrong[wrong.size() - i_from_end] += change;
        CHECK(!other.load(wrong) && other.save() == data);
    };
    refuses(3, 1); // keys that are missing or there twice
    refuses(3, -1);
    refuses(1, 1); // more than there are
    refuses(1, -1);
    refuses(2, policy.n_cells()); // outside
    refuses(2, -policy.n_cells());
    auto twice = data;
    twice[twice.size() - 2] = twice[twice.size() - 5]; // two runs in the same cells
    CHECK(!other.load(twice) && other.save() == data);
    auto cut = data;
    cut.resize(cut.size() - 3);
    CHECK(!other.load(cut));
    cut.resize(cut.size() - 1);
    CHECK(!other.load(cut));
    CHECK(!other.load({}));
}

// What can be recalled is stored and out of sight, also after removals; what was overwritten or never written is not offered
static void test_middle() {
    lminf_policy policy = make(4, 20, 1, 8);
    policy.n_middle = 50;

    lminf_sequence seq(policy);

    using range = std::pair<int64_t, int64_t>;
    CHECK(seq.middle(0).first == seq.middle(0).second);
    for (int i = 0; i < 40; ++i) {
        seq.append(1);
    }
    CHECK(seq.middle(40) == range(4, 21));
    seq.append(8);
    seq.append(8);
    CHECK(seq.middle(56) == range(7, 37));
    CHECK(seq.stored() == range(0, 56));

    policy.n_near = 5; // of its window, a query that recalls sees what is nearer than recalled keys
    CHECK(seq.middle(56) == range(7, 52) && seq.middle(56, true) == range(7, 37));
    CHECK(seq.middle(23) == range(0, 0)); // as long as the window holds all, it sees all
    policy.n_near = 2048;

    seq.remove(4, 50); // forgotten on purpose: not in the window any more
    CHECK(seq.middle(56) == range(7, 50));
    seq.append(8);
    CHECK(seq.stored() == range(1, 64)); // 63 slots
    seq.remove(60, 64);
    CHECK(seq.middle(60) == range(11, 50));

    lminf_sequence other(policy);
    CHECK(other.load(seq.save()) && other.stored() == seq.stored() && other.middle(60) == seq.middle(60));

    seq.set_position(1000);
    CHECK(seq.middle(1000).first == seq.middle(1000).second);
    for (int i = 0; i < 30; ++i) {
        seq.append(1);
    }
    CHECK(seq.middle(1030) == range(1000, 1011));

    seq.remove(0, seq.n_past);
    CHECK(seq.stored() == range(0, 0));

    // the window could be cut farther back than the store: not exactly any more
    policy.n_ubatch = 64;
    lminf_sequence stream(policy);
    for (int i = 0; i < 10; ++i) {
        stream.append(64);
    }
    CHECK(stream.can_remove(635, 640));
    CHECK(!stream.can_remove(560, 640));
    CHECK(stream.can_remove(3, 640));
}

// One token at a time, the keys stay in W + n_rollback cells: few for attention to look at
static void test_compact() {
    const lminf_policy policy = make(4, 2048, 64, 512, 128);

    lminf_sequence seq(policy);
    for (int i = 0; i < 20000; ++i) {
        seq.append(1);
    }
    CHECK(seq.n_used() == policy.n_sink_cells() + policy.ring_end());
    seq.append(512);
    CHECK(seq.n_used() > policy.n_sink_cells() + policy.ring_end());
    CHECK(!seq.compact().empty() && seq.n_used() == policy.n_sink_cells() + policy.ring_end());
    CHECK(seq.compact().empty());
}

// The paper's 200 million tokens: rebases, evictions and cells, with the invariants after every block
static void test_lifetime(int64_t n_tokens) {
    const lminf_policy policy = make(4, 256, 64, 64, 16);

    stream s(policy);
    int64_t n_rebases = 0;
    int64_t p_rebase  = 0;

    while (s.seq.n_past < n_tokens) {
        const int64_t p0 = s.seq.n_past;

        const int64_t base = policy.base(p0, p0 + policy.n_block - 1, s.seq.base);
        if (base != s.seq.base) {
            CHECK(base > s.seq.base && base % policy.n_block == 0);
            CHECK(n_rebases == 0 || policy.evict_before(p0) >= p_rebase);
            p_rebase   = p0;
            s.seq.base = base;
            n_rebases++;
        }
        const auto ids = s.seq.append(policy.n_block);
        for (int64_t i = 0; i < policy.n_block; ++i) {
            s.cells[ids[i]] = p0 + i;
        }
        for (const int64_t j : { policy.window_begin(p0), (policy.window_begin(p0) + p0) / 2, p0, p0 + policy.n_block - 1 }) {
            if (j < s.seq.n_past) {
                CHECK(s.cells[s.seq.cell_of(j)] == j);
            }
        }
        CHECK(s.seq.n_past - s.seq.base <= policy.rebase_limit());
        CHECK(policy.distance(p0, 0) <= policy.n_clamp);
        if (p0 % (1 << 20) == 0) {
            s.check(p0, s.seq.n_past);
        }
    }
    CHECK(n_rebases > n_tokens/policy.rebase_limit());
}

int main(int argc, char ** argv) {
    test_refusals();
    test_cut_after_forgetting();
    test_compact();
    test_saved();
    test_middle();

    srand(1);
    for (const int64_t S : { 0, 1, 4, 16 }) {
        for (const int64_t W : { 1, 8, 40, 64 }) {
            for (const int64_t B : { 1, 3, 8 }) {
                test_stream(make(S, W, B, 1));
                test_stream(make(S, W, B, 37));
            }
            lminf_policy sliding = make(0, W, 1, 37);
            sliding.n_pinned = S;
            sliding.chunked  = S % 4 == 1;
            test_stream(sliding);
        }
    }
    const bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    test_lifetime(quick ? 2000000 : 200000000);

    printf("%d failed\n", n_failed);
    return n_failed != 0;
}
