#include "lminf-attention.h"

#include "lminf-attention-tile.h"

#include <atomic>
#include <new>

namespace {

constexpr int64_t MAX_UNITS = 512;      // tiles and heads whose keys threads share
constexpr size_t  MAX_BYTES = 32 << 20; // of their parts
constexpr size_t  FEW_BYTES = 256 << 10;
constexpr size_t  ALIGNMENT = 64;

constexpr int64_t MIN_TILE_ROWS    = 32;
constexpr int64_t UNITS_PER_THREAD = 4;

// adds a query to a tile unless it is of another stream or far from the others
bool add_query(const lminf_attention_job & job, int64_t token, lminf_attention_tile & tile) {
    const auto & query  = job.queries[token];
    const bool   window = query.begin < query.end;
    if (tile.n_tokens > 0 && query.stream != job.queries[tile.token].stream) {
        return false;
    }
    if (window && tile.begin < tile.end) {
        if (query.begin > tile.end || query.end < tile.begin) {
            return false;
        }
        tile.begin = std::min(tile.begin, query.begin);
        tile.end   = std::max(tile.end, query.end);
    } else if (window) {
        tile.begin = query.begin;
        tile.end   = query.end;
    }
    tile.sinks = std::max(tile.sinks, query.sinks);
    tile.n_tokens++;
    return true;
}

struct work_counters {
    std::atomic<int32_t> next_unit;
    std::atomic<int32_t> n_left; // threads that have nothing more to do
    char                 padding[ALIGNMENT - 2 * sizeof(std::atomic<int32_t>)];
    std::atomic<int32_t> n_done[MAX_UNITS]; // parts, of each tile and head
};

static_assert(sizeof(work_counters) % ALIGNMENT == 0, "parts follow");

// the work area: counters, then parts, then each thread's own
struct work_area {
    char *  data;
    int64_t part_size; // floats of a row
    size_t  bytes_of_parts;
    size_t  bytes_of_thread;

    work_area(const lminf_attention_job & job, int64_t n_part_rows, void * work) :
        data((char *)work),
        part_size(part_row::size(job.n_embd_v)),
        bytes_of_parts(sizeof(float) * padded(n_part_rows * part_size)),
        bytes_of_thread(sizeof(float) * scratch().divide(nullptr, job.n_embd_k, job.n_embd_v, max_tile_rows(job))) {}

    work_counters & counters() const { return *(work_counters *)data; }

    float * part(int64_t row) const { return (float *)(data + sizeof(work_counters)) + row * part_size; }

    float * thread(int ith) const {
        return (float *)(data + sizeof(work_counters) + bytes_of_parts + ith * bytes_of_thread);
    }

    size_t size(int n_threads) const { return sizeof(work_counters) + bytes_of_parts + n_threads * bytes_of_thread; }
};

// one thread's share of a job
class job_worker {
public:
    job_worker(const lminf_attention_job & job_, const lminf_attention_plan & plan_, int ith, void * work) :
        job(job_),
        plan(plan_),
        area(job, plan.n_part_rows, work) {
        mem.divide(area.thread(ith), job.n_embd_k, job.n_embd_v, max_tile_rows(job));
    }

    int64_t n_units() const { return (plan.split ? plan.n_parts : (int64_t)plan.tiles.size()) * job.n_head_kv; }

    // all parts of a tile, joined one after the other
    void compute_tile(int64_t unit) {
        const auto & tile = plan.tiles[unit / job.n_head_kv];
        tile_worker  worker(job, tile, unit % job.n_head_kv, mem);
        for (int64_t row = 0; row < worker.n_rows; ++row) {
            total(row).clear();
        }
        for (int64_t i = 0; i < tile.n_parts; ++i) {
            worker.compute_part(i);
            for (int64_t row = 0; row < worker.n_rows; ++row) {
                total(row).join(worker.write_part(row, mem.part));
            }
        }
        for (int64_t row = 0; row < worker.n_rows; ++row) {
            worker.finish(row, total(row));
        }
    }

    // one part of a tile; whoever computed the last one joins them, in their order
    void compute_part(int64_t unit) {
        const int64_t head_kv = unit % job.n_head_kv;
        int64_t       i_part  = unit / job.n_head_kv;
        size_t        i_tile  = 0;
        while (i_part >= plan.tiles[i_tile].n_parts) {
            i_part -= plan.tiles[i_tile++].n_parts;
        }
        const auto & tile = plan.tiles[i_tile];
        tile_worker  worker(job, tile, head_kv, mem);

        const auto part = [&](int64_t i, int64_t row) {
            return area.part(tile.first_row + ((i * job.n_head_kv + head_kv) * worker.n_rows + row));
        };
        worker.compute_part(i_part);
        for (int64_t row = 0; row < worker.n_rows; ++row) {
            worker.write_part(row, part(i_part, row));
        }
        auto & n_done = area.counters().n_done[i_tile * job.n_head_kv + head_kv];
        if (n_done.fetch_add(1, std::memory_order_acq_rel) + 1 < tile.n_parts) {
            return;
        }
        n_done.store(0, std::memory_order_relaxed);
        for (int64_t row = 0; row < worker.n_rows; ++row) {
            total(row).clear();
            for (int64_t i = 0; i < tile.n_parts; ++i) {
                total(row).join({part(i, row), padded(job.n_embd_v)});
            }
            worker.finish(row, total(row));
        }
    }

private:
    const lminf_attention_job &  job;
    const lminf_attention_plan & plan;
    const work_area              area;
    scratch                      mem;

