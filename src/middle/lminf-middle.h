// Middle tokens (section 4 of the paper): what a cache stores of every token, and the attention that recalls some of them.
//
// Ties together the store, the operations in the model's graph and the books of sequences, which the cache keeps. Everything here is in
// memory that the CPU reads. Owned by lminf_kv_cache.

#pragma once

#include "lminf-attention-op.h"
#include "lminf-layers.h"
#include "lminf-policy.h"
#include "lminf-recall.h"
#include "lminf-sequence.h"
#include "lminf-store.h"
#include "lminf.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

class  llama_io_read_i;
class  llama_io_write_i;
struct llama_context;
struct llama_model;
struct lminf_cache_group;

// Ends the creation of a context by an exception: middle tokens cannot be recalled in this model's attention.
[[noreturn]] void lminf_refuse_middle(const llama_model & model, const std::string & reason);

class lminf_middle {
public:
    // NULL if the cache stores none. Throws std::runtime_error, with the reason, if it is to and cannot.
    static std::unique_ptr<lminf_middle> make(
            const llama_model & model, const lminf_policy & policy, lminf_layers & layers, lminf_cache_group & group,
            const lminf_attention_op * attention);

    const lminf_store & get_store() const { return store; }

    //
    // a micro-batch
    //

    // Room for the rows of tokens below n_past.
    void reserve_or_throw(int64_t seq_id, int64_t n_past); // std::runtime_error
    bool reserve         (int64_t seq_id, int64_t n_past); // false, and the reason in the log

    void find_means(int64_t seq_id, const lminf_sequence & seq, llama_context & lctx); // see lminf_recall

    void begin(const std::vector<lminf_attention_op::part> & parts, lminf_recall_mode mode);

    void set_recalls(bool recalls) { this->recalls = recalls; }

    // recall does not begin or end with this micro-batch
    bool can_reuse_graph() const { return recalls == was_built; }

    //
    // its graph
    //

    void build_inputs(ggml_context * ctx, int64_t n_tokens) const;
    void set_inputs  (const std::vector<int32_t> & pos_rope) const;

    // of each token, the first position of the window that it sees where it recalls; empty if none recalls
    std::vector<int64_t> near() const;

    // What is stored of a layer is stored when the result is computed, which has the data of k_cur or v_cur.
    ggml_tensor * store_k(ggml_context * ctx, ggml_tensor * k_cur, size_t ikv) const;
    ggml_tensor * store_v(ggml_context * ctx, ggml_tensor * v_cur, size_t ikv) const;

    // the attention of a layer that recalls in this micro-batch, else NULL
    ggml_tensor * build_attn(ggml_context * ctx, size_t ikv, const lminf_attention_op::inputs & in, int32_t n_threads) const;

    //
    // between micro-batches
    //

    void release(int64_t seq_id);
    void copy(int64_t src, int64_t dst, const lminf_sequence & seq);

    // Number of rows, id of the file and, in memory, the rows; of a file, their checksum. read() throws std::runtime_error.
    void write(llama_io_write_i & io, int64_t seq_id, const lminf_sequence & seq) const;
    void read (llama_io_read_i  & io, int64_t seq_id, const lminf_sequence & seq);

    lminf_middle_stats          stats   (const lminf_sequence & seq) const;
    std::vector<lminf_recalled> recalled(int64_t seq_id, int64_t pos) const; // see lminf_recall::record()

    // see lminf_test_check_candidates(); false if there are none
    bool                  check_candidates(bool check);
    lminf_recall::checked check_result() const { return recall.check_result(); }

private:
    lminf_middle(const llama_model & model, const lminf_policy & policy, lminf_layers & layers, const lminf_cache_group & group,
            const lminf_attention_op & attention, std::vector<int32_t> store_layers, std::vector<lminf_store::layer_shape> shapes, std::vector<int64_t> n_heads);

    const llama_model &  model;
    const lminf_policy & policy;
    const lminf_layers & layers;

    const lminf_attention_op & attention;

    const std::vector<int32_t> store_layers; // [ikv] layer of the store, -1 for none

    const int32_t distance; // D
    const bool    has_candidates;

    lminf_store          store;
    mutable lminf_recall recall;

    bool recalls = false; // in the micro-batch at hand

    std::vector<int64_t> near_begin;

    // what the graph that was built last is made of
    mutable bool                       was_built = false;   // with recall
    mutable ggml_tensor *              neg_pos   = nullptr; // see lminf_layers: -position
    mutable ggml_tensor *              q_shift   = nullptr; // the same: from the query's position to its distance from recalled keys
    mutable std::vector<ggml_tensor *> stored_k; // [layer of the store]
    mutable std::vector<ggml_tensor *> stored_v;
    mutable std::vector<bool>          hooked;   // build_attn() was called
    mutable std::vector<lminf_rope>    q_ropes;

    bool is_hooked() const; // the first graph has asked for the attention of each layer that is to recall

    // the rows that a sequence has in the store: first slot, number
    std::pair<int64_t, int64_t> rows(const lminf_sequence & seq) const;
};
