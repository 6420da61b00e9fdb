#include "lminf-policy.h"

#include <algorithm>
#include <numeric>

// llama.cpp pads contexts to this many cells; GPU flash attention kernels want it too. Attention of our own does not.
static constexpr int64_t N_PAD     = 256;
static constexpr int64_t N_PAD_OWN = 32;

bool lminf_policy::visible(int64_t p, int64_t j) const {
    return j >= 0 && j <= p && (j < n_sink || j >= window_begin(p));
}

int64_t lminf_policy::window_begin(int64_t p) const {
    return std::max(n_sink, chunked ? p / n_window * n_window : p - n_window + 1);
}

int64_t lminf_policy::block(int64_t p) const {
    return p / n_block;
}

int64_t lminf_policy::block_end(int64_t p) const {
    return block(p) * n_block + n_block - 1;
}

int64_t lminf_policy::sink_shift(int64_t p) const {
    return std::max<int64_t>(0, block_end(p) - n_clamp);
}

int64_t lminf_policy::sink_pos(int64_t j, int64_t shift) const {
    return kept_order ? j + shift : std::max(j, shift);
}

int64_t lminf_policy::sinks_far(int64_t p) const {
    const int64_t shift = alibi ? 0 : sink_shift(p);
    return kept_order ? (shift > 0 ? n_sink : 0) : std::min(n_sink, shift);
}

int64_t lminf_policy::distance(int64_t p, int64_t j) const {
    if (alibi) {
        return std::min(p - j, n_clamp);
    }
    return p - (j < n_sink ? sink_pos(j, sink_shift(p)) : j);
}

int64_t lminf_policy::near_begin(int64_t p) const {
    return std::max(window_begin(p), p - n_near + 1);
}

int64_t lminf_policy::middle_begin(int64_t p) const {
    return std::max(n_sink, p - n_middle + 1);
}

int64_t lminf_policy::n_slots() const {
    return n_middle > 0 ? n_middle + n_rollback + n_ubatch : 0;
}

bool lminf_policy::can_cut_middle(int64_t n_keep, int64_t n_lost) const {
    return n_middle == 0 || n_keep <= n_sink || n_lost <= middle_begin(n_keep);
}

int64_t lminf_policy::block_clamped() const {
    return (n_clamp + 1) / n_block;
}

bool lminf_policy::has_own_home() const {
    return n_sink > block_clamped()*n_block;
}

int64_t lminf_policy::n_copies() const {
    // the blocks that n_ubatch consecutive positions can touch
    return needs_copies() ? (n_ubatch + n_block - 2) / n_block + 1 + (has_own_home() ? 1 : 0) : 1;
}

int64_t lminf_policy::n_sink_cells() const {
    return n_sink * n_copies();
}

int64_t lminf_policy::n_cells() const {
    const int64_t n = n_sink_cells() + n_window + n_rollback + n_ubatch;
    const int64_t n_pad = rotates_queries ? N_PAD_OWN : N_PAD;
    return (n + n_pad - 1) / n_pad * n_pad;
}

int64_t lminf_policy::n_ring() const {
    return n_cells() - n_sink_cells();
}

int64_t lminf_policy::ring_start() const {
    const int64_t n_used   = n_sink_cells() + n_window + n_rollback;
    const int64_t n_before = n_sink_cells() - n_sink; // a query sees one copy of the sink tokens
    const int64_t n_behind = (n_used + N_PAD - 1) / N_PAD * N_PAD - n_used;

    return rotates_queries ? 0 : std::max<int64_t>(0, n_behind - n_before) / 2;
}

int64_t lminf_policy::ring_end() const {
    return ring_start() + n_window + n_rollback;
}

int64_t lminf_policy::copy(int64_t p) const {
    if (!needs_copies() || sink_shift(p) == 0) {
        return 0;
    }
    const int64_t turn = block(p) - block_clamped();
    return has_own_home() ? 1 + turn % (n_copies() - 1) : (1 + turn) % n_copies();
}

int64_t lminf_policy::sink_cell(int64_t copy, int64_t j) const {
    return copy * n_sink + j;
}

std::vector<lminf_placement> lminf_policy::plan_placements(int64_t p0, int64_t p1) const {
    std::vector<lminf_placement> res;
    for (int64_t p = p0; n_sink > 0 && p <= p1; p = block_end(p) + 1) {
        if (rotates_queries && sinks_far(p) == n_sink) {
            continue; // the query is moved, wherever the keys stand
        }
        const lminf_placement placement = { copy(p), needs_copies() ? sink_shift(p) : 0 };
        if (res.empty() || res.back().copy != placement.copy) {
            res.push_back(placement);
        }
    }
    return res;
}

int64_t lminf_policy::evict_before(int64_t p0) const {
    return window_begin(std::max<int64_t>(0, p0 - n_rollback));
}

bool lminf_policy::can_cut(int64_t n_keep, int64_t n_past, int64_t n_evicted) const {
    if (n_keep < 0 || n_keep > n_past) {
        return false;
    }
    // a cut down to the sink tokens leaves no window key to miss
    return n_keep <= n_sink || window_begin(n_keep) >= n_evicted;
}

int64_t lminf_policy::rebase_limit() const {
    // never so low that a key could live through two rebases
    return std::max(n_rebase, 2 * (n_reach + n_rollback) + n_block + (cuts_at_rebase ? 0 : n_ubatch));
}

int64_t lminf_policy::base(int64_t p0, int64_t p1, int64_t base) const {
    if (p0 >= base && p1 - base < rebase_limit()) {
        return base;
    }
    const int64_t oldest = std::max<int64_t>(0, p0 - n_reach - n_rollback);
    return oldest / n_block * n_block;
}

int64_t lminf_policy::largest_ubatch(int64_t p0, int64_t n, int64_t base) const {
    base = this->base(p0, p0, base);

    int64_t distances = 0; // their greatest common divisor
    for (int64_t p = base + rebase_limit(); p < p0 + n; p = base + rebase_limit()) {
        distances = std::gcd(distances, p - p0);
        base      = this->base(p, p, base);
    }
    int64_t res = n_ubatch;
    while (distances % res != 0) {
        res--;
    }
    return res;
}
