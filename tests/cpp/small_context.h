// Contexts with a small window on tiny models, and texts that pass it many times: what the tests of the memory share.

#pragma once

#include "check.h"
#include "lminf.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

static constexpr int n_vocab = 64; // of every tiny model here

using model_ptr   = std::unique_ptr<llama_model, decltype(&llama_model_free)>;
using context_ptr = std::unique_ptr<llama_context, decltype(&llama_free)>;
using tokens_t    = std::vector<llama_token>;
using logits_t    = std::vector<float>;

struct options {
    uint32_t  n_ubatch   = 16;
    uint32_t  n_seq_max  = 1;
    ggml_type type       = GGML_TYPE_F32;
    bool      flash_attn = false;
    uint32_t  n_rebase   = 0;
    uint32_t  n_clamp    = 24;
    int32_t   n_threads  = 1;

    uint32_t n_recalled   = 0; // middle tokens that a query looks up
    uint32_t n_candidates = 0; // among so many
};

inline lminf_params make_params(const options & opts = {}) {
    lminf_params params = lminf_default_params();
    params.n_sink     = 4;
    params.n_window   = 24;
    params.n_clamp    = opts.n_clamp;
    params.n_block    = 8;
    params.n_rollback = 16;
    params.n_rebase   = opts.n_rebase;
    if (opts.n_recalled > 0) {
        params.middle.k            = opts.n_recalled;
        params.middle.layer_begin  = 0;
        params.middle.max_tokens   = 512;
        params.middle.n_candidates = opts.n_candidates;
        params.middle.cache_type   = GGML_TYPE_F32;
    }
    return params;
}

inline llama_context_params make_cparams(const options & opts) {
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = 256;
    cparams.n_batch         = 64;
    cparams.n_ubatch        = opts.n_ubatch;
    cparams.n_seq_max       = opts.n_seq_max;
    cparams.n_threads       = opts.n_threads;
    cparams.n_threads_batch = opts.n_threads;
    cparams.type_k          = opts.type;
    cparams.type_v          = ggml_is_quantized(opts.type) && !opts.flash_attn ? GGML_TYPE_F16 : opts.type;
    cparams.flash_attn_type = opts.flash_attn ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return cparams;
}

// NULL if the engine refuses; lminf_last_error() says why
inline context_ptr try_context(llama_model * model, const options & opts = {}) {
    context_ptr ctx(lminf_init_from_model(model, make_cparams(opts), make_params(opts)), llama_free);
    if (ctx && opts.n_recalled > 0) {
        CHECK(lminf_set_recall(ctx.get(), LMINF_RECALL_ON));
    }
    return ctx;
}

inline context_ptr make_context(llama_model * model, const options & opts = {}) {
    context_ptr ctx = try_context(model, opts);
    if (!ctx) {
        fprintf(stderr, "%s\n", lminf_last_error());
        exit(1);
    }
    return ctx;
}

inline tokens_t make_tokens(size_t n, unsigned seed) {
    std::mt19937 generator(seed);
    tokens_t res(n);
    std::generate(res.begin(), res.end(), [&]() { return llama_token(generator() % n_vocab); });
    return res;
}

// Appends tokens [i0, i1), and their logits. Returns what llama_decode() said, of the first call that failed.
inline int32_t decode(llama_context * ctx, const tokens_t & tokens, size_t i0, size_t i1, llama_seq_id seq_id, logits_t & logits) {
    const std::vector<int8_t> output(i1 - i0, 1);
    for (size_t i = i0; i < i1; i += llama_n_batch(ctx)) {
        const size_t n = std::min<size_t>(llama_n_batch(ctx), i1 - i);
        if (const int32_t status = lminf_decode(ctx, seq_id, tokens.data() + i, int32_t(n), output.data())) {
            return status;
        }
        const float * rows = llama_get_logits(ctx);
        logits.insert(logits.end(), rows, rows + n*n_vocab);
    }
    return 0;
}

// the same, where nothing may fail
inline logits_t eval(llama_context * ctx, const tokens_t & tokens, size_t i0, size_t i1, llama_seq_id seq_id = 0) {
    logits_t res;
    CHECK(decode(ctx, tokens, i0, i1, seq_id, res) == 0);
    return res;
}

// infinite if there is a NaN
inline float difference(const logits_t & a, const logits_t & b) {
    CHECK(a.size() == b.size());
    float res = 0.0f;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        res = std::isnan(a[i]) || std::isnan(b[i]) ? INFINITY : std::max(res, std::fabs(a[i] - b[i]));
    }
    return res;
}

inline logits_t head(const logits_t & logits, size_t n_tokens) {
    return { logits.begin(), logits.begin() + int64_t(n_tokens*n_vocab) };
}

inline logits_t tail(const logits_t & logits, size_t n_tokens) {
    return { logits.end() - int64_t(n_tokens*n_vocab), logits.end() };
}
