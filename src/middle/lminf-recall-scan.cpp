#include "lminf-recall-impl.h"
#include "lminf-scan.h"

#include <functional>
#include <optional>

// rows that are multiplied with all queries before the next ones: they stay in the nearest cache
static constexpr int64_t N_TILE = 64;

// queries at a time, so that their products with a tile stay there too
static constexpr int64_t N_QUERIES = 64;

// what is fetched ahead of its use: rows that lie here and there, tiles of sketches
static constexpr size_t  N_ROWS_AHEAD  = 8;
static constexpr int64_t N_TILES_AHEAD = 8;

static void prefetch(const void * begin, size_t size) {
#if defined(__GNUC__)
    for (size_t i = 0; i < size; i += 64) {
        __builtin_prefetch((const uint8_t *) begin + i);
    }
#else
    (void) begin;
    (void) size;
#endif
}

static int64_t lowest_bit(uint64_t x) {
#if defined(__GNUC__)
    return __builtin_ctzll(x);
#else
    int64_t res = 0;
    while ((x >> res & 1) == 0) {
        ++res;
    }
    return res;
#endif
}

// A key's score and index as one number, larger if the key is better (lminf_recall::best).
static uint64_t rank(float score, uint32_t index) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof(bits));
    bits ^= bits >> 31 != 0 ? UINT32_MAX : 1u << 31;
    return (uint64_t) bits << 32 | index;
}

static uint32_t rank_index(uint64_t rank) {
    return (uint32_t) rank & 0x7fffffff;
}

static float rank_score(uint64_t rank) {
    auto bits = (uint32_t) (rank >> 32);
    bits ^= bits >> 31 != 0 ? 1u << 31 : UINT32_MAX;
    float res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

// Leaves the n largest of different numbers, in any order. As std::nth_element(), but parts them without branches, which
// nothing could predict.
static void select_largest(std::vector<uint64_t> & values, size_t n) {
    static constexpr size_t N_SMALL = 16;

    size_t begin = 0; // those before it stay, those from end on go
    size_t end   = values.size();
    while (end - begin > N_SMALL && n > begin && n < end) {
        const uint64_t a = values[begin];
        const uint64_t b = values[begin + (end - begin)/2];
        const uint64_t c = values[end - 1];
        const uint64_t pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));

        size_t larger = begin;
        for (size_t i = begin; i < end; ++i) {
            const uint64_t value = values[i];
            values[i]      = values[larger];
            values[larger] = value;
            larger += value > pivot;
        }
        (larger < n ? begin : end) = larger;
    }
    if (n > begin && n < end) {
        std::partial_sort(values.begin() + begin, values.begin() + n, values.begin() + end, std::greater<>());
    }
    values.resize(n);
}

// log-sum-exp of what a head sees anyway
static float log_sum_exp(const ggml_tensor * window, int64_t head, int64_t token) {
    const auto * part = (const float *) element(window, head, token) + window->ne[0] - 2;
    return part[0] + logf(part[1]);
}

// One KV head of one sequence: the keys [begin, end), for tokens [t0, t1) of the micro-batch.
struct lminf_recall::scan {
    using entry = best::entry;

    // queries that share what they find: one, or all of a KV head
    struct group {
        const lminf_recall_token * token;
        int64_t                    i0; // its queries [i0, i1)
        int64_t                    i1;
        best *                     found;
        std::vector<uint64_t>      candidates; // ranks
    };

    const lminf_recall & self;
    const layer_op &     op;
    const int64_t        begin;
    const int64_t        end;
    const int64_t        n_candidates; // of each group, among these keys

    lminf_scan_queries queries;

    std::vector<const float *>      vectors; // of queries
    std::vector<float>              minus;   // what is taken off a query's logits before its group compares them
    std::vector<group>              groups;
    std::vector<lminf_sketch_query> sketches;

    std::optional<lminf_sketcher> sketcher;

    int64_t seq  = 0;
    int64_t head = 0;

    scan(const layer_op & op, int64_t begin, int64_t end, int64_t n_candidates) :
        self(*op.self), op(op), begin(begin), end(end), n_candidates(n_candidates),
        queries(self.store.type, self.store.n_embd_k(op.layer)) {
    }

    void clear(int64_t seq, int64_t head) {
        this->seq  = seq;
        this->head = head;
        queries.clear();
        vectors.clear();
        minus.clear();
        groups.clear();
    }

    void add_query(const float * vector, float minus) {
        queries.add(vector);
        vectors.push_back(vector);
        this->minus.push_back(minus);
    }

