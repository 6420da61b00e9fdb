// What tests look at, or set, and a caller never needs to know. Exported with lminf.h's functions, so that the tests run against the
// library as it is shipped. Called by the C++ tests and, through cpp/, by the Python tests.

#pragma once

#include "lminf.h"

#ifdef __cplusplus
extern "C" {
#endif

// The sequence keeps its sink tokens, forgets its window and goes on at logical position pos >= n_past.
LLAMA_API bool lminf_test_set_position(struct llama_context * ctx, llama_seq_id seq_id, int64_t pos);

// Copies the cache row of the key at logical position pos in layer il. Returns the row's bytes; 0 if the key is not stored.
LLAMA_API size_t lminf_test_get_key(
        const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int64_t pos, void * dst, size_t size);

// Cells of the sequence up to the last one that holds a key: as many as llama.cpp's attention would look at. 0 without LM-Infinite.
LLAMA_API int64_t lminf_test_get_n_used(const struct llama_context * ctx, llama_seq_id seq_id);

// Copies the un-rotated F32 original of sink token j in layer il. Returns its bytes; 0 if there is none.
LLAMA_API size_t lminf_test_get_sink_original(
        const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, uint32_t j, void * dst, size_t size);

// With candidates: whether all keys are scored as well, so that the next function can say how many of the recalled keys, over all
// layers and heads, had been among the candidates. false if the context has none.
LLAMA_API bool lminf_test_check_candidates(struct llama_context * ctx, bool check);
LLAMA_API bool lminf_test_get_candidates(const struct llama_context * ctx, int64_t * n_recalled, int64_t * n_found);

#ifdef __cplusplus
}
#endif
