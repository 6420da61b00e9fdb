// C API of LM-Infinite for llama.cpp: sink tokens, a local window and clamped RoPE distances.
//
// An addition to llama.h: nothing there changes. A context made by lminf_init_from_model() is an ordinary llama_context
// and works with every llama.h function that its memory supports. Called by cpp/ (the Python extension), by the C++ tests
// and by any program that links libllama.
//
// Symbols of the paper (Han et al., arXiv 2308.16137): S = n_sink, W = n_window, L = n_clamp; B = n_block is ours.

#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum lminf_sink_order {
    LMINF_SINK_ORDER_CLAMPED = 0, // all far sink tokens stand at the same distance (the paper)
    LMINF_SINK_ORDER_KEPT    = 1, // far sink tokens keep their distances to each other (pinned system prompts)
};

// Middle tokens (section 4 of the paper): what has left the window is stored, and the few tokens that matter most to a query are
// looked up when lminf_set_recall() asks for it.
struct lminf_middle_params {
    uint32_t k;           // tokens that a query looks up in each layer; 0: nothing is stored
    bool     per_head;    // k for each query head (the paper); else for each KV head, whose query heads share them
    uint32_t distance;    // D: recalled tokens are seen at this RoPE distance, and the window up to there; 0 = n_clamp/2
    uint32_t layer_begin; // layers [layer_begin, layer_end) recall
    uint32_t layer_end;   // 0 = to the last one
    uint32_t max_tokens;  // the newest tokens of a sequence that can be recalled; older ones are gone
    uint32_t n_candidates; // keys that are scored exactly, chosen by one bit of each component; 0: all keys are
    int32_t  cache_type;  // ggml_type of stored keys and values: F32, F16, Q8_0 or Q4_0
    const char * path;    // file that holds the store, NULL: memory. Read while a context is made
};

struct lminf_params {
    uint32_t n_sink;     // S: the first S tokens of a sequence are never evicted
    uint32_t n_window;   // W: key j is in the local window of query p iff p - j < W; 0 = min(2048, trained context)
    uint32_t n_clamp;    // L: the largest RoPE distance a query may see; 0 = n_window
    uint32_t n_block;    // B: the clamp moves once per B positions, 1 <= B <= L; 0 = min(64, L), of more than 64 sink tokens
                         // min(max(64, n_ubatch), L) unless deterministic
    uint32_t n_rollback; // a sequence can be cut exactly to this many tokens fewer than the longest it has been
    uint32_t n_rebase;   // physical position at which a sequence is rebased; 0 = 65536
    enum lminf_sink_order sink_order;
    bool deterministic;  // a token's logits have the same bits however the text before it was cut, computed, saved or taken back, or
                         // the context is refused. The model was loaded with lminf_deterministic_model_params()
    struct lminf_middle_params middle; // k = 0 by default
};

enum lminf_recall_mode {
    LMINF_RECALL_OFF   = 0,
    LMINF_RECALL_ON    = 1,
    LMINF_RECALL_GATED = 2, // only tokens that weigh more than all that the query sees anyway
};

// Why the last call on this thread failed.
enum lminf_status {
    LMINF_STATUS_OK          = 0,
    LMINF_STATUS_CONFIG      = 1, // a parameter, or a combination of parameters, is out of range
    LMINF_STATUS_UNSUPPORTED = 2, // the model cannot be run with these semantics
    LMINF_STATUS_CONTEXT     = 3, // llama.cpp could not make the context, or the operation does not fit its state
};

// State of one sequence and of the memory that holds it. Positions are 64-bit and count from 0.
struct lminf_stats {
    int64_t n_past;       // logical position of the next token = tokens seen
    int64_t n_evicted;    // tokens that have left the window and are not sink tokens
    int64_t pos_physical; // position of the next token as RoPE will see it
    int64_t n_placements; // sink tokens placed by RoPE, counted once per block copy of S tokens
    int64_t n_rebases;    // times the window's keys were rotated back
    int64_t n_until_rebase; // a micro-batch of more tokens than this rotates them back first; 0: every one does, or none ever
    uint64_t n_bytes;     // of all K and V cells and sink originals of the context
    uint32_t n_cells;     // cells of one sequence: sink copies + window ring
    uint32_t n_cells_used;
    uint32_t n_ring;      // cells of the window ring: W + n_rollback + n_ubatch, padded
    int32_t  sink_distance; // RoPE distance from the last token to the farthest sink token, -1 with no sink token
};

// Weights of one type that are kept in one way.
struct lminf_weights_info {
    int32_t      type;        // ggml_type
    const char * buffer_type; // its name: one of its own where they were repacked
    uint64_t     n_bytes;     // of all of them
    bool         same_bits;   // a token's product with them has the same bits alone and computed with others
};

// The store of middle tokens of one sequence. All 0 in a context without one.
struct lminf_middle_stats {
    int64_t n_stored;      // tokens with rows in the store
    int64_t n_retrievable; // those of them that the next query could recall: it does not see them
    int64_t n_bytes;       // that the stored tokens take
    int64_t n_bytes_token; // of one token
    int64_t n_bytes_full;  // of the store of all sequences once it is full, in memory or in its file
    double  scan_seconds;  // spent on looking through stored keys, all sequences together
};

// what a token looked up
struct lminf_recalled_token {
    int64_t pos;
    float   weight; // its share of the attention, summed over all layers and query heads
};

LLAMA_API struct lminf_params lminf_default_params(void);

// Fills in every 0 that means "default" and checks the values against the model and the context parameters.
LLAMA_API enum lminf_status lminf_resolve_params(
        const struct llama_model * model, struct llama_context_params cparams, struct lminf_params * params);

