// The memory of LM-Infinite: a KV cache that keeps the sink tokens and a local window of each sequence.
//
// Made by lminf_make_kv_cache() (lminf-hooks.h), which the patch calls wherever llama.cpp makes the KV cache of a model's layers:
// alone, as the two halves of a sliding-window model's cache, or beside the recurrent states of a hybrid model. What is
// visible, where sink tokens stand and when a cell is free is decided by lminf_policy; lminf_sequence keeps the books; sink tokens
// and middle tokens have owners of their own; this class stores, masks and keeps the three together. Each sequence has a stream (a
// slice of the K and V tensors) of its own: [sink copies | window ring].

#pragma once

#include "lminf-layers.h"
#include "lminf-policy.h"
#include "lminf-sequence.h"
#include "lminf.h"

#include "llama-kv-cache.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

class lminf_attention_op;
class lminf_kv_cache;
class lminf_middle;
class lminf_mover;
class lminf_sinks;

// The caches of one context. They store the same tokens, and allow or refuse a removal together.
struct lminf_cache_group {
    lminf_cache_group(const lminf_params & params, uint32_t n_ubatch, uint32_t n_seq_max, llama_context & lctx) :
        params(params), store_path(params.middle.path ? params.middle.path : ""), n_ubatch(n_ubatch), lctx(lctx), damaged(n_seq_max) {}

    const lminf_params params; // resolved; middle.path may be gone
    const std::string  store_path;
    const uint32_t     n_ubatch;
    llama_context &    lctx;

    // Attention of our own takes the place of llama.cpp's in all layers, or, for this reason, in none.
    std::string why_stock;
    bool has_own_attention() const { return why_stock.empty(); }
    std::string attention; // the same for people

    lminf_recall_mode recall = LMINF_RECALL_OFF; // of the tokens that are decoded from now on

    std::vector<lminf_kv_cache *> caches; // in the order in which llama.cpp made them: that of the full-attention layers first

    uint64_t store_size = 0; // of middle tokens, when it is full; also in a context without memory, which has no store

    // Of each sequence: a computation that changes keys in place failed halfway. It takes no more tokens until it is empty again.
    std::vector<bool> damaged;
};

// In its lifetime, the caches that are made on this thread belong to this group. Otherwise they are llama.cpp's own.
class lminf_cache_group_scope {
public:
    explicit lminf_cache_group_scope(std::shared_ptr<lminf_cache_group> group);
    ~lminf_cache_group_scope();

    lminf_cache_group_scope(const lminf_cache_group_scope &) = delete;
    lminf_cache_group_scope & operator=(const lminf_cache_group_scope &) = delete;

    static std::shared_ptr<lminf_cache_group> current(); // NULL outside of any
};

// Ends the creation of a context by an exception: something happens to a key after RoPE, as its first graph shows.
[[noreturn]] void lminf_refuse_rope(const llama_model & model);

class lminf_kv_cache : public llama_kv_cache {
public:
    // behind the first two, what llama_kv_cache's constructor takes, with policy.n_cells() cells
    template <typename... Base>
    lminf_kv_cache(std::shared_ptr<lminf_cache_group> group, const lminf_policy & policy, Base &&... base) :
        llama_kv_cache(std::forward<Base>(base)...), group(std::move(group)), policy(policy) {
        init();
    }

    ~lminf_kv_cache() override;

    static lminf_policy make_policy(
            const lminf_cache_group & group, const llama_hparams & hparams, uint32_t n_swa, llama_swa_type swa_type);

    //
    // llama_memory_i. lminf_memory asks before it changes anything: what is refused here was refused there
    //

    llama_memory_context_ptr init_full() override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // Books, cells as they are, originals, middle tokens. state_read() throws for a damaged state; what it had begun to overwrite is
    // then unknown, and lminf_memory empties it.
    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    // what has to be the same when a state is read
    std::vector<std::pair<std::string, int64_t>> state_parameters() const;

    //
    // llama_kv_cache, as called for each micro-batch
    //

    // the cells of all micro-batches of a batch; empty if they do not continue their sequences
    slot_info_vec_t prepare(const std::vector<llama_ubatch> & ubatches) override;

    // Makes everything ready that the queries of this micro-batch will see besides its own keys: rebases, places sink tokens.
    // Nothing that the sequence could go back to is lost. Returns false if a computation failed: the sequences are as before then,
    // or damaged, if it was a rebase.
    bool begin_ubatch(const llama_ubatch & ubatch) override;

