#include "lminf-sequence.h"

#include <algorithm>
#include <utility>

lminf_sequence::lminf_sequence(const lminf_policy & policy) :
    copies(policy.n_copies()), policy(&policy), n_evicted(policy.n_sink), oldest(policy.n_pinned) {
}

//
// runs
//

// appends keys, to the last run where they continue it
static void add_run(std::vector<lminf_run> & runs, const lminf_run & run) {
    if (run.n <= 0) {
        return;
    }
    if (!runs.empty() && runs.back().pos + runs.back().n == run.pos && runs.back().cell + runs.back().n == run.cell) {
        runs.back().n += run.n;
    } else {
        runs.push_back(run);
    }
}

// the keys of a run at positions [begin, end)
static lminf_run part_of(const lminf_run & run, int64_t begin, int64_t end) {
    const int64_t j0 = std::max(run.pos, begin);
    const int64_t j1 = std::min(run.pos + run.n, end);
    return { j0, run.cell + j0 - run.pos, j1 - j0 };
}

void lminf_sequence::evict(int64_t before) {
    if (before <= n_evicted) {
        return;
    }
    n_evicted = before;

    std::vector<lminf_run> rest;
    for (const auto & run : runs) {
        add_run(rest, part_of(run, n_evicted, n_past));
    }
    runs = std::move(rest);
}

void lminf_sequence::cut(int64_t n_keep) {
    while (!runs.empty() && runs.back().pos >= n_keep) {
        runs.pop_back();
    }
    if (!runs.empty()) {
        runs.back() = part_of(runs.back(), 0, n_keep);
    }
}

std::vector<lminf_sequence::stretch> lminf_sequence::free_cells(int64_t begin, int64_t end) const {
    std::vector<stretch> taken;
    for (const auto & run : runs) {
        taken.push_back({ run.cell, run.cell + run.n });
    }
    std::sort(taken.begin(), taken.end(), [](const auto & a, const auto & b) { return a.begin < b.begin; });

    std::vector<stretch> res;
    for (const auto & next : taken) {
        if (begin < std::min(next.begin, end)) {
            res.push_back({ begin, std::min(next.begin, end) });
        }
        begin = std::max(begin, next.end);
    }
    if (begin < end) {
        res.push_back({ begin, end });
    }
    return res;
}

std::vector<lminf_run> lminf_sequence::kept() const {
    if (oldest <= n_evicted) {
        return runs;
    }
    std::vector<lminf_run> res;
    for (const auto & run : runs) {
        add_run(res, part_of(run, 0, policy->n_pinned));
        add_run(res, part_of(run, std::max(oldest, policy->n_pinned), n_past));
    }
    return res;
}

//
// storing
//

std::vector<uint32_t> lminf_sequence::append(int64_t n) {
    evict(policy->evict_before(n_past));

    if (policy->n_middle > 0) {
        n_lost = std::max(n_lost, n_past + n - policy->n_slots());
    }

    std::vector<uint32_t> res;
    res.reserve(n);

    const auto store = [&](int64_t cell) {
        res.push_back((uint32_t) cell);
        ++n_past;
        --n;
    };
    while (n > 0 && n_past < policy->n_sink) {
        store(policy->sink_cell(0, n_past));
    }

    // The first free cell: a stream that grows one token at a time then uses W + n_rollback cells and leaves the slack for
    // micro-batches alone, so that attention has fewer cells to look at. n_ring cells always suffice.
    const int64_t start = policy->n_sink_cells() + policy->ring_start();

    std::vector<stretch> free = free_cells(start, policy->n_cells());
    for (const auto & before : free_cells(policy->n_sink_cells(), start)) {
        free.push_back(before);
    }
    for (const auto & cells : free) {
        if (n == 0) {
            break;
        }
        add_run(runs, { n_past, cells.begin, std::min(n, cells.end - cells.begin) });
        for (int64_t cell = cells.begin; n > 0 && cell < cells.end; ++cell) {
            store(cell);
        }
    }
    return res;
}

std::vector<lminf_sequence::move> lminf_sequence::compact() {
    evict(policy->evict_before(n_past));

    const int64_t begin = policy->n_sink_cells() + policy->ring_start();
    const int64_t end   = policy->n_sink_cells() + policy->ring_end();

    const auto is_inside = [&](const lminf_run & run) { return run.cell >= begin && run.cell + run.n <= end; };
    if (std::all_of(runs.begin(), runs.end(), is_inside)) {
        return {};
    }

    std::vector<move>      res;
    std::vector<lminf_run> moved;

    std::vector<stretch> free = free_cells(begin, end); // at most W + n_rollback - 1 keys are not evicted
    auto to = free.begin();

    for (const auto & run : runs) {
        const int64_t n_before = std::clamp<int64_t>(begin - run.cell, 0, run.n);
        const int64_t n_behind = std::clamp<int64_t>(run.cell + run.n - end, 0, run.n);

        const auto move_out = [&](int64_t i, int64_t i_end) { // of the run's keys
            while (i < i_end) {
                if (to->begin == to->end) {
                    ++to;
                    continue;
                }
                const int64_t n = std::min(i_end - i, to->end - to->begin);
                res.push_back({ run.cell + i, to->begin, n });
                add_run(moved, { run.pos + i, to->begin, n });
                to->begin += n;
                i += n;
            }
        };
        move_out(0, n_before);
        add_run(moved, { run.pos + n_before, run.cell + n_before, run.n - n_before - n_behind });
        move_out(run.n - n_behind, run.n);
    }
    runs = std::move(moved);

    return res;
}

