#include "lminf-sequence.h"

#include <algorithm>
#include <utility>

lminf_sequence::lminf_sequence(const lminf_policy & policy) :
    copies(policy.n_copies()), policy(&policy), n_evicted(policy.n_sink), oldest(policy.n_pinned), ring(policy.n_ring(), -1) {
}

std::vector<uint32_t> lminf_sequence::append(int64_t n) {
    n_evicted = std::max(n_evicted, policy->evict_before(n_past));

    std::vector<uint32_t> res;
    res.reserve(n);

    // The first free cell: a stream that grows one token at a time then uses W + n_rollback cells and leaves the slack for
    // micro-batches alone, so that attention has fewer cells to look at.
    size_t i = policy->ring_start();
    if (policy->n_middle > 0) {
        n_lost = std::max(n_lost, n_past + n - policy->n_slots());
    }

    for (; n > 0; --n, ++n_past) {
        if (n_past < policy->n_sink) {
            res.push_back((uint32_t) policy->sink_cell(0, n_past));
            continue;
        }
        while (ring[i] >= n_evicted) { // n_ring cells always suffice
            i = i + 1 == ring.size() ? 0 : i + 1;
        }
        ring[i] = n_past;
        res.push_back((uint32_t) (policy->n_sink_cells() + (int64_t) i));
    }
    return res;
}

std::vector<lminf_sequence::move> lminf_sequence::compact() {
    n_evicted = std::max(n_evicted, policy->evict_before(n_past));

    std::vector<move> res;

    const size_t begin = policy->ring_start();
    const size_t end   = policy->ring_end();

    size_t to = begin;
    for (size_t i = 0; i < ring.size(); ++i) {
        if (ring[i] < n_evicted || (i >= begin && i < end)) {
            continue;
        }
        while (ring[to] >= n_evicted) { // at most W + n_rollback - 1 keys are not evicted
            ++to;
        }
        std::swap(ring[i], ring[to]);
        res.push_back({ policy->n_sink_cells() + (int64_t) i, policy->n_sink_cells() + (int64_t) to });
    }
    return res;
}

bool lminf_sequence::can_remove(int64_t j0, int64_t j1) const {
    if (j0 >= j1 || j0 >= n_past) {
        return true; // nothing to remove
    }
    if (j1 >= n_past) {
        // nobody misses what was forgotten on purpose
        const bool is_forgotten = oldest >= n_evicted && policy->window_begin(j0) >= policy->n_pinned;
        return (is_forgotten || policy->can_cut(j0, n_past, n_evicted)) && policy->can_cut_middle(j0, n_lost);
    }
    // the oldest part of the window: from anywhere between the pinned tokens and what is still there
    return j0 >= policy->n_pinned && j0 <= std::max(oldest, policy->window_begin(n_past));
}

void lminf_sequence::remove(int64_t j0, int64_t j1) {
    if (j0 >= j1 || j0 >= n_past) {
        return;
    }
    if (j1 < n_past) {
        oldest = std::max(oldest, j1);
        return;
    }

    n_past = std::max<int64_t>(0, j0);
    oldest = std::min(oldest, std::max(n_past, policy->n_pinned));

    n_evicted = std::min(n_evicted, std::max(n_past, policy->n_sink)); // keys that are still to come are not

    n_skipped = std::min(n_skipped, n_past);

    for (auto & j : ring) {
        if (j >= n_past) {
            j = -1;
        }
    }
    if (n_past <= policy->n_sink) {
        n_evicted = policy->n_sink;
        n_lost    = 0;
        std::fill(ring.begin(), ring.end(), -1);
    }
    for (size_t i = 0; i < copies.size() && n_past < policy->n_sink; ++i) {
        if (i > 0) {
            copies[i] = {};
        }
        copies[i].n_k = std::min(copies[i].n_k, n_past);
        copies[i].n_v = std::min(copies[i].n_v, n_past);
    }
}

void lminf_sequence::set_position(int64_t pos) {
    n_skipped = pos;
    n_past    = pos;
    n_evicted = std::max(n_evicted, policy->evict_before(pos));
    oldest    = pos;
    for (auto & j : ring) {
        j = j < policy->n_pinned ? j : -1;
    }
}

