// The attention of a cache's layers, as operations in the model's graph: what lminf-attention.h computes, told by policy and books what each
// query sees. No mask is filled for it.
//
// Sink tokens that are far stand nowhere else than when they were read: the query is rotated instead, once for all of them, to the distance
// that it is to see them at. So they need no copies, however many there are.
// Owned by lminf_kv_cache, which uses it for all of its layers or for none (why_not()); lminf_middle joins recalled keys to it.

#pragma once

#include "lminf-attention.h"
#include "lminf-layers.h"
#include "lminf-policy.h"
#include "lminf-sequence.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llama_model;

class lminf_attention_op {
public:
    // Why layers of this model cannot have it, with keys and values of these types; "" if they can.
    static std::string why_not(const llama_model & model, ggml_type type_k, ggml_type type_v);

    // originals: of the sink tokens of each layer, see lminf_sinks
    lminf_attention_op(const llama_model & model, const lminf_policy & policy, const lminf_layers & layers,
            const std::vector<ggml_tensor *> & originals);
    ~lminf_attention_op();

    //
    // a micro-batch: the tokens from p0 on of each sequence, one sequence after the other
    //

    struct part { int64_t seq_id; const lminf_sequence * seq; int64_t p0; int64_t n; };

    // Before its graph is built or used again.
    void begin(const std::vector<part> & parts, int32_t n_threads);
    void begin_any(); // the largest graph of all

    bool can_reuse_graph() const { return is_far == was_far; }

    void build_inputs(ggml_context * ctx, int64_t n_tokens) const;

    // Before it is computed, when its keys have their cells. near: of each token, the first position of its window that a layer with parts
    // lets it see, or nothing where all layers see the same.
    void set_inputs(const std::vector<int64_t> & near) const;

    // as build_attn() of a cache has them; k and v are views of the cache's tensors
    struct inputs {
        ggml_tensor * q;
        ggml_tensor * k;
        ggml_tensor * v;
        ggml_tensor * sink_logits; // NULL: none
        float         scale;
    };

    // F32 [n_embd_v*n_head, n_tokens]; parts: [n_embd_v + 2, n_head, n_tokens], see lminf_attention_job. Throws std::runtime_error if queries
    // of this layer cannot be rotated.
    ggml_tensor * build(ggml_context * ctx, size_t ikv, const inputs & in, bool parts) const;

private:
    struct layer_op; // what an operation is told
    struct view;     // what queries see, and how the work is divided

    const llama_model &                model;
    const lminf_policy &               policy;
    const lminf_layers &               layers;
    const std::vector<ggml_tensor *> & originals;

    std::vector<part> parts;
    int32_t           n_threads = 1;
    bool              is_far    = false; // a query sees sink tokens elsewhere than at their true positions

    mutable bool          was_far = false;
    mutable ggml_tensor * q_shift = nullptr; // see lminf_layers: from the query's position to where it sees far sink tokens from

    mutable std::vector<std::unique_ptr<layer_op>> ops; // [layer]
    mutable std::vector<lminf_rope>                q_ropes;

    mutable std::vector<std::vector<lminf_run>>    runs; // of each part
    mutable std::unique_ptr<view>                  all;  // of its window
    mutable std::unique_ptr<view>                  near; // of what a query that recalls sees of it

    mutable std::unique_ptr<char[]> work;
    mutable size_t                  work_size = 0;

    ggml_tensor * rotate_far(ggml_context * ctx, size_t ikv, ggml_tensor * q) const;

    lminf_attention_job job_of(const layer_op & op, const view & view) const;
    void                prepare(view & view, const std::vector<int64_t> & near) const;
    void                make_room(size_t size) const;

    static void compute(ggml_tensor * dst, int ith, int nth, void * data);
};