// NULL on failure; lminf_last_status() and lminf_last_error() say why. The caller frees the result with llama_free().
// cparams.n_ctx and cparams.kv_unified are chosen here: S, W, n_rollback and n_ubatch decide the cells of each sequence.
LLAMA_API struct llama_context * lminf_init_from_model(
        struct llama_model * model, struct llama_context_params cparams, struct lminf_params params);

// What llama_init_from_model() gives on this thread from now on: contexts with these parameters (copied; defaults and checks as
// above), with NULL plain ones, whatever the environment says. cparams.n_ctx stays what the caller asked for, and is no limit.
LLAMA_API void lminf_use_params(const struct lminf_params * params);

// For a model whose contexts can be deterministic: its weights stay as they are in the file, and the CPU computes.
LLAMA_API struct llama_model_params lminf_deterministic_model_params(struct llama_model_params params);

// The environment decides again, as at first: contexts have LM-Infinite if one of LMINF_N_SINK, LMINF_N_WINDOW, LMINF_N_CLAMP,
// LMINF_N_BLOCK, LMINF_N_ROLLBACK, LMINF_N_REBASE (numbers as in lminf_params) and LMINF_SINK_ORDER (clamped, kept) is set.
// LMINF_ATTENTION=stock leaves attention to llama.cpp in every context with LM-Infinite, whoever asked for it. LMINF_DETERMINISTIC=1
// makes every such context deterministic, and llama_model_default_params() those that such contexts need.
LLAMA_API void lminf_use_environment(void);

// Bytes of memory that the process can still take: what a store in memory has to fit into. Limits of control groups count (Linux).
// UINT64_MAX if the system does not say.
LLAMA_API uint64_t lminf_available_memory(void);

LLAMA_API enum lminf_status lminf_last_status(void);
LLAMA_API const char *      lminf_last_error (void); // "" after success

// true if the context was made with LM-Infinite; the resolved parameters then, if params is not NULL
LLAMA_API bool lminf_get_params(const struct llama_context * ctx, struct lminf_params * params);

// Also for contexts without LM-Infinite: nothing is evicted, placed or rebased there. false if there is no such sequence.
LLAMA_API bool lminf_get_stats(const struct llama_context * ctx, llama_seq_id seq_id, struct lminf_stats * stats);

// Who computes the attention of a layer: "own kernel (AVX2)", "llama.cpp's (latent attention)"; "" for a layer without attention. NULL if
// there is no such layer. Valid as long as the context.
LLAMA_API const char * lminf_get_attention(const struct llama_context * ctx, int32_t il);

// The weights that a model multiplies with on the CPU, the most bytes first: at most n_max. Returns how many kinds there are. Products are
// tried out on this machine, which takes a moment. deterministic: as a deterministic context computes them.
LLAMA_API int32_t lminf_get_weights(
        const struct llama_model * model, bool deterministic, struct lminf_weights_info * dst, int32_t n_max);

LLAMA_API bool lminf_get_middle_stats(
        const struct llama_context * ctx, llama_seq_id seq_id, struct lminf_middle_stats * stats);

// Whether the tokens that are decoded from now on look up middle tokens. false if the context stores none.
LLAMA_API bool lminf_set_recall(struct llama_context * ctx, enum lminf_recall_mode mode);

// What the token at a position looked up, if the last micro-batch recalled and that is one of its last 16 tokens of the sequence; pos <
// 0: its last one. At most n_max tokens, the heaviest first. Returns how many there are.
LLAMA_API int32_t lminf_get_recall(
        const struct llama_context * ctx, llama_seq_id seq_id, int64_t pos, struct lminf_recalled_token * dst, int32_t n_max);

// Whether llama_memory_seq_add() turns the keys of this context right. llama_memory_can_shift() also says so of caches of quantised
// keys that llama.cpp then rotates with a matrix that is not there or does not fit. false with LM-Infinite, which does it by itself.
LLAMA_API bool lminf_can_shift(const struct llama_context * ctx);

// Logical position of the sequence's next token, for contexts with and without LM-Infinite.
LLAMA_API int64_t lminf_n_past(const struct llama_context * ctx, llama_seq_id seq_id);

// Removes the tokens at logical positions [p0, p1); p1 < 0: to the end. The tail, as far back as n_rollback tokens before the longest
// that the sequence has been (and as everything needed is still stored); the oldest part of the window, [n_sink, p1); all. Exact, or
// refused: false then, lminf_last_error() says why, and nothing has changed in any part of the memory. Also for contexts
// without LM-Infinite.
LLAMA_API bool lminf_seq_rm(struct llama_context * ctx, llama_seq_id seq_id, int64_t p0, int64_t p1);

// The sequence dst becomes a copy of the first n_tokens of src (< 0: of all), which go on independently. Exact, or refused as above.
LLAMA_API bool lminf_seq_cp(struct llama_context * ctx, llama_seq_id src, llama_seq_id dst, int64_t n_tokens);

// Appends n_tokens (at most n_batch) to a sequence: llama_decode() for streams without end. Positions are implied, and
// move on past 2^31, where llama_pos ends. output: n_tokens flags, or NULL for logits of the last token only.
// Returns what llama_decode() returns; after 2 (aborted) complete micro-batches of the call stay in the sequence. A model with
// recurrent layers cannot go back to them: its sequence is empty then.
LLAMA_API int32_t lminf_decode(
        struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, const int8_t * output);

// SHA-256 (hex) of the llama.cpp source and the patch that this library was built from.
LLAMA_API const char * lminf_patch_id(void);

// The same of all that decides whether a program and this library fit together: llama.cpp, the patch and every source of the engine.
// Who was compiled with another one may see other structs here.
LLAMA_API const char * lminf_abi_id(void);

#ifdef __cplusplus
}
#endif
