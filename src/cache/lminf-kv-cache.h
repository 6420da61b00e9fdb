// The memory of LM-Infinite: a KV cache that keeps the sink tokens and a local window of each sequence.
//
// Made by lminf_make_kv_cache() (lminf-hooks.h), which the patch calls wherever llama.cpp makes the KV cache of a model's layers:
// alone, as the two halves of a sliding-window model's cache, or beside the recurrent states of a hybrid model. What is
// visible, where sink tokens stand and when a cell is free is decided by lminf_policy; lminf_sequence keeps the books; this
// class moves the data. Each sequence has a stream (a slice of the K and V tensors) of its own: [sink copies | window ring].

#pragma once

#include "lminf-policy.h"
#include "lminf-recall.h"
#include "lminf-rope.h"
#include "lminf-runner.h"
#include "lminf-sequence.h"
#include "lminf-store.h"
#include "lminf.h"

#include "llama-kv-cache.h"

#include <memory>
#include <string>
#include <vector>

class lminf_kv_cache;

// The caches of one context. They store the same tokens, and allow or refuse a removal together.
struct lminf_cache_group {
    lminf_cache_group(const lminf_params & params, uint32_t n_ubatch) :
        params(params), store_path(params.middle.path ? params.middle.path : ""), n_ubatch(n_ubatch) {}

    const lminf_params params; // resolved; middle.path may be gone
    const std::string  store_path;
    const uint32_t     n_ubatch;

    lminf_recall_mode recall = LMINF_RECALL_OFF; // of the tokens that are decoded from now on

    std::vector<lminf_kv_cache *> caches; // in the order in which llama.cpp made them: that of the full-attention layers first
};

// In its lifetime, the caches that are made on this thread belong to this group. Otherwise they are llama.cpp's own.
class lminf_cache_group_scope {
public:
    explicit lminf_cache_group_scope(std::shared_ptr<lminf_cache_group> group);
    ~lminf_cache_group_scope();

    lminf_cache_group_scope(const lminf_cache_group_scope &) = delete;
    lminf_cache_group_scope & operator=(const lminf_cache_group_scope &) = delete;
};

// Ends the creation of a context by an exception: something happens to a key after RoPE, as its first graph shows.
[[noreturn]] void lminf_refuse_rope(const llama_model & model);

// The same: middle tokens cannot be recalled in this model's attention.
[[noreturn]] void lminf_refuse_middle(const llama_model & model, const std::string & reason);

class lminf_kv_cache : public llama_kv_cache {
public:
    // the parameters are those of llama_kv_cache
    lminf_kv_cache(
            std::shared_ptr<lminf_cache_group> group, const lminf_policy & policy,
            const llama_model & model, const llama_hparams & hparams, ggml_type type_k, ggml_type type_v, bool v_trans,
            bool offload, bool unified, uint32_t n_seq_max, uint32_t n_swa, llama_swa_type swa_type,
            const layer_filter_cb & filter, const layer_reuse_cb & reuse);

    ~lminf_kv_cache() override;

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    // Exact or refused. Allowed: the tail, as far back as n_rollback (or everything that is still stored); the oldest part of
    // the window, [n_sink, p1); the whole sequence.
    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;

