// The memory through llama.h and lminf.h on a tiny model: micro-batches, sequences, removal, aborts, rebase, refusals.

#include "lminf-test.h"
#include "small_context.h"
#include "tiny_model.h"

#include <unistd.h>

#include <filesystem>
#include <string>
#include <thread>
#include <vector>

static void test_micro_batches(llama_model * model) {
    const tokens_t tokens = make_tokens(600, 1);
    for (const bool flash_attn : { false, true }) {
        options one;
        one.n_ubatch   = 1;
        one.flash_attn = flash_attn;
        const logits_t expected = eval(make_context(model, one).get(), tokens, 0, tokens.size());
        for (const uint32_t n_ubatch : { 7u, 16u, 64u }) {
            options many  = one;
            many.n_ubatch = n_ubatch;
            CHECK(difference(eval(make_context(model, many).get(), tokens, 0, tokens.size()), expected) < (flash_attn ? 1e-2f : 1e-4f));
        }
    }
}

// Without a clamp the home of the sink tokens is placed anew from the originals too, after every rebase
static void test_rebase(llama_model * model, ggml_type type, uint32_t n_clamp) {
    const tokens_t tokens = make_tokens(4000, 2);
    {
        options never;
        never.type    = type;
        never.n_clamp = n_clamp;
        options often  = never;
        often.n_rebase = 1;

        const auto ctx = make_context(model, often);
        const logits_t logits = eval(ctx.get(), tokens, 0, tokens.size());
        CHECK(difference(logits, eval(make_context(model, never).get(), tokens, 0, tokens.size())) <
              (type == GGML_TYPE_F32 ? 3e-3f : 5e-2f));

        lminf_stats stats;
        CHECK(lminf_get_stats(ctx.get(), 0, &stats));
        CHECK(stats.n_rebases > 3 && stats.n_past == 4000 && stats.pos_physical < 2000);
        CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx.get()), 0) == 3999); // callers see logical positions
    }
}

// sequences of different ages in one batch, each as if it were alone
static void test_sequences(llama_model * model) {
    options opts;
    opts.n_seq_max = 3;
    const auto ctx = make_context(model, opts);

    const std::vector<tokens_t> tokens = { make_tokens(400, 3), make_tokens(400, 4), make_tokens(400, 5) };
    const std::vector<size_t>   ages   = { 300, 37, 0 };
    for (size_t s = 0; s < ages.size(); ++s) {
        eval(ctx.get(), tokens[s], 0, ages[s], llama_seq_id(s));
    }

    std::vector<logits_t> logits(3);
    std::vector<size_t>   next = ages;
    for (int round = 0; round < 12; ++round) {
        llama_batch batch = llama_batch_init(64, 0, 1);
        std::vector<size_t> owner;
        for (size_t s = 0; s < tokens.size(); ++s) {
            const size_t n = (size_t(round) + s) % 4*2;
            for (size_t i = 0; i < n; ++i, ++batch.n_tokens) {
                batch.token   [batch.n_tokens]    = tokens[s][next[s]];
                batch.pos     [batch.n_tokens]    = llama_pos(next[s]++);
                batch.n_seq_id[batch.n_tokens]    = 1;
                batch.seq_id  [batch.n_tokens][0] = llama_seq_id(s);
                batch.logits  [batch.n_tokens]    = 1;
                owner.push_back(s);
            }
        }
        CHECK(llama_decode(ctx.get(), batch) == 0);
        for (size_t i = 0; i < owner.size(); ++i) {
            const float * row = llama_get_logits_ith(ctx.get(), int32_t(i));
            logits[owner[i]].insert(logits[owner[i]].end(), row, row + n_vocab);
        }
        llama_batch_free(batch);
    }

    for (size_t s = 0; s < tokens.size(); ++s) {
        const auto alone = make_context(model);
        eval(alone.get(), tokens[s], 0, ages[s]);
        CHECK(difference(logits[s], eval(alone.get(), tokens[s], ages[s], next[s])) < 1e-4f);
        CHECK(lminf_n_past(ctx.get(), llama_seq_id(s)) == int64_t(next[s]));
    }
}

