#include "invariants.h"

#include "lminf.h"

#include "llama-model.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <random>
#include <stdexcept>

static constexpr uint32_t n_sink     = 4;
static constexpr uint32_t n_window   = 32;
static constexpr uint32_t n_rollback = 16;

// Largest difference of two logits that should be equal up to rounding, relative to the root mean square of all logits.
// ggml rounds the input of GELU to f16 on the CPU, so where sums run in another order an activation can move by 2^-11 of
// its size; without GELU differences stay below 1e-5. Other sink tokens, a ninth of what a query sees, move logits by more
// than 1e-2. Deep models that choose by threshold (Gemma 3n) need more: see limit_of().
static constexpr double tolerance = 1e-3;

using tokens_t = std::vector<llama_token>;
using logits_t = std::vector<float>;

//
// contexts and texts
//

static llama_context_params make_cparams(uint32_t n_ubatch, uint32_t n_seq_max) {
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = 256;
    cparams.n_batch         = 64;
    cparams.n_ubatch        = n_ubatch;
    cparams.n_seq_max       = n_seq_max;
    cparams.n_threads       = 1;
    cparams.n_threads_batch = 1;
    cparams.type_k          = GGML_TYPE_F32;
    cparams.type_v          = GGML_TYPE_F32;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return cparams;
}

static lminf_params make_params(uint32_t window = n_window) {
    lminf_params params = lminf_default_params();
    params.n_sink     = n_sink;
    params.n_window   = window;
    params.n_block    = 8;
    params.n_rollback = n_rollback;
    return params;
}

llama_context_ptr init_small_window(llama_model & model, uint32_t n_ubatch, uint32_t n_seq_max) {
    return llama_context_ptr(lminf_init_from_model(&model, make_cparams(n_ubatch, n_seq_max), make_params()));
}

static llama_context_ptr make_context(llama_model & model, uint32_t n_ubatch = 16, uint32_t n_seq_max = 1) {
    llama_context_ptr ctx = init_small_window(model, n_ubatch, n_seq_max);
    if (!ctx) {
        throw std::runtime_error(lminf_last_error());
    }
    return ctx;
}

static tokens_t make_tokens(const llama_model & model, size_t n, unsigned seed) {
    std::mt19937 generator(seed);
    tokens_t res(n);
    std::generate(res.begin(), res.end(), [&]() { return llama_token(generator() % model.vocab.n_tokens()); });
    return res;
}

static void add_token(llama_batch & batch, llama_token token, llama_pos pos, llama_seq_id seq_id) {
    batch.token   [batch.n_tokens]    = token;
    batch.pos     [batch.n_tokens]    = pos;
    batch.n_seq_id[batch.n_tokens]    = 1;
    batch.seq_id  [batch.n_tokens][0] = seq_id;
    batch.logits  [batch.n_tokens]    = 1;
    batch.n_tokens++;
}

static void append_logits(llama_context * ctx, int32_t i, logits_t & logits) {
    const float * row = llama_get_logits_ith(ctx, i);
    if (!row) {
        throw std::runtime_error("no logits");
    }
    logits.insert(logits.end(), row, row + llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))));
}

// appends tokens [i0, i1) in calls of as many tokens as next_size says, and returns the logits of each
static logits_t eval(llama_context * ctx, const tokens_t & tokens, size_t i0, size_t i1,
        const std::function<size_t()> & next_size, llama_seq_id seq_id = 0) {
    logits_t res;
    while (i0 < i1) {
        const size_t n = std::min(next_size(), i1 - i0);

        llama_batch batch = llama_batch_init(int32_t(n), 0, 1);
        for (size_t i = i0; i < i0 + n; ++i) {
            add_token(batch, tokens[i], llama_pos(i), seq_id);
        }
        const int32_t status = llama_decode(ctx, batch);
        llama_batch_free(batch);
        if (status != 0) {
            throw std::runtime_error("llama_decode() returned " + std::to_string(status));
        }
        for (size_t i = 0; i < n; ++i) {
            append_logits(ctx, int32_t(i), res);
        }
        i0 += n;
    }
    return res;
}