    // the positions are stored now (or will be, by the graph that is computed next)
    void apply_ubatch(const slot_info & sinfo, const llama_ubatch & ubatch) override;

    uint32_t get_n_kv(const slot_info & sinfo) const override;

    // not while sink tokens are captured, or when recall, or the clamp, begins or ends
    bool can_reuse_graph() const override;

    //
    // llama_kv_cache, as called while a graph is built and its inputs are set
    //

    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il, const slot_info & sinfo) const override;
    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il, const slot_info & sinfo) const override;

    // attention of our own, with middle tokens where a layer recalls, or NULL for llama.cpp's
    ggml_tensor * build_attn(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
            ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int32_t il) const override;

    ggml_tensor * build_input_k_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const override;
    ggml_tensor * build_input_v_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const override;

    void set_input_k_idxs (ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const override;
    void set_input_v_idxs (ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const override;
    void set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const override;

    //
    // for lminf_memory and the C API
    //

    bool has_seq(llama_seq_id seq_id) const { return seq_id >= 0 && (size_t) seq_id < seqs.size(); }

    const lminf_policy & get_policy() const { return policy; }

    const lminf_sequence & sequence(llama_seq_id seq_id) const { return seqs[seq_id]; }

    // the logical positions [j0, j1) that llama.cpp calls [p0, p1), where negative means "to the end"
    std::pair<int64_t, int64_t> logical_range(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    bool can_remove(llama_seq_id seq_id, int64_t j0, int64_t j1) const { return seqs[seq_id].can_remove(j0, j1); }
    void remove    (llama_seq_id seq_id, int64_t j0, int64_t j1); // after can_remove()

    // Makes room for a copy of the first n tokens. Throws std::runtime_error if there is none; nothing was changed then.
    void reserve_copy(llama_seq_id dst, int64_t n) const;
    void copy        (llama_seq_id src, llama_seq_id dst, int64_t n);

    lminf_stats stats(llama_seq_id seq_id) const; // all but n_bytes

    lminf_middle * get_middle() const { return middle.get(); } // NULL if no tokens are stored

    // keys are Hadamard-rotated before they are stored
    bool is_hadamard_rotated() const { return attn_rot_k; }

    // true if llama_pos of this sequence got large and starts again from a smaller value; logical positions do not change
    bool renumber(llama_seq_id seq_id);

    // test hooks
    bool   can_set_position (llama_seq_id seq_id, int64_t pos) const;
    void   set_position     (llama_seq_id seq_id, int64_t pos);
    size_t get_key          (llama_seq_id seq_id, int32_t il, int64_t pos, void * dst, size_t size) const;
    size_t get_sink_original(llama_seq_id seq_id, int32_t il, uint32_t j,  void * dst, size_t size) const;

private:
    const std::shared_ptr<lminf_cache_group> group;

    const lminf_policy policy;

    std::vector<lminf_sequence> seqs;

    mutable lminf_layers kv; // ropes become known as the model's first graph is built

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> k_rot_bufs;

    // owned; as shared pointers, which need not know the types to delete them, since llama.cpp's files see this class
    std::shared_ptr<lminf_sinks>        sinks;
    std::shared_ptr<lminf_attention_op> attention; // NULL: llama.cpp's
    std::shared_ptr<lminf_middle>       middle;    // NULL: nothing is stored
    std::shared_ptr<lminf_mover>        mover;

    void init();
    void init_layers();

    bool make_ready(const llama_ubatch & ubatch); // begin_ubatch(), but throws where there is no memory

    // the first cache of the group decides when to rebase, since a model has one position input
    int64_t next_base(llama_seq_id seq_id, int64_t p0, int64_t p1) const;

    int32_t n_threads() const; // the most that compute a graph

    // the sequence is empty from now on
    void reset_sequence(llama_seq_id seq_id);

    // before single tokens are stored: see lminf_sequence::compact()
    void compact(llama_seq_id seq_id);

    // the parts of the cache that belong to a sequence of which n_used cells are in use: f(tensor, offset, size)
    template <typename F>
    void for_each_slice(llama_seq_id seq_id, int64_t n_used, F && f) const;

    // first token, number of tokens and sequence of each part of a micro-batch
    struct ubatch_part { uint32_t i0; uint32_t n; llama_seq_id seq_id; };
    std::vector<ubatch_part> parts(const llama_ubatch & ubatch) const;

    int64_t global_cell(llama_seq_id seq_id, int64_t cell) const { return seq_id*policy.n_cells() + cell; }
};