static void test_removal(llama_model * model) {
    const tokens_t tokens = make_tokens(500, 6);
    const tokens_t other  = make_tokens(500, 7);

    const auto expected = make_context(model);
    eval(expected.get(), tokens, 0, 300);
    const logits_t next = eval(expected.get(), tokens, 300, 340);

    const auto     ctx = make_context(model);
    llama_memory_t mem = llama_get_memory(ctx.get());
    eval(ctx.get(), tokens, 0, 300);
    eval(ctx.get(), other, 300, 316);
    CHECK(llama_memory_seq_rm(mem, 0, 300, -1)); // n_rollback tokens, and then others in their place
    CHECK(difference(eval(ctx.get(), tokens, 300, 340), next) < 1e-4f);

    CHECK(!llama_memory_seq_rm(mem, 0, 20, -1)); // long gone
    CHECK(!llama_memory_seq_rm(mem, 0, 320, 330)); // a hole
    CHECK(!llama_memory_seq_rm(mem, 0, 0, 320));   // sink tokens
    CHECK(lminf_n_past(ctx.get(), 0) == 340);

    // Forgetting the oldest part of the window. Positions below 353 would have seen it; the second layer sees what the first
    // made of those for another 23 positions; then it is gone as if it had left the window.
    CHECK(llama_memory_seq_rm(mem, 0, 4, 330));
    const logits_t remembered = eval(expected.get(), tokens, 340, 400);
    const logits_t forgotten  = eval(ctx.get(),      tokens, 340, 400);
    CHECK(difference(head(forgotten, 36), head(remembered, 36)) > 1e-3f);
    CHECK(difference(tail(forgotten, 24), tail(remembered, 24)) < 1e-4f);

    // all of it
    CHECK(llama_memory_seq_rm(mem, 0, -1, -1));
    CHECK(lminf_n_past(ctx.get(), 0) == 0 && llama_memory_seq_pos_max(mem, 0) == -1);
    eval(ctx.get(), tokens, 0, 300);
    CHECK(difference(eval(ctx.get(), tokens, 300, 340), next) < 1e-4f);

    // down to a part of the sink tokens
    CHECK(llama_memory_seq_rm(mem, 0, 2, -1));
    eval(ctx.get(), tokens, 2, 300);
    CHECK(difference(eval(ctx.get(), tokens, 300, 340), next) < 1e-4f);
}

// Before anything is clamped, plain llama.cpp can forget the same tokens, and writes the same then
static void test_forgetting(llama_model * model) {
    const tokens_t tokens = make_tokens(22, 15);

    const auto        ctx = make_context(model);
    const context_ptr plain(llama_init_from_model(model, make_cparams({})), llama_free);
    for (llama_context * each : { ctx.get(), plain.get() }) {
        eval(each, tokens, 0, 14);
        CHECK(llama_memory_seq_rm(llama_get_memory(each), 0, 4, 10));
    }
    const logits_t forgotten = eval(ctx.get(), tokens, 14, 22);
    CHECK(difference(forgotten, eval(plain.get(), tokens, 14, 22)) < 1e-4f);

    const auto remembering = make_context(model);
    eval(remembering.get(), tokens, 0, 14);
    CHECK(difference(forgotten, eval(remembering.get(), tokens, 14, 22)) > 1e-3f);
}