static logits_t eval(llama_context * ctx, const tokens_t & tokens, size_t i0, size_t i1, llama_seq_id seq_id = 0) {
    return eval(ctx, tokens, i0, i1, []() { return 64; }, seq_id);
}

static double root_mean_square(const logits_t & logits) {
    double sum = 0.0;
    for (const float x : logits) {
        sum += x == -FLT_MAX ? 0.0 : double(x)*x; // that is how a model says that it never writes a token
    }
    return std::sqrt(sum/double(logits.size()));
}

// NaN and infinity are never equal to anything
static double difference(const logits_t & actual, const logits_t & expected) {
    if (actual.size() != expected.size()) {
        return INFINITY;
    }
    double res = 0.0;
    for (size_t i = 0; i < actual.size(); ++i) {
        const double d = std::fabs(double(actual[i]) - expected[i]);
        res = std::isfinite(d) ? std::max(res, d) : INFINITY;
    }
    return res/root_mean_square(expected);
}

//
// checks
//

static result at_most(double limit, const std::string & name, double value, const std::string & note = "") {
    return { name, value <= limit ? PASSED : FAILED, value, note };
}

static result not_checked(const std::string & name, const std::string & reason) {
    return { name, NOT_CHECKED, NAN, reason };
}

// nothing changes before anything is masked or clamped
static result check_unchanged(llama_model & model, double limit) {
    const tokens_t tokens = make_tokens(model, 96, 1);

    const llama_context_ptr plain(llama_init_from_model(&model, make_cparams(16, 1)));
    const llama_context_ptr ctx(lminf_init_from_model(&model, make_cparams(16, 1), make_params(256)));
    if (!plain || !ctx) {
        throw std::runtime_error(plain ? lminf_last_error() : "no plain context");
    }
    const logits_t expected = eval(plain.get(), tokens, 0, tokens.size());
    return at_most(limit, "unchanged", difference(eval(ctx.get(), tokens, 0, tokens.size()), expected));
}

// the same logits however a text of several windows is cut
static result check_batches(llama_model & model, double limit) {
    const tokens_t tokens   = make_tokens(model, 5*n_window, 2);
    const logits_t expected = eval(make_context(model).get(), tokens, 0, tokens.size());

    std::mt19937 generator(3);
    const double one   = difference(eval(make_context(model).get(), tokens, 0, tokens.size(), []() { return 1; }), expected);
    const double seven = difference(eval(make_context(model, 7).get(), tokens, 0, tokens.size()), expected);
    const double mixed = difference(eval(make_context(model).get(), tokens, 0, tokens.size(),
            [&]() { return 1 + generator() % 40; }), expected);
    return at_most(limit, "batches", std::max({ one, seven, mixed }));
}

// Bit for bit the same, and by any number of threads, where a context is deterministic; a model whose contexts cannot be is refused.
static result check_same_bits(llama_model & model, double /*limit*/) {
    const tokens_t tokens = make_tokens(model, 5*n_window, 12);

    const auto logits = [&](uint32_t n_ubatch, int32_t n_threads, const std::function<size_t()> & next_size) {
        llama_context_params cparams = make_cparams(n_ubatch, 1);
        lminf_params         params  = make_params();
        cparams.n_threads       = n_threads;
        cparams.n_threads_batch = n_threads;
        params.deterministic    = true;
        const llama_context_ptr ctx(lminf_init_from_model(&model, cparams, params));
        return ctx ? eval(ctx.get(), tokens, 0, tokens.size(), next_size) : logits_t();
    };
    const logits_t expected = logits(16, 1, []() { return 1; });
    if (expected.empty() && lminf_last_status() == LMINF_STATUS_UNSUPPORTED) {
        const std::string error = lminf_last_error();
        return not_checked("same bits", error.substr(error.find("cut: ") + 5));
    }
    std::mt19937 generator(13);
    const bool same = logits(64, 2, []() { return 64; }) == expected && logits(7, 2, []() { return 64; }) == expected &&
        logits(16, 1, [&]() { return 1 + generator() % 40; }) == expected;
    return { "same bits", same ? PASSED : FAILED, 0.0, "" };
}