    void run() {
        const bool has_first_pass = self.n_candidates > 0 && end - begin > n_candidates &&
            self.store.mean(seq, op.layer, head)[0] != 0.0f;
        if (has_first_pass) {
            find_candidates();
        }
        if (has_first_pass && !self.is_checked) {
            score_candidates();
        } else {
            score_all();
            if (self.is_checked) {
                mark_candidates(!has_first_pass);
            }
        }
    }

private:
    void score_all() {
        const int64_t   n_slots  = self.store.n_slots;
        const size_t    row_size = self.store.k_row_size(op.layer);
        const uint8_t * rows     = self.store.k_rows(seq, op.layer, head);

        std::vector<float> products, scores(N_TILE);

        int64_t n;
        for (int64_t j = begin; j < end; j += n) {
            n = std::min({ N_TILE, end - j, n_slots - j % n_slots });

            for (size_t g0 = 0, g1; g0 < groups.size(); g0 = g1) {
                const int64_t i0 = groups[g0].i0;
                for (g1 = g0 + 1; g1 < groups.size() && groups[g1].i1 - i0 <= N_QUERIES;) {
                    ++g1;
                }
                const int64_t n_i = groups[g1 - 1].i1 - i0;
                products.resize(n_i*N_TILE);
                queries.multiply(rows + j % n_slots*row_size, row_size, n, i0, n_i, products.data());
                op.apply(products.data(), n_i*n);

                for (size_t g = g0; g < g1; ++g) {
                    auto & group = groups[g];
                    scores.assign(n, -INFINITY);
                    for (int64_t i = group.i0; i < group.i1; ++i) {
                        const float * logit = products.data() + (i - i0)*n;
                        for (int64_t r = 0; r < n; ++r) {
                            scores[r] = std::max(scores[r], logit[r] - minus[i]);
                        }
                    }
                    // hardly any tile has one that is good enough: that is found out without branches
                    const float worst = group.found->worst(self.n_best);
                    int n_good = 0;
                    for (int64_t r = 0; r < n; ++r) {
                        n_good += scores[r] >= worst;
                    }
                    if (n_good == 0) {
                        continue;
                    }
                    const int64_t r0 = std::clamp<int64_t>(group.token->begin - j, 0, n);
                    const int64_t r1 = std::clamp<int64_t>(group.token->end   - j, 0, n);
                    for (int64_t r = r0; r < r1; ++r) {
                        if (scores[r] >= group.found->worst(self.n_best)) {
                            group.found->offer({ scores[r], best::index(j + r - group.token->begin), 0 }, self.n_best);
                        }
                    }
                }
            }
        }
    }

    //
    // the first pass
    //

    void sketch_queries() {
        if (!sketcher) {
            sketcher.emplace(self.store.n_embd_k(op.layer));
        }
        sketches.clear();
        for (const float * vector : vectors) {
            sketches.push_back(sketcher->query(vector, self.store.mean(seq, op.layer, head) + 1));
        }
    }

    // keeps the best ones, and looks for better ones only from now on
    void shrink(group & group) {
        auto & kept = group.candidates;
        if ((int64_t) kept.size() > n_candidates) {
            select_largest(kept, n_candidates);
            const float worst = rank_score(*std::min_element(kept.begin(), kept.end()));
            for (int64_t i = group.i0; i < group.i1; ++i) {
                sketches[i].limit = op.product(worst + minus[i]);
            }
        }
    }

    // From the newest key to the oldest: of equal ones the newer is the better, so only what is better than the last one counts.
    void find_candidates() {
        const int64_t n_slots = self.store.n_slots;

        const lminf_sketches keys = {
            self.store.sketches(seq, op.layer, head), self.store.factors(seq, op.layer, head), n_slots
        };

        sketch_queries();

        std::vector<float> products(vectors.size()*N_TILE);

        int64_t n;
        for (int64_t j1 = end; j1 > begin; j1 -= n) {
            n = std::min({ N_TILE, j1 - begin, (j1 - 1) % n_slots + 1 });
            const int64_t j    = j1 - n;
            const auto    tile = keys.from(j % n_slots);

            if (j % n_slots >= N_TILES_AHEAD*N_TILE) { // the processor sees no order in tiles from the last to the first
                const auto next = keys.from(j % n_slots - N_TILES_AHEAD*N_TILE);
                for (int64_t w = 0; w < self.store.n_words(op.layer); ++w) {
                    prefetch(next.words + w*next.stride, N_TILE*sizeof(*next.words));
                }
                prefetch(next.factors, N_TILE*sizeof(*next.factors));
            }
            for (auto & group : groups) {
                const int64_t r0 = std::clamp<int64_t>(group.token->begin - j, 0, n);
                const int64_t r1 = std::clamp<int64_t>(group.token->end   - j, 0, n);

                uint64_t found = 0;
                for (int64_t i = group.i0; i < group.i1; ++i) {
                    found |= sketches[i].multiply(tile, n, products.data() + i*N_TILE);
                }
                for (; found != 0; found &= found - 1) { // its lowest bit goes
                    const int64_t r = lowest_bit(found);
                    if (r < r0 || r >= r1) {
                        continue;
                    }
                    float score = -INFINITY;
                    for (int64_t i = group.i0; i < group.i1; ++i) {
                        score = std::max(score, op.logit(products[i*N_TILE + r]) - minus[i]);
                    }
                    group.candidates.push_back(rank(score, best::index(j + r - group.token->begin)));
                }
                if ((int64_t) group.candidates.size() >= 2*n_candidates) {
                    shrink(group);
                }
            }
        }
        for (auto & group : groups) {
            shrink(group);
        }
    }