// After a prompt, single tokens find the window in few cells: its keys have moved, and are the same to the byte
static void test_compaction(llama_model * model, ggml_type type) {
    options opts;
    opts.n_ubatch   = 64;
    opts.type       = type;
    opts.flash_attn = true;
    const tokens_t tokens = make_tokens(400, 14);

    const auto singles = make_context(model, opts);
    const auto mixed   = make_context(model, opts);

    std::vector<uint8_t> before(4096), after(4096);
    for (size_t i = 0; i < 400; i += 100) {
        logits_t expected;
        for (size_t k = i; k < i + 100; ++k) {
            const logits_t one = eval(singles.get(), tokens, k, k + 1);
            expected.insert(expected.end(), one.begin(), one.end());
        }
        logits_t logits = eval(mixed.get(), tokens, i, i + 64);
        const int64_t pos = int64_t(i) + 60;
        const size_t  n   = lminf_test_get_key(mixed.get(), 0, 1, pos, before.data(), before.size());
        for (size_t k = i + 64; k < i + 100; ++k) {
            const logits_t one = eval(mixed.get(), tokens, k, k + 1);
            logits.insert(logits.end(), one.begin(), one.end());
            CHECK(n > 0 && lminf_test_get_key(mixed.get(), 0, 1, pos, after.data(), after.size()) == n);
            CHECK(std::equal(before.begin(), before.begin() + int64_t(n), after.begin()));
        }
        CHECK(difference(logits, expected) < 2e-2f);
    }
}

// Tokens of several sequences in one batch move keys to lower cells too: what micro-batches needed is not looked at
static void test_compaction_of_sequences(llama_model * model) {
    options opts;
    opts.n_ubatch  = 64;
    opts.n_seq_max = 2;
    const auto     ctx    = make_context(model, opts);
    const tokens_t tokens = make_tokens(300, 15);
    for (const llama_seq_id seq_id : { 0, 1 }) {
        eval(ctx.get(), tokens, 0, 256, seq_id);
        CHECK(lminf_test_get_n_used(ctx.get(), seq_id) > 4 + 24 + 16);
    }
    llama_batch batch = llama_batch_init(2, 0, 1);
    for (const llama_seq_id seq_id : { 0, 1 }) {
        batch.token   [seq_id]    = tokens[256];
        batch.pos     [seq_id]    = 256;
        batch.n_seq_id[seq_id]    = 1;
        batch.seq_id  [seq_id][0] = seq_id;
        batch.logits  [seq_id]    = 1;
    }
    batch.n_tokens = 2;
    CHECK(llama_decode(ctx.get(), batch) == 0);
    llama_batch_free(batch);
    for (const llama_seq_id seq_id : { 0, 1 }) {
        CHECK(lminf_test_get_n_used(ctx.get(), seq_id) <= 4 + 24 + 16); // sink tokens, window, n_rollback
    }
}

// A long pinned prompt takes its cells and, with llama.cpp's attention, one spare copy; both read alike
static void test_many_sink_tokens(llama_model * model) {
    options opts;
    opts.n_ubatch   = 64;
    opts.flash_attn = true;
    const tokens_t tokens = make_tokens(500, 16);
    for (const uint32_t n_block : { 0u, 8u, 64u }) {
        lminf_params params = make_params(opts);
        params.n_sink  = 100;
        params.n_clamp = 80;
        params.n_block = n_block;

        std::vector<logits_t> logits;
        for (const bool stock : { false, true }) {
            setenv("LMINF_ATTENTION", stock ? "stock" : "lminf", 1);
            const context_ptr ctx(lminf_init_from_model(model, make_cparams(opts), params), llama_free);
            unsetenv("LMINF_ATTENTION");
            CHECK(ctx);
            logits.push_back(eval(ctx.get(), tokens, 0, tokens.size()));

            lminf_stats stats;
            CHECK(lminf_get_stats(ctx.get(), 0, &stats));
            // the clamp begins before all of them are there, so that they have a home of their own besides
            CHECK(stats.n_cells - stats.n_ring == (stock ? 3u : 1u)*params.n_sink);
            CHECK((stats.n_placements > 0) == stock);
            CHECK(llama_n_ubatch(ctx.get()) == (stock && n_block == 8 ? 9u : 64u));
        }
        CHECK(difference(logits[0], logits[1]) < 5e-2f);
    }
    setenv("LMINF_ATTENTION", "ours", 1);
    CHECK(!lminf_init_from_model(model, make_cparams(opts), make_params(opts)));
    unsetenv("LMINF_ATTENTION");
}

