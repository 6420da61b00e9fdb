// Sink tokens: their originals, which never change, and the copies of them that queries see (section 4 of the paper, "distance limit").
//
// A micro-batch that holds sink tokens captures them: its own graph keeps their keys at position 0, in F32, and makes the copies that its
// own queries need. For every later one the missing copies are planned, made by lminf_mover, and committed. Which copies are
// needed is decided by lminf_policy::plan_placements(), for both. Owned by lminf_kv_cache.

#pragma once

#include "lminf-layers.h"
#include "lminf-mover.h"
#include "lminf-policy.h"
#include "lminf-sequence.h"

#include "ggml-backend.h"

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

class lminf_sinks {
public:
    // no_alloc: sizes are counted, nothing is allocated. Throws std::runtime_error if there is no room.
    lminf_sinks(const lminf_policy & policy, const lminf_layers & layers, bool no_alloc);

    // of each layer, F32 [n_embd_k*n_head_kv, n_sink*n_stream] at position 0; NULL if there are no sink tokens
    const std::vector<ggml_tensor *> & originals() const { return tensors; }

    void add_memory(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const;

    // of one sequence: first byte, number of bytes
    std::pair<size_t, size_t> slice(const ggml_tensor * original, int64_t seq_id) const;

    //
    // copies for a micro-batch of sink tokens that are stored already
    //

    struct plan {
        std::vector<lminf_key_move>   keys;
        std::vector<lminf_value_move> values;

        // what the copies of a sequence hold when that is done
        struct result { lminf_sequence * seq; int64_t copy; lminf_sequence::sink_copy holds; };
        std::vector<result> results;

        void commit() const; // the copies are there
        void forget() const; // a part of them may be there: all are made again before they are used
    };

    // adds what queries [p0, p1] of a sequence need, whose base will be this
    void add_to(plan & plan, int64_t seq_id, lminf_sequence & seq, int64_t p0, int64_t p1, int64_t base) const;

    //
    // sink tokens in the micro-batch at hand
    //

    void begin_capture();
    void capture(int64_t seq_id, lminf_sequence & seq, int64_t p0, int64_t p1, int32_t i_token); // i_token: of p0
    void capture_most(); // as much as any graph can hold, to reserve it

    bool   is_capturing() const { return !sinks.empty(); }
    size_t n_values() const { return values.size(); }

    // Inputs of a graph that captures: k_idxs as cpy_k() takes it, [cells of the tokens, rows of the originals, cells of the placements]
    ggml_tensor * build_k_idxs(ggml_context * ctx, int64_t n_tokens) const;
    void          set_k_idxs  (ggml_tensor * k_idxs, int64_t n_tokens) const;
    void          set_v_idxs  (ggml_tensor * v_idxs, int64_t n_tokens, int64_t n_embd_v) const; // n_embd_v: 1 if values are not transposed

    // Stores the micro-batch's keys after what capturing adds; appends the values that copies take to the micro-batch's.
    ggml_tensor * cpy_k(ggml_context * ctx, ggml_tensor * k_cur, ggml_tensor * k_idxs, size_t ikv) const;
    ggml_tensor * add_values(ggml_context * ctx, ggml_tensor * v_cur, size_t ikv) const;

private:
    const lminf_policy & policy;
    const lminf_layers & layers;
    const bool           no_alloc;

    std::vector<ggml_tensor *> tensors;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> buffers;

    struct captured  { int32_t i_token; int64_t row;  int64_t pos;  }; // row: of the originals; pos: physical
    struct placement { int64_t row;     int64_t cell; int64_t pos;  }; // cell: over all streams
    struct value     { int32_t i_token; int64_t strm; int64_t cell; };

    std::vector<captured>  sinks;
    std::vector<placement> placements;
    std::vector<value>     values; // of copies besides the home

    // inputs of the graph that was built last
    mutable ggml_tensor * ids           = nullptr; // I32 [tokens, rows of the originals, sources of values]
    mutable ggml_tensor * pos_back      = nullptr; // see lminf_layers: -position of each sink token
    mutable ggml_tensor * pos_placement = nullptr;

    int64_t global_cell(int64_t seq_id, int64_t cell) const { return seq_id*policy.n_cells() + cell; }
};