// sequences of different ages in one batch, each as if it were alone
static result check_sequences(llama_model & model, double limit) {
    const std::vector<size_t> ages = { 100, 37, 0 };

    std::vector<tokens_t> tokens;
    std::vector<logits_t> logits(ages.size());
    std::vector<size_t>   next = ages;

    if (!init_small_window(model, 16, uint32_t(ages.size())) && lminf_last_status() == LMINF_STATUS_UNSUPPORTED) {
        return not_checked("sequences", lminf_last_error());
    }
    const auto ctx = make_context(model, 16, uint32_t(ages.size()));
    for (size_t s = 0; s < ages.size(); ++s) {
        tokens.push_back(make_tokens(model, 160, unsigned(4 + s)));
        eval(ctx.get(), tokens[s], 0, ages[s], llama_seq_id(s));
    }
    for (size_t round = 0; round < 8; ++round) {
        llama_batch batch = llama_batch_init(64, 0, 1);
        std::vector<size_t> owner;
        for (size_t s = 0; s < ages.size(); ++s) {
            for (size_t i = 0; i < (round + s) % 4*3; ++i) {
                add_token(batch, tokens[s][next[s]], llama_pos(next[s]), llama_seq_id(s));
                next[s]++;
                owner.push_back(s);
            }
        }
        const int32_t status = llama_decode(ctx.get(), batch);
        llama_batch_free(batch);
        if (status != 0) {
            throw std::runtime_error("llama_decode() returned " + std::to_string(status));
        }
        for (size_t i = 0; i < owner.size(); ++i) {
            append_logits(ctx.get(), int32_t(i), logits[owner[i]]);
        }
    }

    double worst = 0.0;
    for (size_t s = 0; s < ages.size(); ++s) {
        const auto alone = make_context(model);
        eval(alone.get(), tokens[s], 0, ages[s]);
        worst = std::max(worst, difference(logits[s], eval(alone.get(), tokens[s], ages[s], next[s])));
    }
    return at_most(limit, "sequences", worst);
}

// 20 windows: the logits stay finite and of the size they had
static result check_stream(llama_model & model, double /*limit*/) {
    const tokens_t tokens = make_tokens(model, 20*n_window, 7);
    const logits_t logits = eval(make_context(model).get(), tokens, 0, tokens.size());

    const size_t n_row  = logits.size()/tokens.size();
    const double first  = root_mean_square({ logits.begin(), logits.begin() + int64_t(n_window*n_row) });
    const double last   = root_mean_square({ logits.end()   - int64_t(n_window*n_row), logits.end() });
    const bool   finite = std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); });
    const double growth = last/first;
    return { "stream", finite && growth > 0.5 && growth < 2.0 ? PASSED : FAILED, growth, finite ? "" : "not finite" };
}

// removing the tail gives the logits of never having had it, or is refused and changes nothing
static result check_removal(llama_model & model, double limit) {
    const size_t   n_keep = 3*n_window;
    const tokens_t tokens = make_tokens(model, n_keep + 2*n_rollback, 8);
    tokens_t       longer = make_tokens(model, n_keep + 2*n_rollback, 9);
    std::copy(tokens.begin(), tokens.begin() + int64_t(n_keep), longer.begin());

    const auto ctx = make_context(model);
    eval(ctx.get(), longer, 0, n_keep + n_rollback);
    const bool       removed  = llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, llama_pos(n_keep), -1);
    const size_t     next     = removed ? n_keep : n_keep + n_rollback;
    const tokens_t & text     = removed ? tokens : longer;

    const auto never = make_context(model);
    eval(never.get(), text, 0, next);
    const logits_t expected = eval(never.get(), text, next, text.size());
    return at_most(limit, "removal", difference(eval(ctx.get(), text, next, text.size()), expected),
            removed ? "exact" : "refused");
}