    // a whole sequence, or one cut where a removal is allowed; anything else is refused as below
    void seq_cp (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;

    // refused with a message in the log: nothing changes
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // All that a sequence needs to go on bit for bit, in cells as they are. state_read() throws if the state was saved by a
    // context with other parameters, and for a damaged one; what it had begun to overwrite is then empty.
    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    //
    // llama_kv_cache, as called for each micro-batch
    //

    // the cells of all micro-batches of a batch; empty if they do not continue their sequences
    slot_info_vec_t prepare(const std::vector<llama_ubatch> & ubatches) override;

    // Makes everything ready that the queries of this micro-batch will see besides its own keys: rebases, places sink tokens.
    // Nothing that the sequence could go back to is lost. Returns false if a computation failed.
    bool begin_ubatch(const llama_ubatch & ubatch) override;

    // the positions are stored now (or will be, by the graph that is computed next)
    void apply_ubatch(const slot_info & sinfo, const llama_ubatch & ubatch) override;

    uint32_t get_n_kv(const slot_info & sinfo) const override;

    // not while sink tokens are captured, or when recall begins or ends
    bool can_reuse_graph() const override { return capture.sinks.empty() && (!middle || middle->recalls == middle->was_built); }

    //
    // llama_kv_cache, as called while a graph is built and its inputs are set
    //

    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il, const slot_info & sinfo) const override;
    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il, const slot_info & sinfo) const override;

    // the attention of a layer that recalls middle tokens in this micro-batch, else NULL
    ggml_tensor * build_attn(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
            ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int32_t il) const override;

    ggml_tensor * build_input_k_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const override;
    ggml_tensor * build_input_v_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const override;

    void set_input_k_idxs (ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const override;
    void set_input_v_idxs (ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const override;
    void set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const override;

    //
    // for lminf.cpp
    //

    const lminf_cache_group & get_group() const { return *group; }

    bool has_seq(llama_seq_id seq_id) const { return seq_id >= 0 && (size_t) seq_id < seqs.size(); }

    int64_t     n_past(llama_seq_id seq_id) const { return seqs[seq_id].n_past; }
    lminf_stats stats (llama_seq_id seq_id) const; // all but n_bytes

    lminf_middle_stats          middle_stats(llama_seq_id seq_id) const;
    std::vector<lminf_recalled> recalled    (llama_seq_id seq_id) const; // see lminf_recall::record()

    // see lminf_test_check_candidates()
    bool                  check_candidates(bool check);
    lminf_recall::checked check_result() const;

    // the model's graph asks this cache for the attention of each layer that is to recall
    bool has_recall_hooks() const;

    void set_recall(lminf_recall_mode mode) { group->recall = mode; }

    // true if llama_pos of this sequence got large and starts again from a smaller value; logical positions do not change
    bool renumber(llama_seq_id seq_id);

    bool can_set_position(llama_seq_id seq_id, int64_t pos) const;
    void set_position    (llama_seq_id seq_id, int64_t pos); // test hook

    size_t get_key          (llama_seq_id seq_id, int32_t il, int64_t pos, void * dst, size_t size) const;
    size_t get_sink_original(llama_seq_id seq_id, int32_t il, uint32_t j,  void * dst, size_t size) const;

private:
    // Sink tokens in the micro-batch at hand. Their keys exist only once its graph is being computed, so that graph also
    // keeps their un-rotated originals and makes the copies which its own queries need.
    struct sink_capture {
        struct sink      { int32_t i_token; int64_t row;  int64_t pos;  };
        struct placement { int64_t row;     int64_t cell; int64_t pos;  };
        struct value     { int32_t i_token; int64_t strm; int64_t cell; };

        std::vector<sink>      sinks;      // row: of the originals; pos: physical
        std::vector<placement> placements; // row: of the originals; cell: global; pos: physical
        std::vector<value>     values;     // copies of values besides the home

        // inputs of the graph that was built last: I32 [i_token, row, -pos, pos, value sources]; see rope_positions()
        ggml_tensor * ids = nullptr;
    };

    // one key to write: row of the source, global cell, physical position or shift
    struct key_move {
        int64_t src;
        int64_t cell;
        int64_t pos;
    };

    // inputs of the graph that moved keys last
    struct {
        ggml_tensor * src  = nullptr; // I32 [n]
        ggml_tensor * pos  = nullptr; // I32 [n*n_pos_per_embd], see rope_positions()
        ggml_tensor * cell = nullptr; // I64 [n]
    } inp_moves;

    // Middle tokens: stored by every graph, recalled by some.
    struct middle_tokens {
        middle_tokens(std::vector<lminf_store::layer_shape> shapes, std::vector<int64_t> n_heads, const lminf_cache_group & group,
                int64_t n_slots, int64_t n_seqs);

        lminf_store  store;
        lminf_recall recall;

        bool recalls = false; // in the micro-batch at hand

        // what the graph that was built last is made of
        bool                       was_built = false; // with recall
        ggml_tensor *              neg_pos   = nullptr; // I32, see rope_positions(): -position
        ggml_tensor *              q_shift   = nullptr; // the same: from the query's position to its distance from recalled keys
        std::vector<ggml_tensor *> stored_k; // [layer of the store]
        std::vector<ggml_tensor *> stored_v;
        std::vector<bool>          is_hooked; // build_attn() was called
        std::vector<lminf_rope>    q_ropes;
    };
    std::unique_ptr<middle_tokens> middle; // NULL if none are stored

    std::vector<int32_t> middle_layers; // [ikv] layer of the store, -1 for none

    uint64_t store_size = 0; // when it is full; also in a context without memory, which has no store

    void make_middle();
    bool reserve_middle(llama_seq_id seq_id, int64_t n_past); // room for the rows of tokens below n_past
    void begin_middle(const llama_ubatch & ubatch);
    void find_means(llama_seq_id seq_id); // see lminf_recall

    ggml_tensor * store_k(ggml_context * ctx, ggml_tensor * k_cur, int32_t ikv) const;
    ggml_tensor * store_v(ggml_context * ctx, ggml_tensor * v_cur, int32_t ikv) const;

    void build_middle_inputs(ggml_context * ctx, const llama_ubatch & ubatch) const;
    void set_middle_inputs(const llama_ubatch & ubatch) const;

    void write_middle(llama_io_write_i & io, llama_seq_id seq_id) const;
    void read_middle (llama_io_read_i  & io, llama_seq_id seq_id, const lminf_sequence & seq);

    // the rows that a sequence has in the store: first slot, number
    std::pair<int64_t, int64_t> middle_rows(const lminf_sequence & seq) const;

    // the sequence is empty from now on
    void reset_sequence(llama_seq_id seq_id);

    const std::shared_ptr<lminf_cache_group> group;

    const lminf_policy policy;

    llama_context * lctx = nullptr;

    std::vector<lminf_sequence> seqs;

    mutable sink_capture            capture;
    mutable std::vector<lminf_rope> ropes; // [n_layer in the cache], as seen in the model's graph

    // per layer: F32 [n_embd_k_gqa, n_sink*n_stream], un-rotated keys of the sink tokens; and the Hadamard matrix, if any
    std::vector<ggml_tensor *> sink_k;
    std::vector<ggml_tensor *> k_rot;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> sink_bufs;

    std::unique_ptr<lminf_runner> runner;

    void alloc_sink_originals();

    std::vector<std::pair<const char *, int64_t>> state_parameters() const;

    // before a single token is stored: see lminf_sequence::compact()
    void compact(llama_seq_id seq_id);

    // the parts of the cache that belong to a sequence of which n_used cells are in use: f(tensor, offset, size)
    template <typename F>
    void for_each_slice(llama_seq_id seq_id, int64_t n_used, F && f) const;

    int64_t logical(const lminf_sequence & seq, llama_pos pos) const { return seq.origin + pos; }

    // the logical positions [j0, j1) that llama.cpp calls [p0, p1), where negative means "to the end"
    std::pair<int64_t, int64_t> logical_range(const lminf_sequence & seq, llama_pos p0, llama_pos p1) const;

    // all caches of the group
    bool can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // first token, number of tokens and sequence of each part of a micro-batch
    struct ubatch_part { uint32_t i0; uint32_t n; llama_seq_id seq_id; };
    std::vector<ubatch_part> parts(const llama_ubatch & ubatch) const;

    int64_t global_cell(llama_seq_id seq_id, int64_t cell) const { return seq_id*policy.n_cells() + cell; }

    lminf_runner & get_runner();

    // keys from the originals (rotate) or from the cells themselves (shift) into cells
    bool place_keys(const std::vector<key_move> & moves);
    bool shift_keys(const std::vector<key_move> & moves);
    bool move_keys (const std::vector<key_move> & moves, bool from_originals, int n_threads);

    bool copy_values(llama_seq_id seq_id, int64_t copy);

    bool rebase(llama_seq_id seq_id, int64_t base);

    void capture_sinks(llama_seq_id seq_id, int64_t p0, int64_t p1, int32_t i_token);

    // positions of single tokens as the model's RoPE takes them: M-RoPE has four for each, of which text uses three
    std::vector<int32_t> rope_positions(const std::vector<int32_t> & pos) const;

    // the matrix that the keys of a layer are rotated with before they are stored, or NULL
    ggml_tensor * hadamard(int32_t ikv) const { return ropes[ikv].is_hadamard_rotated ? k_rot[ikv] : nullptr; }

    ggml_tensor * k_rows(ggml_context * ctx, int32_t ikv) const; // K of all streams as rows
};