// A copied sequence goes on as the first one does, sink tokens and all, and apart from it
static void test_copies(llama_model * model, ggml_type type) {
    options opts;
    opts.n_seq_max  = 3;
    opts.type       = type;
    opts.flash_attn = type != GGML_TYPE_F32;
    const auto     ctx    = make_context(model, opts);
    llama_memory_t mem    = llama_get_memory(ctx.get());
    const tokens_t tokens = make_tokens(300, 11);
    const tokens_t other  = make_tokens(300, 12);

    eval(ctx.get(), other, 0, 30, 1); // what the copy replaces
    eval(ctx.get(), tokens, 0, 200, 0);
    llama_memory_seq_cp(mem, 0, 1, -1, -1);
    llama_memory_seq_cp(mem, 0, 2, 0, 190); // without the tail
    CHECK(lminf_n_past(ctx.get(), 1) == 200 && lminf_n_past(ctx.get(), 2) == 190);

    const logits_t expected = eval(ctx.get(), tokens, 200, 300, 0);
    eval(ctx.get(), other, 200, 280, 2);
    CHECK(difference(eval(ctx.get(), tokens, 200, 300, 1), expected) == 0.0f);

    llama_memory_seq_keep(mem, 1);
    CHECK(lminf_n_past(ctx.get(), 0) == 0 && lminf_n_past(ctx.get(), 1) == 300 && lminf_n_past(ctx.get(), 2) == 0);
}

// A saved sequence goes on bit for bit, in this context, in another one and as another sequence; damage is noticed
static void test_states(llama_model * model, ggml_type type, bool flash_attn) {
    options opts;
    opts.n_seq_max  = 2;
    opts.type       = type;
    opts.flash_attn = flash_attn;
    const tokens_t tokens = make_tokens(300, 13);

    for (const size_t n : { 2, 10, 200 }) {
        const auto ctx = make_context(model, opts);
        eval(ctx.get(), tokens, 0, n);

        std::vector<uint8_t> all(llama_state_get_size(ctx.get()));
        CHECK(llama_state_get_data(ctx.get(), all.data(), all.size()) == all.size());
        std::vector<uint8_t> one(llama_state_seq_get_size(ctx.get(), 0));
        CHECK(llama_state_seq_get_data(ctx.get(), one.data(), one.size(), 0) == one.size());

        const logits_t expected = eval(ctx.get(), tokens, n, 300);

        const auto fresh = make_context(model, opts);
        CHECK(llama_state_set_data(fresh.get(), all.data(), all.size()) == all.size());
        CHECK(difference(eval(fresh.get(), tokens, n, 300), expected) == 0.0f);
        CHECK(llama_state_seq_set_data(fresh.get(), one.data(), one.size(), 1) == one.size());
        CHECK(difference(eval(fresh.get(), tokens, n, 300, 1), expected) == 0.0f);

        options different   = opts;
        different.n_ubatch  = 32;
        const auto mismatch = make_context(model, different);
        CHECK(llama_state_seq_set_data(mismatch.get(), one.data(), one.size(), 0) == 0);
        CHECK(llama_state_seq_set_data(fresh.get(), one.data(), one.size()/2, 0) == 0);

        // Two numbers of llama.cpp's come first, then what kind of state it is and the parameters that it was saved with: each byte
        // matters. The other sequence stays as it is.
        CHECK(llama_state_seq_set_data(fresh.get(), one.data(), one.size(), 1) == one.size());
        for (size_t i = 8; i < 128; i += 3) {
            std::vector<uint8_t> damaged = one;
            damaged[i] ^= 0xff;
            CHECK(llama_state_seq_set_data(fresh.get(), damaged.data(), damaged.size(), 0) == 0);
            CHECK(lminf_n_past(fresh.get(), 1) == int64_t(n));
        }
        CHECK(difference(eval(fresh.get(), tokens, n, 300, 1), expected) == 0.0f);
    }
}