//
// removing
//

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

    cut(n_past);
    if (n_past <= policy->n_sink) {
        n_evicted = policy->n_sink;
        n_lost    = 0;
        runs.clear();
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
    cut(policy->n_pinned);
    n_skipped = pos;
    n_past    = pos;
    oldest    = pos;
    evict(policy->evict_before(pos));
}

//
// what is there
//

std::pair<int64_t, int64_t> lminf_sequence::stored() const {
    return { std::max(n_lost, n_skipped), n_past };
}

std::pair<int64_t, int64_t> lminf_sequence::middle(int64_t p, bool gated) const {
    const int64_t begin = std::max(policy->middle_begin(p), stored().first);
    const int64_t end   = policy->n_middle > 0 ? std::min(p, std::max(policy->window_begin(p), oldest)) : 0;
    if (begin >= end) {
        return { 0, 0 };
    }
    return { begin, gated ? end : std::min(p, std::max(policy->near_begin(p), oldest)) };
}

int64_t lminf_sequence::cell_of(int64_t j) const {
    if (j < 0 || j >= n_past) {
        return -1;
    }
    if (j < policy->n_sink) {
        return policy->sink_cell(0, j);
    }
    for (const auto & run : kept()) {
        if (run.pos <= j && j < run.pos + run.n) {
            return run.cell + j - run.pos;
        }
    }
    return -1;
}

int64_t lminf_sequence::n_used() const {
    int64_t res = policy->n_sink_cells();
    for (const auto & run : runs) {
        res = std::max(res, run.cell + run.n);
    }
    return res;
}

int64_t lminf_sequence::n_sinks() const {
    return std::min(policy->n_sink, n_past);
}

int64_t lminf_sequence::n_window() const {
    int64_t res = 0;
    for (const auto & run : kept()) {
        res += std::max<int64_t>(0, part_of(run, policy->window_begin(std::max<int64_t>(0, n_past - 1)), n_past).n);
    }
    return res;
}

//
// saved
//

std::vector<int64_t> lminf_sequence::save() const {
    std::vector<int64_t> res = { n_past, origin, base, n_placements, n_rebases, n_evicted, oldest, n_lost, n_skipped };
    for (const auto & copy : copies) {
        res.insert(res.end(), { copy.shift, copy.base, copy.n_k, copy.n_v });
    }
    for (const auto & run : runs) {
        res.insert(res.end(), { run.pos, run.cell, run.n });
    }
    return res;
}

bool lminf_sequence::load(const std::vector<int64_t> & data) {
    lminf_sequence res(*policy);

    const size_t n_fixed = res.save().size();
    if (data.size() < n_fixed || (data.size() - n_fixed) % 3 != 0) {
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
    for (; it != data.end(); it += 3) {
        res.runs.push_back({ it[0], it[1], it[2] });
    }

    if (!res.is_valid()) {
        return false;
    }
    *this = std::move(res);
    return true;
}

bool lminf_sequence::is_valid() const {
    const int64_t n_max = int64_t(1) << 62;

    bool ok = n_past >= 0 && n_past < n_max;
    ok = ok && origin >= 0 && origin <= n_past && n_past - origin < (int64_t(1) << 31);
    ok = ok && base >= 0 && base <= n_past && n_past - base <= policy->rebase_limit();
    ok = ok && n_evicted >= policy->n_sink && n_evicted < n_max && oldest >= policy->n_pinned && oldest < n_max;
    ok = ok && n_lost >= 0 && n_lost <= n_past && n_skipped >= 0 && n_skipped < n_max;
    for (const auto & copy : copies) {
        ok = ok && copy.n_k >= 0 && copy.n_k <= policy->n_sink && copy.n_v >= 0 && copy.n_v <= policy->n_sink;
        ok = ok && copy.shift >= 0 && copy.shift < n_max && copy.base >= 0 && copy.base < n_max;
    }
    // keys one after the other, each in cells of its own, or append() could find none free
    int64_t n_keys = 0;
    int64_t j      = n_evicted;
    for (const auto & run : runs) {
        ok = ok && run.pos >= j && run.n > 0 && run.n <= policy->n_ring() && run.pos <= n_past - run.n;
        ok = ok && run.cell >= policy->n_sink_cells() && run.cell <= policy->n_cells() - run.n;
        if (!ok) {
            return false;
        }
        j = run.pos + run.n;
        n_keys += run.n;
    }
    if (!ok) {
        return false;
    }
    int64_t n_free = 0;
    for (const auto & cells : free_cells(policy->n_sink_cells(), policy->n_cells())) {
        n_free += cells.end - cells.begin;
    }
    if (n_keys + n_free != policy->n_ring()) {
        return false; // some share cells
    }
    // what the next query sees is there
    const int64_t begin  = policy->window_begin(n_past);
    const int64_t n_near = std::max<int64_t>(0, n_past - std::max(begin, oldest));
    const int64_t n_left = std::max<int64_t>(0, std::min(policy->n_pinned, n_past) - begin); // pinned ones
    int64_t n_seen = 0;
    for (const auto & run : kept()) {
        n_seen += std::max<int64_t>(0, part_of(run, begin, n_past).n);
    }
    return n_seen == n_near + n_left;
}
