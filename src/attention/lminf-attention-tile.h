// A tile: some queries of a stream, for the query heads that share a head of keys and values. Finds what they see, in
// which cells it lies, and takes it block by block. Included by lminf-attention.cpp alone.

#pragma once

#include "lminf-attention-block.h"
#include "lminf-attention.h"

namespace {

constexpr int64_t TILE_ROWS = 128; // query vectors that share an unpacked key; no result depends on it

// a thread's share of the work area
struct scratch {
    float * k;
    float * v;
    float * k_factors;  // [units][BLOCK]
    float * v_factors;  // [units][BLOCK]
    float * q_numbers;  // see integer_rows
    float * q_factors;
    float * q_sums;
    float * scores;     // [rows][PART]
    float * scores_far; // the same, sink tokens scored with far_k
    float * max;        // [rows]
    float * sums;       // [rows][W]
    float * acc;        // [rows][padded(n_embd_v)]
    float * part;       // one row
    float * converted;  // [BLOCK] rows of a type that only ggml unpacks
    float * total;      // rows of results

    // sets the pointers from `data` on, and says how many floats they need
    int64_t divide(float * data, int64_t n_embd_k, int64_t n_embd_v, int64_t n_rows) {
        int64_t    n    = 0;
        const auto take = [&](int64_t size) {
            float * res = data ? data + n : nullptr;
            n += padded(size);
            return res;
        };
        k          = take(BLOCK * padded(n_embd_k));
        v          = take(BLOCK * padded(n_embd_v));
        k_factors  = take(divide_up(n_embd_k, LMINF_SIMD_UNIT) * BLOCK);
        v_factors  = take(divide_up(n_embd_v, LMINF_SIMD_UNIT) * BLOCK);
        q_numbers  = take(n_rows * divide_up(n_embd_k, 2));
        q_factors  = take(n_rows * divide_up(n_embd_k, LMINF_SIMD_UNIT));
        q_sums     = take(n_rows * divide_up(n_embd_k, LMINF_SIMD_UNIT));
        scores     = take(n_rows * PART);
        scores_far = take(n_rows * PART);
        max        = take(n_rows);
        sums       = take(n_rows * W);
        acc        = take(n_rows * padded(n_embd_v));
        part       = take(part_row::size(n_embd_v));
        converted  = take(BLOCK * padded(std::max(n_embd_k, n_embd_v)));
        total      = take(n_rows * part_row::size(n_embd_v));
        return n;
    }
};

int64_t max_tile_rows(const lminf_attention_job & job) {
    return std::max(TILE_ROWS, job.n_head / job.n_head_kv);
}

class tile_worker {
public:
    const int64_t head_kv;
    const int64_t n_group; // query heads of it
    const int64_t n_rows;  // all query heads of a token, then those of the next

    tile_worker(
        const lminf_attention_job & job_, const lminf_attention_tile & tile_, int64_t head_kv_, const scratch & mem_) :
        head_kv(head_kv_),
        n_group(job_.n_head / job_.n_head_kv),
        n_rows(tile_.n_tokens * n_group),
        job(job_),
        tile(tile_),
        queries(job.queries + tile.token),
        stream(job.streams[queries->stream]),
        mem(mem_),
        n_sink_parts(divide_up(tile.sinks, PART)) {}

    // the parts of sink tokens come first
    void compute_part(int64_t i_part) {
        const bool    sinks = i_part < n_sink_parts;
        const int64_t first = (sinks ? i_part : tile.begin / PART + i_part - n_sink_parts) * PART;
        const int64_t last  = std::min(first + PART, sinks ? tile.sinks : tile.end);
        run                 = find_run(first);
        n_blocks            = 0;
        for (int64_t pos = first; pos < last; pos += BLOCK) {
            score_block(pos, sinks, blocks[n_blocks++]);
        }
        weigh(first, sinks);
        std::fill_n(mem.acc, n_rows * padded(job.n_embd_v), 0.0f);
        for (int64_t i = 0; i < n_blocks; ++i) {
            add_weighted(blocks[i], i * BLOCK);
        }
    }