static void test_refusals(llama_model * model) {
    options opts;
    opts.n_seq_max = 2;
    const auto     ctx    = make_context(model, opts);
    const tokens_t tokens = make_tokens(200, 8);
    llama_memory_t mem    = llama_get_memory(ctx.get());
    eval(ctx.get(), tokens, 0, 100);

    llama_memory_seq_add(mem, 0, 0, -1, 5);
    llama_memory_seq_div(mem, 0, 0, -1, 2);
    llama_memory_seq_cp (mem, 0, 1, 50, -1);
    CHECK(!llama_memory_can_shift(mem));
    CHECK(lminf_n_past(ctx.get(), 0) == 100 && lminf_n_past(ctx.get(), 1) == 0);

    const auto same = make_context(model);
    eval(same.get(), tokens, 0, 100);
    CHECK(difference(eval(ctx.get(), tokens, 100, 150), eval(same.get(), tokens, 100, 150)) < 1e-4f);

    CHECK(lminf_decode(ctx.get(), 2, tokens.data(), 1, nullptr) != 0); // no such sequence
    CHECK(lminf_decode(ctx.get(), 0, tokens.data(), 0, nullptr) != 0);
    CHECK(lminf_n_past(ctx.get(), 0) == 150);
    CHECK(difference(eval(ctx.get(), tokens, 150, 200), eval(same.get(), tokens, 150, 200)) < 1e-4f);

    // a plain context has figures too
    const context_ptr plain(llama_init_from_model(model, make_cparams({})), llama_free);
    lminf_stats stats;
    CHECK(lminf_get_stats(plain.get(), 0, &stats) && stats.n_bytes > 0 && stats.n_past == 0);
    CHECK(!lminf_get_stats(plain.get(), 1, &stats) && !lminf_get_params(plain.get(), nullptr));

    lminf_params params = make_params();
    params.n_block = 25;
    CHECK(!lminf_init_from_model(model, make_cparams({}), params));
    CHECK(lminf_last_status() == LMINF_STATUS_CONFIG && std::string(lminf_last_error()).find("n_block") != std::string::npos);
    params = make_params();
    params.n_window = 1000;
    CHECK(lminf_resolve_params(model, make_cparams({}), &params) == LMINF_STATUS_CONFIG);
    params = make_params();
    params.n_sink     = 16;
    params.sink_order = LMINF_SINK_ORDER_KEPT;
    CHECK(lminf_resolve_params(model, make_cparams({}), &params) == LMINF_STATUS_CONFIG);
}

// Who decides whether llama_init_from_model() gives a context with LM-Infinite: the caller on this thread, else the environment
static void test_environment(llama_model * model) {
    llama_context_params cparams = make_cparams({});
    cparams.n_ctx = 4096;

    const auto n_window = [&]() {
        const context_ptr ctx(llama_init_from_model(model, cparams), llama_free);
        CHECK(!ctx || llama_n_ctx(ctx.get()) == 4096);
        lminf_params params;
        return !ctx ? -1 : lminf_get_params(ctx.get(), &params) ? int(params.n_window) : 0;
    };

    CHECK(n_window() == 0);
    setenv("LMINF_N_WINDOW", "32", 1);
    CHECK(n_window() == 32);
    lminf_use_params(nullptr);
    CHECK(n_window() == 0);
    const lminf_params given = make_params();
    lminf_use_params(&given);
    CHECK(n_window() == 24);
    {
        lminf_params other = given;
        other.n_window = other.n_clamp = 16;
        const context_ptr ctx(lminf_init_from_model(model, cparams, other), llama_free);
        CHECK(ctx && lminf_get_params(ctx.get(), &other) && other.n_window == 16);
    }
    CHECK(n_window() == 24);
    lminf_use_environment();
    CHECK(n_window() == 32);
    for (const char * value : { "x", "-1", "1.5", "4294967296", "257" }) {
        setenv("LMINF_N_WINDOW", value, 1);
        CHECK(n_window() == -1);
    }
    unsetenv("LMINF_N_WINDOW");
    CHECK(n_window() == 0);

    setenv("LMINF_SINK_ORDER", "kept", 1);
    setenv("LMINF_N_CLAMP", "259", 1);
    CHECK(n_window() == 256);
    setenv("LMINF_N_CLAMP", "258", 1);
    CHECK(n_window() == -1);
    unsetenv("LMINF_SINK_ORDER");
    unsetenv("LMINF_N_CLAMP");

    cparams.n_seq_max = 2;
    CHECK(n_window() == 0);
    lminf_use_params(&given);
    CHECK(n_window() == 24);
    cparams.kv_unified = true;
    CHECK(n_window() == -1 && lminf_last_status() == LMINF_STATUS_CONFIG);
    lminf_use_environment();
    CHECK(n_window() == 0);
}