// what has left the window of every layer changes nothing any more, a sink token does
static result check_window(llama_model & model, double limit) {
    const llama_hparams & hparams = model.hparams;

    const size_t reach = hparams.n_layer()*std::max(n_window, hparams.n_swa) + n_sink;
    if (llm_arch_is_hybrid(model.arch)) {
        return not_checked("window", "a recurrent state remembers everything");
    }
    if (reach > 1500) {
        return not_checked("window", "a long sliding window, or many layers");
    }
    const tokens_t tokens   = make_tokens(model, reach + 24, 10);
    tokens_t       no_first = tokens;
    tokens_t       no_sink  = tokens;
    for (size_t i = 0; i < 8; ++i) {
        no_first[n_sink + i] = (tokens[n_sink + i] + 1) % llama_token(model.vocab.n_tokens());
    }
    for (size_t i = 0; i < n_sink; ++i) {
        no_sink[i] = (tokens[i] + 1) % llama_token(model.vocab.n_tokens());
    }

    const auto last_logits = [&](const tokens_t & text) {
        const auto ctx = make_context(model);
        eval(ctx.get(), text, 0, reach + 8);
        return eval(ctx.get(), text, reach + 8, text.size());
    };
    const logits_t expected = last_logits(tokens);
    const double   evicted  = difference(last_logits(no_first), expected);
    const double   sink     = difference(last_logits(no_sink),  expected);
    const bool     lasting  = sink > 2*limit;
    return { "window", evicted <= limit && lasting ? PASSED : FAILED, evicted, lasting ? "" : "sink tokens have no effect" };
}

// tolerance, or more if the same text cut otherwise differs by more in plain llama.cpp already
static double limit_of(llama_model & model) {
    const tokens_t tokens = make_tokens(model, 96, 11);

    const auto logits = [&](size_t n) {
        const llama_context_ptr ctx(llama_init_from_model(&model, make_cparams(16, 1)));
        if (!ctx) {
            throw std::runtime_error("no plain context");
        }
        return eval(ctx.get(), tokens, 0, tokens.size(), [n]() { return n; });
    };
    const logits_t expected = logits(64);

    double worst = 0.0;
    for (const size_t n : { 1, 2, 5 }) {
        worst = std::max(worst, difference(logits(n), expected));
    }
    return std::max(tolerance, 4.0*worst);
}

struct check {
    const char * name;
    result    (* run)(llama_model & model, double limit);
    bool         other_batches; // compares batches that are cut differently
};

static const std::vector<check> checks = {
    { "unchanged", check_unchanged, false },
    { "batches",   check_batches,   true  },
    { "same bits", check_same_bits, false },
    { "sequences", check_sequences, true  },
    { "stream",    check_stream,    false },
    { "removal",   check_removal,   false },
    { "window",    check_window,    false },
};

std::vector<result> check_invariants(llama_model & model) {
    double limit = 0.0;
    try {
        limit = limit_of(model);
    } catch (const std::exception & error) {
        return { { "plain", FAILED, NAN, error.what() } };
    }

    const bool depends_on_batches = limit > 50*tolerance;
    limit = std::min(limit, 100*tolerance); // the other checks compare batches that are cut alike

    std::vector<result> res;
    for (const auto & check : checks) {
        if (depends_on_batches && check.other_batches) {
            res.push_back(not_checked(check.name, "llama.cpp's own logits depend on how a text is cut"));
            continue;
        }
        try {
            res.push_back(check.run(model, limit));
        } catch (const std::exception & error) {
            res.push_back({ check.name, FAILED, NAN, error.what() });
        }
    }
    return res;
}