    // what compute_part() left for a row
    part_row write_part(int64_t row, float * dst) const {
        const part_row part = {dst, padded(job.n_embd_v)};
        for (int64_t i = 0; i < part.n; i += W) {
            // + 0: so that a zero's sign does not tell whether there were keys that the row did not see
            simd::store(dst + i, simd::add(simd::load(mem.acc + row * part.n + i), simd::set1(0.0f)));
        }
        part.max() = mem.max[row];
        part.sum() = simd::sum_of(simd::load(mem.sums + row * W));
        return part;
    }

    void finish(int64_t row, const part_row & total) const {
        const int64_t head = head_kv * n_group + row % n_group;
        if (job.sink_logits) {
            total.join_logit(job.sink_logits[head]);
        }
        const int64_t i_dst = (tile.token + row / n_group) * job.n_head + head;
        if (job.parts) {
            float * dst = job.dst + i_dst * (job.n_embd_v + 2);
            memcpy(dst, total.values, job.n_embd_v * sizeof(float));
            dst[job.n_embd_v]     = total.max();
            dst[job.n_embd_v + 1] = total.sum();
            return;
        }
        const float sum = total.sum() == 0.0f ? 1.0f : total.sum();
        for (int64_t i = 0; i < total.n; i += W) {
            simd::store(total.values + i, simd::div(simd::load(total.values + i), simd::set1(sum)));
        }
        memcpy(job.dst + i_dst * job.n_embd_v, total.values, job.n_embd_v * sizeof(float));
    }

private:
    const lminf_attention_job &    job;
    const lminf_attention_tile &   tile;
    const lminf_attention_query *  queries;
    const lminf_attention_stream & stream;
    const scratch &                mem;

    const int64_t n_sink_parts;

    int64_t run = 0;

    // positions of a block, counted from its first
    struct range {
        int64_t first;
        int64_t last;

        bool     empty() const { return first >= last; }
        uint32_t bits() const { return empty() ? 0 : (uint32_t)((1ull << last) - (1ull << first)); }
    };

    static range cut(int64_t first, int64_t last, int64_t pos) {
        return {std::clamp<int64_t>(first - pos, 0, BLOCK), std::clamp<int64_t>(last - pos, 0, BLOCK)};
    }

    // the tokens of the tile that see something of a block, and all that they see
    struct view {
        range tokens;
        range keys;

        void add(int64_t token, const range & seen) {
            if (seen.empty()) {
                return;
            }
            tokens = keys.empty() ? range{token, token + 1} : range{tokens.first, token + 1};
            keys   = keys.empty() ? seen : range{std::min(keys.first, seen.first), std::max(keys.last, seen.last)};
        }
    };

    // keys of a part that are unpacked together
    struct block {
        view     seen;
        uint32_t there; // which of them are
        int64_t  cells[BLOCK];
    };

    block   blocks[N_BLOCKS];
    int64_t n_blocks = 0;

    const float * integers = nullptr; // the vectors that are in mem.q_numbers

    int64_t find_run(int64_t pos) const {
        const auto ends_before = [](const lminf_run & x, int64_t end) { return x.pos + x.n <= end; };
        return std::lower_bound(stream.runs, stream.runs + stream.n_runs, pos, ends_before) - stream.runs;
    }

    // Cells of the window's keys from pos on, and which are there. Where there is none, another's stands in: its row is
    // unpacked again, and nobody looks at the result or gives it a weight.
    uint32_t find_cells(int64_t pos, const range & keys, int64_t * cells) {
        uint32_t there = 0;
        while (run < stream.n_runs && stream.runs[run].pos + stream.runs[run].n <= pos) {
            ++run;
        }
        for (int64_t i = run; i < stream.n_runs && stream.runs[i].pos < pos + keys.last; ++i) {
            const lminf_run & found = stream.runs[i];
            const range       part =
                cut(std::max(found.pos, pos + keys.first), std::min(found.pos + found.n, pos + keys.last), pos);
            if (!there) {
                std::fill_n(cells, BLOCK, found.cell + pos + part.first - found.pos);
            }
            for (int64_t j = part.first; j < part.last; ++j) {
                cells[j] = found.cell + pos + j - found.pos;
            }
            there |= part.bits();
        }
        return there;
    }