// A norm with weights stands between RoPE and the cache: keys are placed and rebased through it
static void test_norm_after_rope(const std::string & path) {
    tiny_model_params params;
    params.arch = "hunyuan-dense";
    write_tiny_model(path, params);
    const model_ptr model(llama_model_load_from_file(path.c_str(), llama_model_default_params()), llama_model_free);
    CHECK(model);

    test_micro_batches(model.get());
    test_rebase(model.get(), GGML_TYPE_F32, 24);

    // and without LM-Infinite the model is as ever
    lminf_use_params(nullptr);
    CHECK(context_ptr(llama_init_from_model(model.get(), make_cparams({})), llama_free));
    lminf_use_environment();
}

// An aborted micro-batch gives back exactly the state before, wherever it stopped
static void test_abort(llama_model * model) {
    const tokens_t tokens = make_tokens(400, 9);

    const auto undisturbed = make_context(model);
    eval(undisturbed.get(), tokens, 0, 200);
    const logits_t expected = eval(undisturbed.get(), tokens, 200, 240);

    for (const size_t n_before : { size_t(0), size_t(2), size_t(200) }) {
        for (int stop_after = 0; stop_after < 60; stop_after += 3) {
            const auto ctx = make_context(model);
            eval(ctx.get(), tokens, 0, n_before);

            int n_calls = stop_after;
            llama_set_abort_callback(ctx.get(), [](void * data) { return (*static_cast<int *>(data))-- <= 0; }, &n_calls);
            const int32_t status = lminf_decode(ctx.get(), 0, tokens.data() + n_before, 16, nullptr);
            llama_set_abort_callback(ctx.get(), nullptr, nullptr);
            CHECK(status == 2 || status == 0);
            CHECK(lminf_n_past(ctx.get(), 0) == int64_t(status == 0 ? n_before + 16 : n_before));

            eval(ctx.get(), tokens, size_t(lminf_n_past(ctx.get(), 0)), 200 + (n_before == 200)*size_t(status == 0)*16);
            const size_t n_past = size_t(lminf_n_past(ctx.get(), 0));
            CHECK(difference(eval(ctx.get(), tokens, n_past, 240), tail(expected, 240 - n_past)) < 1e-4f);
        }
    }
}

// Several threads look middle tokens up together, and find the same ones every time: those that one finds alone, unless each
// chooses candidates from its own share
static void test_threads(llama_model * model) {
    const tokens_t tokens = make_tokens(330, 16);

    const auto read = [&](uint32_t n_candidates, int32_t n_threads) {
        options opts;
        opts.n_ubatch     = 64;
        opts.n_recalled   = 4;
        opts.n_candidates = n_candidates;
        opts.n_threads    = n_threads;
        const auto ctx = make_context(model, opts);

        logits_t res;
        for (const auto & [i0, i1] : { std::pair(0, 320), std::pair(320, 321), std::pair(321, 322), std::pair(322, 330) }) {
            const logits_t next = eval(ctx.get(), tokens, size_t(i0), size_t(i1));
            res.insert(res.end(), next.begin(), next.end());
        }
        return res;
    };
    CHECK(difference(read(0, 3), read(0, 1)) < 1e-4f);
    CHECK(difference(read(16, 3), read(16, 3)) == 0.0f);
}