std::pair<int64_t, int64_t> lminf_sequence::middle(int64_t p, bool gated) const {
    const int64_t begin = std::max(policy->middle_begin(p), stored().first);
    const int64_t end   = policy->n_middle > 0 ? std::min(p, std::max(policy->window_begin(p), oldest)) : 0;
    if (begin >= end) {
        return { 0, 0 };
    }
    return { begin, gated ? end : std::min(p, std::max(policy->near_begin(p), oldest)) };
}

int64_t lminf_sequence::key_at(int64_t cell) const {
    const int64_t j = ring.at(cell - policy->n_sink_cells());
    return j >= n_evicted ? j : -1;
}

int64_t lminf_sequence::cell_of(int64_t j) const {
    if (j < 0 || j >= n_past) {
        return -1;
    }
    if (j < policy->n_sink) {
        return policy->sink_cell(0, j);
    }
    const auto it = std::find(ring.begin(), ring.end(), j);
    if (j < n_evicted || it == ring.end() || !is_kept(j)) {
        return -1;
    }
    return policy->n_sink_cells() + (it - ring.begin());
}

int64_t lminf_sequence::n_used() const {
    int64_t res = ring.size();
    while (res > 0 && ring[res - 1] < n_evicted) {
        --res;
    }
    return policy->n_sink_cells() + res;
}

int64_t lminf_sequence::n_sinks() const {
    return std::min(policy->n_sink, n_past);
}

int64_t lminf_sequence::n_window() const {
    int64_t res = 0;
    for (const int64_t j : ring) {
        res += n_past > 0 && j >= n_evicted && visible(n_past - 1, j);
    }
    return res;
}

std::vector<int64_t> lminf_sequence::save() const {
    std::vector<int64_t> res = { n_past, origin, base, n_placements, n_rebases, n_evicted, oldest, n_lost, n_skipped };
    for (const auto & copy : copies) {
        res.insert(res.end(), { copy.shift, copy.base, copy.n_k, copy.n_v });
    }
    res.insert(res.end(), ring.begin(), ring.end());
    return res;
}

bool lminf_sequence::load(const std::vector<int64_t> & data) {
    lminf_sequence res(*policy);
    if (data.size() != res.save().size()) {
        return false;
    }

    auto it = data.begin();
    for (auto * x : { &res.n_past, &res.origin, &res.base, &res.n_placements, &res.n_rebases, &res.n_evicted, &res.oldest, &res.n_lost,
                    &res.n_skipped }) {
        *x = *it++;
    }
    for (auto & copy : res.copies) {
        for (auto * x : { &copy.shift, &copy.base, &copy.n_k, &copy.n_v }) {
            *x = *it++;
        }
    }
    std::copy(it, data.end(), res.ring.begin());

    const int64_t n_max = int64_t(1) << 62;

    bool ok = res.n_past >= 0 && res.n_past < n_max;
    ok = ok && res.origin >= 0 && res.origin <= res.n_past && res.n_past - res.origin < (int64_t(1) << 31);
    ok = ok && res.base >= 0 && res.base <= res.n_past && res.n_past - res.base <= policy->rebase_limit();
    ok = ok && res.n_evicted >= policy->n_sink && res.oldest >= 0 && res.oldest < n_max;
    ok = ok && res.n_lost >= 0 && res.n_lost <= std::max<int64_t>(0, res.n_past) && res.n_skipped >= 0;
    for (const int64_t j : res.ring) {
        ok = ok && j >= -1 && j < res.n_past;
    }
    // a key has one cell, or append() could find none free
    std::vector<int64_t> keys = res.ring;
    keys.erase(std::remove(keys.begin(), keys.end(), -1), keys.end());
    std::sort(keys.begin(), keys.end());
    ok = ok && std::adjacent_find(keys.begin(), keys.end()) == keys.end();
    // what the next query sees is there
    for (int64_t j = ok ? policy->window_begin(res.n_past) : 0; ok && j < res.n_past; ++j) {
        ok = !res.is_kept(j) || res.cell_of(j) >= 0;
    }
    if (ok) {
        *this = std::move(res);
    }
    return ok;
}