    // the rows of some cells
    struct found_rows {
        ggml_type    type;
        const char * rows[BLOCK];
        size_t       ahead; // by how much the next block's are ahead of them
    };

    found_rows find_rows(const lminf_rows & source, const int64_t * cells, const range & seen, int64_t n_embd) const {
        found_rows   res  = {source.type, {}, BLOCK * source.row_stride};
        const char * head = source.data + head_kv * source.head_stride;
        for (int64_t i = 0; i < BLOCK; ++i) {
            res.rows[i] = head + cells[i] * source.row_stride;
        }
        if (!is_unpacked_here(source.type)) {
            convert(res, seen, n_embd);
        }
        return res;
    }

    // by ggml, into floats
    void convert(found_rows & found, const range & seen, int64_t n_embd) const {
        const auto to_float = ggml_get_type_traits(found.type)->to_float;
        for (int64_t i = 0; i < BLOCK; ++i) {
            float * row = mem.converted + i * padded(n_embd);
            if (i < seen.first / W * W || i >= divide_up(seen.last, W) * W) {
                continue; // nobody looks at it
            }
            to_float(found.rows[i], row, n_embd);
            found.rows[i] = (const char *)row;
        }
        found.type  = GGML_TYPE_F32;
        found.ahead = 0;
    }

    const float * vector(const lminf_attention_vectors & q, int64_t row) const {
        return (const float *)((const char *)q.data + (tile.token + row / n_group) * q.token_stride +
            (head_kv * n_group + row % n_group) * q.head_stride);
    }

    integer_rows integer_queries(const lminf_attention_vectors & q) {
        const integer_rows all = {(int16_t *)mem.q_numbers, mem.q_factors, (int32_t *)mem.q_sums};
        if (integers != q.data) {
            integers = q.data;
            for (int64_t row = 0; row < n_rows; ++row) {
                to_integers(vector(q, row), job.n_embd_k, all.row(row, job.n_embd_k));
            }
        }
        return all;
    }

    void score(const lminf_rows & keys, const int64_t * cells, const lminf_attention_vectors & q, const view & seen,
        float * scores) {
        const found_rows found     = find_rows(keys, cells, seen.keys, job.n_embd_k);
        const auto &     functions = functions_of(found.type);
        const int64_t    n_embd    = job.n_embd_k;
        const int64_t    first     = seen.keys.first;
        const int64_t    last      = seen.keys.last;
        const int64_t    first_row = seen.tokens.first * n_group;
        const int64_t    last_row  = seen.tokens.last * n_group;
        if (functions.keys) {
            functions.keys(found.rows, first, last, n_embd, found.ahead, mem.k);
            for_rows(first_row, last_row, [&](auto n, int64_t row) {
                const float * vectors[n];
                for (int r = 0; r < n; ++r) {
                    vectors[r] = vector(q, row + r);
                }
                for (int64_t i = first / W * W; i < last; i += W) {
                    multiply_keys<n>(vectors, mem.k + i * padded(n_embd), n_embd, scores + row * PART + i);
                }
            });
            return;
        }
        const integer_rows all = integer_queries(q);
        functions.factors(found.rows, 0, BLOCK, n_embd, 1.0f, mem.k_factors);
        functions.key_pairs(found.rows, first, last, n_embd, found.ahead, (int32_t *)mem.k);
        for_rows(first_row, last_row, [&](auto n, int64_t row) {
            for (int64_t i = first / CHUNK * CHUNK; i < last; i += CHUNK) {
                const auto * pairs = (const int32_t *)mem.k + i / CHUNK * (n_embd / LMINF_SIMD_UNIT) * CHUNK_SIZE;
                multiply_key_pairs<n>(all.row(row, n_embd), functions.offset, pairs, mem.k_factors + i, n_embd,
                    scores + row * PART + i);
            }
        });
    }

