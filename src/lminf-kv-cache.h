// The memory of LM-Infinite: a KV cache that keeps the sink tokens and a local window of each sequence.
//
// Made by the hook in llama_model::create_memory() (patches/) when lminf_init_from_model() asks for it. What is visible,
// where sink tokens stand and which cell holds what is decided by lminf_policy alone; this class carries it out.
// Each sequence has a stream (a slice of the K and V tensors) of its own, laid out as [sink copies | window ring].

#pragma once

#include "lminf-policy.h"
#include "lminf-rope.h"
#include "lminf-runner.h"
#include "lminf.h"

#include "llama-kv-cache.h"

#include <memory>
#include <vector>

// The hook of create_memory(): the memory to use instead of a plain llama_kv_cache, or NULL if the context being created was
// not asked for by lminf_init_from_model(). Throws if the parameters do not fit.
llama_memory_i * lminf_create_kv_cache(
        const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
        const llama_memory_i::layer_filter_cb & filter);

class lminf_kv_cache : public llama_kv_cache {
public:
    lminf_kv_cache(
            const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
            const lminf_params & lparams, const lminf_policy & policy, const layer_filter_cb & filter);

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    // Exact or refused. Allowed: the tail, as far back as n_rollback (or everything that is still stored); the oldest part of
    // the window, [n_sink, p1); the whole sequence.
    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;

    // refused with a message in the log: nothing changes
    void seq_cp (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // refused: throws
    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    //
    // llama_kv_cache, as called while a graph is built and its inputs are set
    //

    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, int32_t il, const slot_info & sinfo) const override;
    ggml_tensor * cpy_v(ggml_context * ctx, ggml_tensor * v_cur, ggml_tensor * v_idxs, int32_t il, const slot_info & sinfo) const override;

    ggml_tensor * build_input_k_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const override;
    ggml_tensor * build_input_v_idxs(ggml_context * ctx, const llama_ubatch & ubatch) const override;

    void set_input_k_idxs (ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const override;
    void set_input_v_idxs (ggml_tensor * dst, const llama_ubatch * ubatch, const slot_info & sinfo) const override;
    void set_input_kq_mask(ggml_tensor * dst, const llama_ubatch * ubatch, bool causal_attn) const override;

    //
    // for lminf_kv_cache_context
    //

    // Makes everything ready that the queries of this micro-batch will see besides its own keys: rebases, places sink tokens.
    // Nothing that the sequence could go back to is lost. Returns false if a computation failed.
    bool begin_ubatch(const llama_ubatch & ubatch);

    // the positions are stored now (or will be, by the graph that is computed next)
    void commit_ubatch(const llama_ubatch & ubatch);

    bool captures_sinks() const { return !capture.sinks.empty(); }

    uint32_t used_cells(const llama_ubatch & ubatch) const;

    // positions as RoPE sees them; empty if they are what the micro-batch says
    std::vector<llama_pos> physical_positions(const llama_ubatch & ubatch) const;

    //
    // for lminf.cpp
    //

    const lminf_params & get_params() const { return lparams; }

    bool has_seq(llama_seq_id seq_id) const { return seq_id >= 0 && (size_t) seq_id < seqs.size(); }

    bool rope_is_supported() const;

    int64_t     n_past(llama_seq_id seq_id) const { return seqs[seq_id].n_past; }
    lminf_stats stats (llama_seq_id seq_id) const; // all but n_bytes

    // llama_pos of this sequence start again from small values; logical positions do not change
    void renumber(llama_seq_id seq_id);

    bool set_position(llama_seq_id seq_id, int64_t pos); // test hook

    size_t get_key          (llama_seq_id seq_id, int32_t il, int64_t pos, void * dst, size_t size) const;
    size_t get_sink_original(llama_seq_id seq_id, int32_t il, uint32_t j,  void * dst, size_t size) const;

private:
    // what one copy of the sink tokens holds: n_k keys placed for this shift and base, n_v values
    struct sink_copy {
        int64_t shift = 0;
        int64_t base  = 0;
        int64_t n_k   = 0;
        int64_t n_v   = 0;
    };

    struct sequence {
        int64_t n_past = 0; // logical position of the next token
        int64_t n_high = 0; // n_past has been this high: keys below n_high - n_ring are overwritten
        int64_t oldest = 0; // window keys below this were forgotten on purpose
        int64_t origin = 0; // logical position - llama_pos
        int64_t base   = 0; // logical position - physical position

        int64_t n_placements = 0;
        int64_t n_rebases    = 0;

        std::vector<sink_copy> copies;
    };

    // Sink tokens in the micro-batch at hand. Their keys exist only once its graph is being computed, so that graph also
    // keeps their un-rotated originals and makes the copies which its own queries need.
    struct sink_capture {
        struct sink      { int32_t i_token; int64_t row;  int64_t pos;  };
        struct placement { int64_t row;     int64_t cell; int64_t pos;  };
        struct value     { int32_t i_token; int64_t strm; int64_t cell; };

        std::vector<sink>      sinks;      // row: of the originals; pos: physical
        std::vector<placement> placements; // row: of the originals; cell: global; pos: physical
        std::vector<value>     values;     // copies of values besides the home

        // inputs of the graph that was built last: I32 [i_token, -pos, row, pos, value sources]
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
        ggml_tensor * pos  = nullptr; // I32 [n]
        ggml_tensor * cell = nullptr; // I64 [n]
    } inp_moves;

    const lminf_params lparams;
    const lminf_policy policy;

    const llama_context * lctx = nullptr;

    std::vector<sequence> seqs;

    mutable sink_capture            capture;
    mutable std::vector<lminf_rope> ropes; // [n_layer in the cache], as seen in the model's graph

    // per layer: F32 [n_embd_k_gqa, n_sink*n_stream], un-rotated keys of the sink tokens; and the Hadamard matrix, if any
    std::vector<ggml_tensor *> sink_k;
    std::vector<ggml_tensor *> k_rot;

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> sink_bufs;

    std::unique_ptr<lminf_runner> runner;

    void alloc_sink_originals();

    sequence new_sequence() const;

    int64_t logical(const sequence & seq, llama_pos pos) const { return seq.origin + pos; }

    // true and the number of tokens that would be left, if the removal is one of those allowed
    struct removal { bool ok; int64_t n_keep; int64_t oldest; };
    removal check_rm(const sequence & seq, llama_pos p0, llama_pos p1) const;

    int64_t global_cell(llama_seq_id seq_id, int64_t cell) const { return seq_id*policy.n_cells() + cell; }

    lminf_runner & get_runner();

    // keys from the originals (rotate) or from the cells themselves (shift) into cells
    bool place_keys(const std::vector<key_move> & moves);
    bool shift_keys(const std::vector<key_move> & moves);
    bool move_keys (const std::vector<key_move> & moves, bool from_originals, int n_threads);

    bool copy_values(llama_seq_id seq_id, int64_t copy);

    bool rebase(llama_seq_id seq_id, int64_t base);

    void capture_sinks(llama_seq_id seq_id, int64_t p0, int64_t p1, int32_t i_token);

    ggml_tensor * k_rows(ggml_context * ctx, int32_t ikv) const; // K of all streams as rows
};

class lminf_kv_cache_context : public llama_kv_cache_context {
public:
    lminf_kv_cache_context(lminf_kv_cache * kv, slot_info_vec_t sinfos, std::vector<llama_ubatch> ubatches);

    bool apply() override;

    bool can_reuse_graph() const override;

private:
    lminf_kv_cache * kv_inf;

    std::vector<llama_pos> pos_rope;
};
