// Attention over sink tokens and a window of keys, on the CPU: fast for f32, f16, bf16, q8_0 and q4_0 caches, for other types of ggml by
// its conversion into floats.
//
// Knows nothing of llama.cpp's caches: whoever calls it says which positions each query sees and in which cells they
// lie. No mask is read, and no cell that nobody sees.
//
// Same bits: a query's result depends on the query and on the visible keys in the order of their positions alone, not
// on their cells, the queries and streams beside it, or the number of threads. Keys are taken in blocks, and work is
// divided into parts, at fixed multiples of their absolute positions; parts are joined in that order.

#pragma once

#include "lminf-run.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// keys or values: head h of cell i begins at data + i*row_stride + h*head_stride (bytes)
struct lminf_rows {
    ggml_type    type;
    const char * data;
    size_t       row_stride;
    size_t       head_stride;
};

// what a query sees, besides its vector. Sink tokens lie in the cells of their positions.
struct lminf_attention_query {
    int32_t stream;    // index into the job's streams
    int64_t pos;       // for ALiBi
    int64_t sinks_far; // sink tokens [0, sinks_far): q_far with the stream's far_k
    int64_t sinks;     // sink tokens [sinks_far, sinks): q with the stream's k
    int64_t begin;     // window [begin, end): q with the stream's k, in the cells of its runs; begin >= sinks
    int64_t end;
};

struct lminf_attention_stream {
    lminf_rows        k;
    lminf_rows        v;
    lminf_rows        far_k; // row of a sink token: its position. Read only where a query has sinks_far > 0
    const lminf_run * runs;  // by position, disjoint; a position in none of them is not there
    int64_t           n_runs;
};

// F32 vectors of each head of each token; strides in bytes
struct lminf_attention_vectors {
    const float * data;
    size_t        head_stride;
    size_t        token_stride;
};

struct lminf_attention_job {
    int64_t n_embd_k;
    int64_t n_embd_v;
    int64_t n_head;
    int64_t n_head_kv;
    int64_t n_tokens;

    lminf_attention_vectors q;
    lminf_attention_vectors q_far; // NULL where no query has sinks_far > 0

    float         scale;
    float         softcap;     // 0: none
    const float * slopes;      // ALiBi, [n_head]: -slope*min(pos - key's position, n_clamp) is added. NULL: none
    int64_t       n_clamp;
    const float * sink_logits; // learned sink logits (gpt-oss), [n_head]: count in the sum. NULL: none

    const lminf_attention_query *  queries; // [n_tokens]
    const lminf_attention_stream * streams;

    // [n_embd_v, n_head, n_tokens], the softmax's mean of the values (0 where nothing is visible); or, for a caller who
    // joins them with other keys, rows of n_embd_v + 2: values not divided by the sum, largest logit, sum of
    // exponentials
    float * dst;
    bool    parts;
};

// queries of one stream that share unpacked keys
struct lminf_attention_tile {
    int64_t token;
    int64_t n_tokens;
    int64_t sinks; // the most that one of its queries sees
    int64_t begin; // the window of all of them together
    int64_t end;
    int64_t n_parts;
    int64_t first_row; // where its parts lie in the work area
};

// How the queries are cut into tiles and their keys among threads. Depends on the job's numbers of heads and sizes of
// heads and on its queries, so one plan serves all layers of a micro-batch that are alike.
struct lminf_attention_plan {
    std::vector<lminf_attention_tile> tiles;
    bool                              split       = false; // whether threads share the keys of a tile
    int64_t                           n_parts     = 0; // of all tiles
    int64_t                           n_part_rows = 0; // what they leave in the work area
    int                               n_threads   = 0;

    // keeps the memory of the vector: nothing is allocated where a plan is made again for no more tiles
    void make(const lminf_attention_job & job, int n_threads);

    // bytes that lminf_attention_compute() needs for this job or one with the same shapes
    size_t work_size(const lminf_attention_job & job) const;
};

// whether it can be used for these; others are for llama.cpp's own attention
bool lminf_attention_serves(ggml_type type_k, ggml_type type_v, int64_t n_embd_k, int64_t n_embd_v);

// bytes that suffice for every job of up to n_tokens that see up to n_keys each (the job's shapes count, not its
// queries)
size_t lminf_attention_work_size(const lminf_attention_job & job, int64_t n_tokens, int64_t n_keys, int n_threads);

// Once after the work area is allocated. After that it is always ready: whoever finishes last leaves it so, and plans
// and jobs of all shapes may use it one after the other.
void lminf_attention_work_init(void * work);

// Called by each of nth <= plan.n_threads threads, with the same arguments but ith; no barrier is needed inside, one
// is needed after it, before dst is read or the work area used again. `work` is aligned to 64 bytes.
void lminf_attention_compute(
    const lminf_attention_job & job, const lminf_attention_plan & plan, int ith, int nth, void * work);

// the instruction set that it was compiled for
const char * lminf_attention_simd();
