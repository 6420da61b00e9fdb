// Attention that recalls middle tokens: window and sink tokens as ever, and with them the few stored tokens that a query's product
// is largest with (Han et al., arXiv 2308.16137, section 4).
//
// Operations of our own in the model's graph, computed on the CPU. Three follow each other in each layer:
//   1. attend to what the query sees anyway (lminf-attention-op.h), and keep the log-sum-exp;
//   2. scan the stored keys, with bounded heaps of the best ones: all keys, or those that a first pass over sketches chose;
//   3. take the best ones into the same softmax.
// What they do depends on the micro-batch (begin()), not on the shape of the graph, so that a graph can be used again.
// Called by lminf-kv-cache-middle.cpp.

#pragma once

#include "lminf-sketch.h"
#include "lminf-store.h"

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

// One token of a micro-batch. Positions are logical.
struct lminf_recall_token {
    int64_t seq;
    int64_t pos;
    int64_t begin; // it can recall keys [begin, end), and sees none of them
    int64_t end;
    int64_t record; // where to put down what it recalls; -1: nowhere. The last ones of each sequence are recorded
};

// what a query looked up: position, weight in the softmax
struct lminf_recalled {
    int64_t pos;
    float   weight;
};

class lminf_recall {
public:
    // n_heads: query heads of each layer; n_best: per query head or, if !per_head, per KV head; n_candidates: as many keys are
    // scored exactly of those that their sketches look best for, 0: all keys are
    lminf_recall(lminf_store & store, std::vector<int64_t> n_heads, int64_t n_best, bool per_head, int64_t n_candidates);
    ~lminf_recall();

    lminf_recall(const lminf_recall &) = delete;
    lminf_recall & operator=(const lminf_recall &) = delete;

    // Before a micro-batch is computed: its tokens, one sequence after the other (all but `record`). recalls: attend() is part
    // of the graph. gated: a stored token takes part for a head only if its weight exceeds what the head
    // sees anyway, all together.
    void begin(std::vector<lminf_recall_token> tokens, bool recalls, bool gated);

    // With candidates: the keys of slots [slot, slot + n), some hundred, tell the mean of all keys if there is none yet. Sketches
    // are made from then on, and of these keys.
    void find_means(int64_t seq, int64_t slot, int64_t n);

    // Stores the rows of this micro-batch when the result is computed, which has the data of cur. Keys: F32 [n_embd, n_head,
    // n_tokens], at position 0.
    ggml_tensor * store_keys  (ggml_context * ctx, size_t layer, ggml_tensor * cur, ggml_tensor * keys);
    ggml_tensor * store_values(ggml_context * ctx, size_t layer, ggml_tensor * cur);

    // inputs of one layer's attention, as build_attn() has them
    struct inputs {
        ggml_tensor * window;   // what is seen anyway: F32 [n_embd_v + 2, n_head, n_tokens], values, largest logit, sum of exponentials
        ggml_tensor * q_far;    // F32 [n_embd, n_head, n_tokens], queries at the distance of recalled keys from position 0
        ggml_tensor * stored_k; // what store_keys() and store_values() returned
        ggml_tensor * stored_v;
        float   scale;
        float   softcap; // 0: none
        int64_t n_threads;
    };

    // F32 [n_embd_v*n_head, n_tokens]
    ggml_tensor * attend(ggml_context * ctx, size_t layer, const inputs & in);

    static constexpr size_t N_RECORDED = 16;

    // what a token looked up, if it is one of the last N_RECORDED of its sequence in the last micro-batch that recalled (pos < 0: the
    // last one): weights summed over layers and heads
    std::vector<lminf_recalled> record(int64_t seq, int64_t pos) const;

    double scan_seconds() const { return 1e-6*n_us_scan; }

    // With candidates: whether all keys are scored exactly as well, to count how many of the best ones were candidates.
    void check_candidates(bool check) { is_checked = check; }

    struct checked {
        int64_t n_best  = 0; // keys that were recalled
        int64_t n_found = 0; // and had been candidates
    };
    checked check_result() const { return { n_checked, n_found }; }

private:
    struct layer_op; // what an operation is told
    struct best;     // heaps of stored keys
    struct scan;     // a thread's share of a scan

    lminf_store & store;

    const std::vector<int64_t> n_heads;
    const int64_t              n_best;
    const bool                 per_head;
    const int64_t              n_candidates;

    std::vector<lminf_recall_token> tokens;
    bool gated      = false;
    bool is_checked = false;

    std::vector<std::unique_ptr<layer_op>> ops; // [layer]

    // [layer][recorded token][query head][n_best]
    std::vector<std::vector<lminf_recalled>> records;
    std::vector<std::pair<int64_t, int64_t>> recorded; // sequence, position

    std::atomic<int64_t> n_us_scan{0};
    std::atomic<int64_t> n_checked{0};
    std::atomic<int64_t> n_found  {0};

    static void compute_store_k(ggml_tensor * dst, int ith, int nth, void * data);
    static void compute_store_v(ggml_tensor * dst, int ith, int nth, void * data);
    static void compute_scan  (ggml_tensor * dst, int ith, int nth, void * data);
    static void compute_merge (ggml_tensor * dst, int ith, int nth, void * data);
};