    part_row total(int64_t row) const { return {mem.total + row * area.part_size, padded(job.n_embd_v)}; }
};

} // namespace

void lminf_attention_plan::make(const lminf_attention_job & job, int n) {
    n_threads = n;

    // few queries: smaller tiles, down to where unpacking would cost, and after that shared keys, give threads enough
    // to do
    const int64_t n_group    = job.n_head / job.n_head_kv;
    const int64_t n_wanted   = UNITS_PER_THREAD * n_threads;
    int64_t       max_tokens = max_tile_rows(job) / n_group;
    while (n_threads > 1 && max_tokens * n_group >= 2 * MIN_TILE_ROWS &&
        divide_up(job.n_tokens, max_tokens) * job.n_head_kv < n_wanted) {
        max_tokens = divide_up(max_tokens, 2);
    }
    tiles.clear();
    n_parts     = 0;
    n_part_rows = 0;
    for (int64_t token = 0; token < job.n_tokens; ++token) {
        if (tiles.empty() || tiles.back().n_tokens == max_tokens || !add_query(job, token, tiles.back())) {
            tiles.push_back({token, 0, 0, 0, 0, 0, 0});
            add_query(job, token, tiles.back());
        }
    }
    for (auto & tile : tiles) {
        tile.n_parts =
            divide_up(tile.sinks, PART) + (tile.begin < tile.end ? (tile.end - 1) / PART - tile.begin / PART + 1 : 0);
        tile.n_parts   = std::max<int64_t>(tile.n_parts, 1); // somebody has to write its results
        tile.first_row = n_part_rows;
        n_parts += tile.n_parts;
        n_part_rows += tile.n_parts * tile.n_tokens * job.n_head;
    }
    // where parts are few, they cost nothing, and heads that lie side by side in memory are read together
    const int64_t n_units = (int64_t)tiles.size() * job.n_head_kv;
    const size_t  n_bytes = n_part_rows * part_row::size(job.n_embd_v) * sizeof(float);
    split       = n_units <= MAX_UNITS && (n_bytes <= FEW_BYTES || (n_units < n_wanted && n_bytes <= MAX_BYTES));
    n_part_rows = split ? n_part_rows : 0;
}

size_t lminf_attention_plan::work_size(const lminf_attention_job & job) const {
    return work_area(job, n_part_rows, nullptr).size(n_threads);
}

size_t lminf_attention_work_size(const lminf_attention_job & job, int64_t n_tokens, int64_t n_keys, int n_threads) {
    // the queries of a tile see no more than two windows, and those begin and end somewhere in a part
    const int64_t n_parts = 2 * divide_up(n_keys, PART) + 3;
    const int64_t n_rows = std::min(n_tokens * job.n_head, UNITS_PER_THREAD * n_threads * max_tile_rows(job)) * n_parts;
    const int64_t row_size = part_row::size(job.n_embd_v) * sizeof(float);
    return work_area(job, std::clamp<int64_t>(n_rows, FEW_BYTES / row_size, MAX_BYTES / row_size), nullptr)
        .size(n_threads);
}

bool lminf_attention_serves(ggml_type type_k, ggml_type type_v, int64_t n_embd_k, int64_t n_embd_v) {
    const auto serves = [](ggml_type type, int64_t n_embd) {
        return n_embd > 0 && n_embd % std::max<int64_t>(8, ggml_blck_size(type)) == 0 &&
            (is_unpacked_here(type) || ggml_get_type_traits(type)->to_float);
    };
    return serves(type_k, n_embd_k) && serves(type_v, n_embd_v);
}

void lminf_attention_work_init(void * work) {
    auto & counters = *new (work) work_counters;
    counters.next_unit.store(0);
    counters.n_left.store(0);
    for (auto & n_done : counters.n_done) {
        n_done.store(0);
    }
}

void lminf_attention_compute(
    const lminf_attention_job & job, const lminf_attention_plan & plan, int ith, int nth, void * work) {
    auto &     counters = *(work_counters *)work;
    job_worker worker(job, plan, ith, work);
    for (;;) {
        const int64_t unit = counters.next_unit.fetch_add(1, std::memory_order_relaxed);
        if (unit >= worker.n_units()) {
            break;
        }
        if (plan.split) {
            worker.compute_part(unit);
        } else {
            worker.compute_tile(unit);
        }
    }
    // nobody takes a unit any more when all have come here
    if (counters.n_left.fetch_add(1, std::memory_order_acq_rel) + 1 == nth) {
        counters.next_unit.store(0, std::memory_order_relaxed);
        counters.n_left.store(0, std::memory_order_relaxed);
    }
}

const char * lminf_attention_simd() {
    return simd::NAME;
}
