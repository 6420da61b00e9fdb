// LM-Infinite as pure functions: which keys a query sees, at which RoPE position, and which cells hold them.
//
// Called by lminf-sequence.cpp and everything in cache/ and middle/, which decide nothing by themselves, and tested without a model
// in tests/cpp/test_policy.cpp. Layers with a sliding window of the model's own have a policy too: n_sink = 0, n_window = theirs.
// Knows nothing of llama.cpp. Positions are logical: 64-bit, counted per sequence from 0.
// Source: Han et al., "LM-Infinite", arXiv 2308.16137, section 4 (sink tokens, local window, distance limit);
// blocks, cells, rollback and rebase are ours (docs/semantics.md).

#pragma once

#include <cstdint>
#include <vector>

// sink tokens as the queries of a block see them: in this copy, moved by this shift
struct lminf_placement {
    int64_t copy;
    int64_t shift;
};

struct lminf_policy {
    int64_t n_sink     = 4;    // S
    int64_t n_window   = 2048; // W
    int64_t n_clamp    = 2048; // L
    int64_t n_block    = 64;   // B
    int64_t n_rollback = 128;
    int64_t n_ubatch   = 512;
    int64_t n_rebase   = 65536;
    int64_t n_pinned   = 4;    // the first tokens, which forgetting the oldest part of the window spares (n_sink of the model)
    int64_t n_reach    = 2048; // the largest n_window of all layers of the model: they are rebased together
    int64_t n_middle   = 0;    // tokens that can be recalled, the newest ones (0: nothing is stored for that)
    int64_t n_near     = 2048; // D: keys that a query sees of its window when it recalls: those nearer than recalled ones
    bool    kept_order = false;
    bool    chunked    = false; // a query sees its own chunk of n_window tokens only (Llama 4), instead of a sliding window
    bool    alibi      = false; // no RoPE: the bias is computed for each query, so sink tokens need no copies
    bool    cuts_at_rebase = false; // no micro-batch reaches over a position from which on another base is used
    bool    rotates_queries = false; // attention of our own rotates queries to far sink tokens, which need no copies either

    //
    // visibility (section 4, "lambda-shaped mask")
    //

    // key j is visible to query p
    bool visible(int64_t p, int64_t j) const;

    // the oldest key in the local window of query p that is not a sink token: visible window keys are [window_begin, p]
    int64_t window_begin(int64_t p) const;

    //
    // clamp (section 4, "distance limit")
    //

    int64_t block    (int64_t p) const; // the block that p belongs to
    int64_t block_end(int64_t p) const; // E: the last position of p's block

    // how far the sink tokens have to follow query p: E - L, 0 as long as nothing is clamped
    int64_t sink_shift(int64_t p) const;

    // effective position of sink token j for a query whose block has this shift
    int64_t sink_pos(int64_t j, int64_t shift) const;

    // sink tokens [0, sinks_far) do not stand at their true positions for query p
    int64_t sinks_far(int64_t p) const;

    // distance at which query p sees key j: at most L for sink tokens, with ALiBi for every key
    int64_t distance(int64_t p, int64_t j) const;

    //
    // middle tokens (section 4, "re-introducing a few middle tokens"): what a query can recall
    //

    // A query that recalls sees its window from here on. Recalled keys all stand at distance D, behind what it sees.
    int64_t near_begin(int64_t p) const;

    // The oldest key that query p can recall: no sink token, and one of the newest n_middle tokens. It can recall [middle_begin,
    // near_begin), so that of these tokens every one is either visible or can be recalled.
    int64_t middle_begin(int64_t p) const;

    // The store has a slot for each of them, and for those that a rollback or an aborted micro-batch could bring back.
    int64_t n_slots() const;
    int64_t slot(int64_t j) const { return j % n_slots(); }

    // true if a sequence can be cut to n_keep tokens exactly, given that keys below n_lost were overwritten in the store
    bool can_cut_middle(int64_t n_keep, int64_t n_lost) const;

    //
    // cells of one sequence: [sink copies | window ring]
    //

    // A copy holds the S sink tokens placed for one block; the copies take turns, so that all blocks that one micro-batch touches
    // have one of their own. The turn of copy 0, the home, comes first: there sink tokens are written, at their true positions.
    int64_t n_copies() const;
    int64_t n_sink_cells() const;
    int64_t n_cells     () const; // in all, padded
    int64_t n_ring      () const; // W + rollback + micro-batch, and the padding

    // The ring is filled from this cell of it on, and wraps. Attention is computed for cells in steps of N_PAD, and threads get
    // equal stretches of them: half of the cells that are only padding then lie before the keys and half behind.
    int64_t ring_start() const;
    int64_t ring_end  () const; // of the cells that a stream needs which grows one token at a time: W + rollback of them

    int64_t copy     (int64_t p) const; // the copy that query p sees
    int64_t sink_cell(int64_t copy, int64_t j) const;

    // What the queries [p0, p1], at most n_ubatch of them, need the sink tokens to be placed as.
    std::vector<lminf_placement> plan_placements(int64_t p0, int64_t p1) const;

    //
    // eviction: which cell of the ring a new key may take
    //

    // Window keys below this are needed by no query from p0 on, even after n_rollback tokens before p0 were removed: their
    // cells are free.
    int64_t evict_before(int64_t p0) const;

    // true if a sequence of n_past tokens whose window keys below n_evicted are gone can be cut to n_keep tokens exactly:
    // everything that the next queries would have seen is still stored
    bool can_cut(int64_t n_keep, int64_t n_past, int64_t n_evicted) const;

    //
    // rebase: physical position = logical position - base
    //

    // physical positions stay below this (float32 RoPE angles lose precision from about 10^5 on)
    int64_t rebase_limit() const;

    // the base to use for a micro-batch of positions [p0, p1], given the present one; a multiple of B
    int64_t base(int64_t p0, int64_t p1, int64_t base) const;

    // The most tokens of a micro-batch, at most n_ubatch, so that none of those that n tokens from position p0 on are cut into reaches over
    // a rebase.
    int64_t largest_ubatch(int64_t p0, int64_t n, int64_t base) const;

private:
    bool    needs_copies () const { return !alibi && !rotates_queries; }
    bool    has_own_home () const; // the clamp begins before all sink tokens are there: the home takes no turns
    int64_t block_clamped() const; // the first block whose queries see a sink token elsewhere than at its true position
};
