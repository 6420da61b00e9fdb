// Bookkeeping of one sequence in one cache: its length, which cells hold which keys, what each copy of the sink tokens holds.
//
// Carries out lminf_policy's decisions and knows nothing of tensors or llama.cpp; lminf-kv-cache.cpp moves the data. Keys are kept as
// runs, a handful of them whatever the window: what follows from them (masks, copies to try a batch on, saved books) does not grow
// with the window. tests/cpp/test_sequence.cpp drives it through 200 million tokens.

#pragma once

#include "lminf-policy.h"
#include "lminf-run.h"

#include <cstdint>
#include <utility>
#include <vector>

class lminf_sequence {
public:
    // what one copy of the sink tokens holds: n_k keys placed for this shift and base, n_v values
    struct sink_copy {
        int64_t shift = 0;
        int64_t base  = 0;
        int64_t n_k   = 0;
        int64_t n_v   = 0;
    };

    explicit lminf_sequence(const lminf_policy & policy);

    int64_t n_past = 0; // logical position of the next token
    int64_t origin = 0; // logical position - llama_pos
    int64_t base   = 0; // logical position - physical position

    int64_t n_placements = 0;
    int64_t n_rebases    = 0;

    std::vector<sink_copy> copies; // [n_copies]

    // The next n tokens (at most n_ubatch) are stored: evicts what they do not need, returns their cells.
    std::vector<uint32_t> append(int64_t n);

    // Keys that micro-batches left in cells which single tokens do not need move to lower ones, so that attention has fewer
    // cells to look at. Returns what moves.
    struct move { int64_t from; int64_t to; int64_t n; };
    std::vector<move> compact();

    // The removals that are exact: the tail, as far back as everything that the next queries see is still stored (or was
    // forgotten on purpose); the oldest part of the window behind the pinned tokens. Empty ranges are allowed too.
    // Positions are logical, [j0, j1).
    bool can_remove(int64_t j0, int64_t j1) const;
    void remove    (int64_t j0, int64_t j1); // after can_remove()

    // goes on at this position with the pinned tokens alone (test hook)
    void set_position(int64_t pos);

    // The keys of the window that the next query, or one after a rollback, may see, in order of their positions: all that are stored
    // but what was forgotten on purpose. visible() of the policy says which of them a query sees.
    std::vector<lminf_run> kept() const;

    // The keys that query p can recall, [first, second): they are stored, and it does not see them. None as long as its window
    // holds all. gated: it sees all of its window.
    std::pair<int64_t, int64_t> middle(int64_t p, bool gated = false) const;

    // keys whose rows are in the store of middle tokens, [first, second), though no query may want some of them any more
    std::pair<int64_t, int64_t> stored() const;

    int64_t cell_of(int64_t j) const; // -1 if key j is not stored
    int64_t n_used () const;          // cells up to the last one that holds a key

    // tokens that the next query sees at most: sink tokens, window keys
    int64_t n_sinks () const;
    int64_t n_window() const;

    // Everything as numbers, and back. load() returns false, and changes nothing, if the numbers cannot come from save() of a
    // sequence with this policy.
    std::vector<int64_t> save() const;
    bool load(const std::vector<int64_t> & data);

private:
    const lminf_policy * policy;

    int64_t n_evicted = 0; // window keys below this may have been overwritten
    int64_t oldest    = 0; // window keys below this were forgotten on purpose
    int64_t n_lost    = 0; // keys below this were overwritten in the store of middle tokens
    int64_t n_skipped = 0; // keys below this were never in it

    std::vector<lminf_run> runs; // by position

    void evict(int64_t before);
    void cut  (int64_t n_keep); // keys from here on are gone

    bool is_valid() const;

    // The stretches of [begin, end) that hold no key.
    struct stretch { int64_t begin; int64_t end; };
    std::vector<stretch> free_cells(int64_t begin, int64_t end) const;
};