    // Exactly, for those keys alone: their rows are put side by side.
    void score_candidates() {
        const size_t    row_size = self.store.k_row_size(op.layer);
        const uint8_t * all_rows = self.store.k_rows(seq, op.layer, head);

        std::vector<uint8_t> rows(N_TILE*row_size);
        std::vector<float>   products;
        for (auto & group : groups) {
            const auto &  keys = group.candidates;
            const int64_t n_i  = group.i1 - group.i0;

            const auto row = [&](size_t c) {
                return all_rows + (group.token->begin + rank_index(keys[c])) % self.store.n_slots*row_size;
            };
            products.resize(n_i*N_TILE);
            for (size_t c0 = 0; c0 < keys.size(); c0 += N_TILE) {
                const auto n = std::min<int64_t>(N_TILE, (int64_t) (keys.size() - c0));
                for (int64_t c = 0; c < n; ++c) {
                    if (c0 + c + N_ROWS_AHEAD < keys.size()) {
                        prefetch(row(c0 + c + N_ROWS_AHEAD), row_size);
                    }
                    memcpy(rows.data() + c*row_size, row(c0 + c), row_size);
                }
                queries.multiply(rows.data(), row_size, n, group.i0, n_i, products.data());
                for (int64_t c = 0; c < n; ++c) {
                    float score = -INFINITY;
                    for (int64_t i = 0; i < n_i; ++i) {
                        score = std::max(score, op.logit(products[i*n + c]) - minus[group.i0 + i]);
                    }
                    group.found->offer({ score, rank_index(keys[c0 + c]), 1 }, self.n_best);
                }
            }
        }
    }

    // Of what was found by looking at all keys, what would have been found without.
    void mark_candidates(bool all) {
        for (auto & group : groups) {
            std::vector<uint32_t> indices;
            for (const uint64_t key : group.candidates) {
                indices.push_back(rank_index(key));
            }
            std::sort(indices.begin(), indices.end());
            for (int64_t i = 0; i < group.found->n; ++i) {
                auto & e = group.found->entries[i];
                e.is_candidate = all || std::binary_search(indices.begin(), indices.end(), (uint32_t) e.index);
            }
        }
    }
};

// 2. the best keys of each query, or of the queries of each KV head, as each thread finds them in its share of the keys
void lminf_recall::compute_scan(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & op   = *(const layer_op *) data;
    auto       & self = *op.self;

    const int64_t t_start = ggml_time_us();

    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * window = dst->src[1];

    const int64_t n_head_kv = self.store.n_heads(op.layer);
    const int64_t n_rep     = q->ne[1]/n_head_kv;
    const int64_t n_share   = std::min<int64_t>(nth, dst->ne[3]);

    const auto heap = [&](int64_t group, int64_t token, int64_t share) {
        return (best *) element(dst, group, token, share);
    };
    for (int64_t share = ith; share < dst->ne[3]; share += nth) {
        for (int64_t i = 0; i < dst->ne[1]*dst->ne[2]; ++i) {
            heap(i % dst->ne[1], i/dst->ne[1], share)->n = 0;
        }
    }
    if (ith >= n_share) {
        return;
    }

    const auto & tokens = self.tokens;
    for (size_t t0 = 0, t1; t0 < tokens.size(); t0 = t1) {
        // the tokens of one sequence, and what any of them can recall
        int64_t begin = INT64_MAX;
        int64_t end   = 0;
        for (t1 = t0; t1 < tokens.size() && tokens[t1].seq == tokens[t0].seq; ++t1) {
            if (tokens[t1].begin < tokens[t1].end) {
                begin = std::min(begin, tokens[t1].begin);
                end   = std::max(end,   tokens[t1].end);
            }
        }
        if (begin >= end) {
            continue;
        }

        scan part(op, begin + (end - begin)*ith/n_share, begin + (end - begin)*(ith + 1)/n_share,
                std::max(self.n_best, (self.n_candidates + n_share - 1)/n_share));

        for (int64_t head = 0; head < n_head_kv; ++head) {
            part.clear(tokens[t0].seq, head);
            for (auto t = (int64_t) t0; t < (int64_t) t1; ++t) {
                const int64_t i0 = (t - (int64_t) t0)*n_rep;
                for (int64_t i = 0; i < n_rep; ++i) {
                    const int64_t h = head*n_rep + i;

                    part.add_query((const float *) element(q, h, t), self.per_head ? 0.0f : log_sum_exp(window, h, t));
                    if (self.per_head) {
                        part.groups.push_back({ &tokens[t], i0 + i, i0 + i + 1, heap(h, t, ith), {} });
                    }
                }
                if (!self.per_head) {
                    part.groups.push_back({ &tokens[t], i0, i0 + n_rep, heap(head, t, ith), {} });
                }
            }
            part.run();
        }
    }
    if (ith == 0) {
        self.n_us_scan += ggml_time_us() - t_start;
    }
}