// Contexts of one model, each in a thread of its own, know nothing of each other
static void test_contexts_in_threads(llama_model * model) {
    std::vector<logits_t>    logits(3);
    std::vector<std::thread> threads;

    const auto read = [&](size_t i) {
        options opts;
        opts.n_rebase   = 1;
        opts.n_recalled = i == 1 ? 4 : 0;
        const auto ctx = make_context(model, opts);
        return eval(ctx.get(), make_tokens(200, unsigned(17 + i)), 0, 200);
    };
    for (size_t i = 0; i < logits.size(); ++i) {
        threads.emplace_back([&, i]() { logits[i] = read(i); });
    }
    for (auto & thread : threads) {
        thread.join();
    }
    for (size_t i = 0; i < logits.size(); ++i) {
        CHECK(difference(logits[i], read(i)) == 0.0f);
    }
}

static void test_far_positions(llama_model * model) {
    const tokens_t tokens = make_tokens(300, 10);
    logits_t near;
    for (const int64_t pos : { int64_t(1000), int64_t(200000000), int64_t(1) << 33, int64_t(1) << 40 }) {
        const auto ctx = make_context(model);
        eval(ctx.get(), tokens, 0, 4);
        CHECK(lminf_test_set_position(ctx.get(), 0, pos));
        const logits_t logits = eval(ctx.get(), tokens, 4, tokens.size());
        CHECK(lminf_n_past(ctx.get(), 0) == pos + 296);
        if (near.empty()) {
            near = logits;
        }
        CHECK(difference(logits, near) < 1e-3f);
    }
}

// RoPE in NeoX order after a normalisation, and YaRN, which also scales: rotating keys again is right for both
static void test_kinds_of_rope(const std::string & path) {
    for (const bool yarn : { false, true }) {
        for (const char * arch : { "llama", "qwen3" }) {
            tiny_model_params params;
            params.arch = arch;
            params.yarn = yarn;
            write_tiny_model(path, params);
            const model_ptr model(llama_model_load_from_file(path.c_str(), llama_model_default_params()), llama_model_free);
            CHECK(model);
            if (model) {
                test_micro_batches(model.get());
                test_rebase(model.get(), GGML_TYPE_F32, 24);
                test_rebase(model.get(), GGML_TYPE_F32, 1 << 20);
            }
        }
    }
}

int main() {
    // llama.cpp's log is wanted only when something fails
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    const std::string name = "lminf-test-memory-" + std::to_string(getpid()) + ".gguf";
    const std::string path = (std::filesystem::temp_directory_path() / name).string();
    write_tiny_model(path);

    const model_ptr model(llama_model_load_from_file(path.c_str(), llama_model_default_params()), llama_model_free);
    CHECK(model);
    if (model) {
        test_micro_batches(model.get());
        test_rebase(model.get(), GGML_TYPE_F32, 24);
        test_rebase(model.get(), GGML_TYPE_F16, 24);
        test_sequences(model.get());
        test_removal(model.get());
        test_forgetting(model.get());
        test_compaction(model.get(), GGML_TYPE_F16);
        test_compaction(model.get(), GGML_TYPE_F32);
        test_compaction_of_sequences(model.get());
        test_many_sink_tokens(model.get());
        test_copies(model.get(), GGML_TYPE_F32);
        test_copies(model.get(), GGML_TYPE_F16);
        test_states(model.get(), GGML_TYPE_F32, false);
        test_states(model.get(), GGML_TYPE_F16, false);
        test_states(model.get(), GGML_TYPE_F16, true);
        test_refusals(model.get());
        test_environment(model.get());
        test_abort(model.get());
        test_threads(model.get());
        test_contexts_in_threads(model.get());
        test_far_positions(model.get());
    }
    test_kinds_of_rope(path);
    test_norm_after_rope(path);
    std::filesystem::remove(path);

    printf("%d failed\n", n_failed);
    return n_failed != 0;
}