    // finds what is seen of a block, and scores it
    void score_block(int64_t pos, bool sinks, block & found) {
        const int64_t offset   = pos % PART;
        view          seen     = {};
        view          seen_far = {};
        found.seen  = {};
        found.there = 0;
        for (int64_t token = 0; token < tile.n_tokens; ++token) {
            const auto & query = queries[token];
            found.seen.add(token, sinks ? cut(0, query.sinks, pos) : cut(query.begin, query.end, pos));
            if (sinks) {
                seen_far.add(token, cut(0, query.sinks_far, pos));
                seen.add(token, cut(query.sinks_far, query.sinks, pos));
            }
        }
        if (found.seen.keys.empty()) {
            return;
        }
        if (sinks) {
            for (int64_t i = 0; i < BLOCK; ++i) {
                found.cells[i] = std::min(pos + i, pos + found.seen.keys.last - 1);
            }
            found.there = UINT32_MAX;
            if (!seen_far.keys.empty()) {
                score(stream.far_k, found.cells, job.q_far, seen_far, mem.scores_far + offset);
            }
            if (!seen.keys.empty()) {
                score(stream.k, found.cells, job.q, seen, mem.scores + offset);
            }
            return;
        }
        found.there = find_cells(pos, found.seen.keys, found.cells);
        if (found.there) {
            score(stream.k, found.cells, job.q, found.seen, mem.scores + offset);
        }
    }

    void weigh(int64_t first, bool sinks) const {
        const bool    softcap = job.softcap != 0.0f;
        const int64_t n_clamp = std::min<int64_t>(job.n_clamp, 1 << 23);
        logit_params  params = {softcap ? job.scale / job.softcap : job.scale, job.softcap, 0.0f, 0.0f, (float)n_clamp};
        for (int64_t token = 0; token < tile.n_tokens; ++token) {
            const auto & query             = queries[token];
            uint32_t     visible[N_BLOCKS] = {};
            for (int64_t i = 0; i < n_blocks; ++i) {
                const int64_t pos  = first + i * BLOCK;
                const range   seen = sinks ? cut(0, query.sinks, pos) : cut(query.begin, query.end, pos);
                visible[i]         = seen.bits() & blocks[i].there;
            }
            const int64_t n_far = sinks ? std::clamp<int64_t>(query.sinks_far - first, 0, PART) : 0;
            params.distance     = (float)std::min(query.pos - first, n_clamp + PART);
            for (int64_t i = 0; i < n_group; ++i) {
                const int64_t row    = token * n_group + i;
                float *       scores = mem.scores + row * PART;
                params.slope         = job.slopes ? job.slopes[head_kv * n_group + i] : 0.0f;
                std::copy_n(mem.scores_far + row * PART, n_far, scores);
                mem.max[row] = soften(scores, visible, n_blocks, params, mem.sums + row * W);
            }
        }
    }

    void add_weighted(const block & from, int64_t offset) const {
        if (!from.there) {
            return;
        }
        const range &    keys      = from.seen.keys;
        const found_rows found     = find_rows(stream.v, from.cells, keys, job.n_embd_v);
        const auto &     functions = functions_of(found.type);
        const int64_t    first_row = from.seen.tokens.first * n_group;
        const int64_t    last_row  = from.seen.tokens.last * n_group;
        const int64_t    n_embd    = job.n_embd_v;
        const auto       weights   = [&](int64_t row) { return mem.scores + row * PART + offset; };
        const auto       acc       = [&](int64_t row) { return mem.acc + row * padded(n_embd); };
        if (functions.factors) {
            functions.factors(found.rows, keys.first, keys.last, n_embd, functions.scale, mem.v_factors);
        }
        const float * v_factors = functions.factors ? mem.v_factors : nullptr;
        if (last_row - first_row <= PACKED_ROWS && n_embd % LMINF_SIMD_UNIT == 0) {
            functions.add_packed(last_row - first_row, weights(first_row), found.rows, v_factors, keys.first, keys.last,
                n_embd, found.ahead, acc(first_row));
            return;
        }
        functions.values(found.rows, keys.first, keys.last, n_embd, found.ahead, mem.v);
        for_rows(first_row, last_row, [&](auto n, int64_t row) {
            add_unpacked_values<n>(weights(row), mem.v, v_factors, keys.first, keys.last, n_embd, acc(row));
        });
    }
};

} // namespace
