// What is left when something fails: a sequence is as before, or empty, or the context says that it is unusable. Never is it
// silently another one.
//
//   test_failures [CASE ...]
//
// "As before" is shown by reading on: the logits are those of a context in which nothing failed.

#include "fake_device.h"
#include "random_model.h"
#include "small_context.h"
#include "tiny_model.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <utility>

//
// models
//

struct kind {
    const char * name;
    llm_arch     arch;
    metadata_map metadata;
    bool         is_hybrid;
};

static const kind full_attention = { "full", LLM_ARCH_QWEN3, {}, false };
static const kind sliding_layers = { "sliding + full", LLM_ARCH_GEMMA3, {{ "attention.sliding_window", 16u }}, false };

static const kind hybrids[] = {
    { "falcon-h1", LLM_ARCH_FALCON_H1, {}, true },
    { "qwen3next", LLM_ARCH_QWEN3NEXT, {}, true },
    { "lfm2",      LLM_ARCH_LFM2,      {}, true },
    { "jamba",     LLM_ARCH_JAMBA,     {}, true },
};

static llama_model_ptr make_model(const kind & kind, ggml_backend_dev_t device = nullptr) {
    std::string error;
    llama_model_ptr res = make_random_model(kind.arch, kind.metadata, error, device);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    if (!res) {
        fprintf(stderr, "%s: %s\n", kind.name, error.c_str());
        exit(1);
    }
    return res;
}

static std::string temporary_path(const std::string & name) {
    return (std::filesystem::temp_directory_path() / ("lminf-test-failures-" + std::to_string(getpid()) + "-" + name)).string();
}

static model_ptr make_tiny_model(const tiny_model_params & params) {
    const std::string path = temporary_path("model.gguf");
    write_tiny_model(path, params);
    model_ptr res(llama_model_load_from_file(path.c_str(), llama_model_default_params()), llama_model_free);
    std::filesystem::remove(path);
    CHECK(res);
    return res;
}

//
// what goes wrong while a text is read
//

// The n-th call of some kind fails, and no other.
struct failure {
    std::function<void(int n)>                  arm    = [](int) {};                  // before the context is made
    std::function<void(llama_context *, int n)> attach = [](llama_context *, int) {}; // to a context
    std::function<bool()>                       has_happened;

    int step = 1; // n = 1, 1 + step, ...
};

static failure of_allocation(fake_device & device) {
    failure res;
    res.arm          = [&](int n) { device.fail_allocation(n); };
    res.has_happened = [&]() { return device.has_failed(); };
    return res;
}

static failure of_computation(fake_device & device) {
    failure res;
    res.arm          = [&](int n) { device.fail_computation(n); };
    res.has_happened = [&]() { return device.has_failed(); };
    return res;
}

// what Ctrl-C does: a computation on the CPU is aborted at one of its operations
static failure of_abort(int step) {
    const auto n_left = std::make_shared<int>(0);
    failure res;
    res.attach = [n_left](llama_context * ctx, int n) {
        *n_left = n;
        llama_set_abort_callback(ctx, [](void * data) { return --*static_cast<int *>(data) == 0; }, n_left.get());
    };
    res.has_happened = [n_left]() { return *n_left <= 0; };
    res.step         = step;
    return res;
}

// Reads tokens [i, end) in calls of 64. After the call that fails, the sequence has the micro-batches that were complete, or
// is empty if the model cannot go back; the text is read on from there. Or no call succeeds any more.
static void read_through_failure(llama_context * ctx, const tokens_t & tokens, size_t i, llama_seq_id seq_id,
        const logits_t & expected, bool can_be_empty, const std::function<bool()> & has_happened) {
    int n_failures = 0;
    while (i < tokens.size()) {
        const size_t n = std::min<size_t>(64, tokens.size() - i);

        logits_t logits;
        if (decode(ctx, tokens, i, i + n, seq_id, logits) == 0) {
            const logits_t same(expected.begin() + int64_t(i*n_vocab), expected.begin() + int64_t((i + n)*n_vocab));
            CHECK(difference(logits, same) < 1e-3f);
            i += n;
            continue;
        }
        CHECK(has_happened());
        if (++n_failures > 1) { // unusable, then: for good
            for (int k = 0; k < 3; ++k) {
                CHECK(decode(ctx, tokens, i, i + 1, seq_id, logits) != 0);
            }
            return;
        }
        const auto n_past = size_t(lminf_n_past(ctx, seq_id));
        CHECK((n_past >= i && n_past <= i + n) || (can_be_empty && n_past == 0));
        CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx), seq_id) == llama_pos(n_past) - 1);
        i = n_past;
    }
}

// A context is made, and a text of several windows read, once for each call that can fail on the way.
static void check_every_failure(llama_model * model, const options & opts, const failure & failure, bool can_be_empty = false) {
    const tokens_t tokens   = make_tokens(200, 1);
    const logits_t expected = eval(make_context(model, opts).get(), tokens, 0, tokens.size());

    int  n_failures = 0;
    bool happened   = true;
    for (int n = 1; happened; n += failure.step) {
        failure.arm(n);
        context_ptr ctx = try_context(model, opts);
        if (!ctx) { // the next one is made
            CHECK(failure.has_happened() && lminf_last_status() != LMINF_STATUS_OK && lminf_last_error()[0] != '\0');
            ctx = make_context(model, opts);
        }
        failure.attach(ctx.get(), n);
        read_through_failure(ctx.get(), tokens, 0, 0, expected, can_be_empty, failure.has_happened);
        happened = failure.has_happened();
        n_failures += happened;
    }
    failure.arm(0);
    CHECK(n_failures > 3);
}

static options make_options(bool flash_attn = false, uint32_t n_recalled = 0) {
    options res;
    res.flash_attn = flash_attn;
    res.n_recalled = n_recalled;
    res.n_rebase   = 1;
    return res;
}

static void test_allocations() {
    fake_device device;
    const auto full    = make_model(full_attention, device.get());
    const auto sliding = make_model(sliding_layers, device.get());
    check_every_failure(full   .get(), make_options(),     of_allocation(device));
    check_every_failure(sliding.get(), make_options(true), of_allocation(device));
}

// placing, rebasing and reading, in one cache and in two that must stay in step
static void test_computations() {
    fake_device device;
    const auto full    = make_model(full_attention, device.get());
    const auto sliding = make_model(sliding_layers, device.get());
    for (const bool flash_attn : { false, true }) {
        check_every_failure(full   .get(), make_options(flash_attn), of_computation(device));
        check_every_failure(sliding.get(), make_options(flash_attn), of_computation(device));
    }
}

static void test_computations_of_hybrids() {
    fake_device device;
    for (const auto & kind : hybrids) {
        const auto model = make_model(kind, device.get());
        check_every_failure(model.get(), make_options(), of_computation(device), true);
    }
}

// storing and recalling, where another part of the graph fails before or after
static void test_middle_tokens() {
    fake_device_traits one_chip;
    one_chip.host_memory = true;
    fake_device device(one_chip);
    if (const auto model = make_model(full_attention, device.get()); try_context(model.get(), make_options(false, 4))) {
        check_every_failure(model.get(), make_options(false, 4), of_computation(device));
        check_every_failure(model.get(), make_options(false, 4), of_allocation(device));
    }
    check_every_failure(make_model(full_attention).get(), make_options(false, 4), of_abort(23));
}

//
// sequences that an operation was to change
//

// Two texts, and what a context that read them writes.
struct texts {
    std::vector<tokens_t> tokens;
    std::vector<size_t>   ages; // tokens read so far, of each sequence
    std::vector<logits_t> logits;

    static constexpr size_t n_more = 40; // tokens that show how a sequence goes on

    texts(llama_model * model, const options & opts, std::vector<size_t> ages, unsigned seed) : ages(std::move(ages)) {
        for (const size_t age : this->ages) {
            tokens.push_back(make_tokens(age + n_more, seed++));
            logits.push_back(eval(make_context(model, opts).get(), tokens.back(), 0, tokens.back().size()));
        }
    }

    size_t n_seqs() const { return ages.size(); }

    void read(llama_context * ctx) const {
        for (size_t s = 0; s < n_seqs(); ++s) {
            eval(ctx, tokens[s], 0, ages[s], llama_seq_id(s));
        }
    }

    // sequence seq_id has read n_past tokens of text s, and nothing else
    bool is_read(llama_context * ctx, llama_seq_id seq_id, size_t s, size_t n_past) const {
        const llama_memory_t mem = llama_get_memory(ctx);

        const llama_pos pos_min = llama_memory_seq_pos_min(mem, seq_id);
        const llama_pos pos_max = llama_memory_seq_pos_max(mem, seq_id);
        if (lminf_n_past(ctx, seq_id) != int64_t(n_past) || pos_max != llama_pos(n_past) - 1 || (pos_min == -1) != (n_past == 0)) {
            return false;
        }
        logits_t next;
        if (decode(ctx, tokens[s], n_past, n_past + n_more, seq_id, next) != 0) {
            return false;
        }
        const auto begin = logits[s].begin() + int64_t(n_past*n_vocab);
        return difference(next, { begin, begin + int64_t(n_more*n_vocab) }) < 1e-3f;
    }

    bool is_as_before(llama_context * ctx, llama_seq_id seq_id) const {
        return is_read(ctx, seq_id, size_t(seq_id), ages[size_t(seq_id)]);
    }

    bool is_as_before_or_empty(llama_context * ctx, llama_seq_id seq_id) const {
        const size_t n_past = size_t(lminf_n_past(ctx, seq_id));
        return is_read(ctx, seq_id, size_t(seq_id), n_past == ages[size_t(seq_id)] ? n_past : 0);
    }
};

static options two_sequences() {
    options res;
    res.n_seq_max = 2;
    return res;
}

// A copy that is refused changes nothing, in no memory of the model; nor does a shift.
static void test_refused_operations() {
    for (const auto & kind : hybrids) {
        const auto  model = make_model(kind);
        const texts both(model.get(), two_sequences(), { 120, 40 }, 1);
        const texts one (model.get(), two_sequences(), { 120, 0  }, 1);
        for (const texts * texts : { &both, &one }) {
            const std::function<void(llama_memory_t)> operations[] = {
                [](llama_memory_t mem) { llama_memory_seq_cp (mem, 0, 1,  0, 90);    },
                [](llama_memory_t mem) { llama_memory_seq_cp (mem, 0, 1, 50, -1);    },
                [](llama_memory_t mem) { llama_memory_seq_cp (mem, 0, 7, -1, -1);    },
                [](llama_memory_t mem) { llama_memory_seq_add(mem, 0,  0, -1, 5);    },
                [](llama_memory_t mem) { llama_memory_seq_add(mem, 0,  0, -1, -5);   },
                [](llama_memory_t mem) { llama_memory_seq_div(mem, 0,  0, -1, 2);    },
                [](llama_memory_t mem) { CHECK(!llama_memory_seq_rm(mem, 0, 100, 110)); },
                [](llama_memory_t mem) { CHECK(!llama_memory_seq_rm(mem, 0,  60,  -1)); },
            };
            for (const auto & operation : operations) {
                const auto ctx = make_context(model.get(), two_sequences());
                texts->read(ctx.get());
                operation(llama_get_memory(ctx.get()));
                const int n_before = n_failed;
                CHECK(texts->is_as_before(ctx.get(), 0));
                CHECK(texts->is_as_before(ctx.get(), 1));
                if (n_failed > n_before) {
                    fprintf(stderr, "    %s, operation %d\n", kind.name, int(&operation - operations));
                }
            }
        }
    }
}

// a copy or a restored state is there as a whole, or the sequence is as before
static void test_operations_on_a_device() {
    fake_device device;
    for (const kind & kind : { full_attention, sliding_layers }) {
        const auto  model = make_model(kind, device.get());
        const texts texts(model.get(), two_sequences(), { 120, 60 }, 1);
        for (const auto & failure : { of_allocation(device), of_computation(device) }) {
            for (const bool copies : { true, false }) {
                bool happened = true;
                for (int n = 1; happened; ++n) {
                    const auto ctx = make_context(model.get(), two_sequences());
                    texts.read(ctx.get());
                    failure.arm(n);
                    if (copies) {
                        llama_memory_seq_cp(llama_get_memory(ctx.get()), 0, 1, -1, -1);
                    } else {
                        std::vector<uint8_t> state(llama_state_seq_get_size(ctx.get(), 0));
                        CHECK(llama_state_seq_get_data(ctx.get(), state.data(), state.size(), 0) == state.size());
                        llama_state_seq_set_data(ctx.get(), state.data(), state.size(), 1);
                    }
                    happened = failure.has_happened();
                    failure.arm(0);
                    CHECK(texts.is_as_before(ctx.get(), 0));
                    CHECK(lminf_n_past(ctx.get(), 1) == 120 ? texts.is_read(ctx.get(), 1, 0, 120) :
                          happened && texts.is_as_before_or_empty(ctx.get(), 1));
                }
            }
        }
    }
}

static void test_sequences_that_do_not_exist() {
    for (const kind & kind : { full_attention, sliding_layers, hybrids[0] }) {
        const auto model = make_model(kind);
        const auto ctx   = make_context(model.get(), two_sequences());
        for (const llama_seq_id seq_id : { 2, 7, 255 }) {
            CHECK(llama_memory_seq_pos_min(llama_get_memory(ctx.get()), seq_id) == -1);
            CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx.get()), seq_id) == -1);
        }
    }
}

//
// states
//

using bytes_t = std::vector<uint8_t>;

// How a state is saved and restored: as one sequence or all, in memory or in a file.
struct form {
    const char *                                      name;
    std::function<bytes_t(llama_context *)>               save;
    std::function<bool(llama_context *, const bytes_t &)> restore;
    int                                                   n_seqs; // that a restore may change
    bool                                                  is_file;
};

static bytes_t read_file(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(file), {} };
}

static void write_file(const std::string & path, const bytes_t & bytes) {
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char *>(bytes.data()), std::streamsize(bytes.size()));
}

static std::vector<form> all_forms() {
    const std::string path = temporary_path("state.bin");
    return {
        { "all sequences",
          [](llama_context * ctx) {
              bytes_t res(llama_state_get_size(ctx));
              CHECK(llama_state_get_data(ctx, res.data(), res.size()) == res.size());
              return res;
          },
          [](llama_context * ctx, const bytes_t & bytes) { return llama_state_set_data(ctx, bytes.data(), bytes.size()) > 0; },
          2, false },
        { "a sequence",
          [](llama_context * ctx) {
              bytes_t res(llama_state_seq_get_size(ctx, 0));
              CHECK(llama_state_seq_get_data(ctx, res.data(), res.size(), 0) == res.size());
              return res;
          },
          [](llama_context * ctx, const bytes_t & bytes) { return llama_state_seq_set_data(ctx, bytes.data(), bytes.size(), 0) > 0; },
          1, false },
        { "a file of all sequences",
          [path](llama_context * ctx) {
              const llama_token tokens[] = { 1, 2, 3 };
              CHECK(llama_state_save_file(ctx, path.c_str(), tokens, 3));
              const bytes_t res = read_file(path);
              std::filesystem::remove(path);
              return res;
          },
          [path](llama_context * ctx, const bytes_t & bytes) {
              llama_token tokens[8];
              size_t      n_tokens = 0;
              write_file(path, bytes);
              const bool res = llama_state_load_file(ctx, path.c_str(), tokens, 8, &n_tokens);
              std::filesystem::remove(path);
              return res;
          },
          2, true },
        { "a file of a sequence",
          [path](llama_context * ctx) {
              const llama_token tokens[] = { 1, 2, 3 };
              CHECK(llama_state_seq_save_file(ctx, path.c_str(), 0, tokens, 3) > 0);
              const bytes_t res = read_file(path);
              std::filesystem::remove(path);
              return res;
          },
          [path](llama_context * ctx, const bytes_t & bytes) {
              llama_token tokens[8];
              size_t      n_tokens = 0;
              write_file(path, bytes);
              const bool res = llama_state_seq_load_file(ctx, path.c_str(), 0, tokens, 8, &n_tokens) > 0;
              std::filesystem::remove(path);
              return res;
          },
          1, true },
    };
}

// bytes among the head and the books, which come first, and others all over it
static std::vector<size_t> places_in(const bytes_t & bytes, bool few) {
    std::vector<size_t> res;
    for (size_t i = 0; i < std::min<size_t>(bytes.size(), 640); i += few ? 160 : 20) {
        res.push_back(i + i/20 % 8);
    }
    const size_t n = few ? 6 : 40;
    for (size_t k = 1; k <= n; ++k) {
        res.push_back((bytes.size() - 1)*k/n);
    }
    return res;
}

static void report(const kind & kind, const form & form, const char * what, size_t place) {
    fprintf(stderr, "    %s, %s, %s at byte %zu\n", kind.name, form.name, what, place);
}

// A state that is cut short is refused. A damaged one is refused, or is taken for another one: the sequence goes on then.
static void check_states(const kind & kind) {
    const auto    model = make_model(kind);
    const options opts  = two_sequences();
    const texts   saved(model.get(), opts, { 90, 33 }, 1);
    const texts   texts(model.get(), opts, { 70, 20 }, 5);

    for (const auto & form : all_forms()) {
        if (kind.is_hybrid && form.is_file) {
            continue; // llama.cpp reads its own recurrent states on past the end of a file
        }
        const auto source = make_context(model.get(), opts);
        saved.read(source.get());
        const bytes_t whole = form.save(source.get());
        {
            const auto ctx = make_context(model.get(), opts);
            texts.read(ctx.get());
            CHECK(form.restore(ctx.get(), whole));
            for (llama_seq_id s = 0; s < 2; ++s) {
                CHECK(s < form.n_seqs ? saved.is_as_before(ctx.get(), s) : texts.is_as_before(ctx.get(), s));
            }
        }
        for (const size_t place : places_in(whole, form.is_file || kind.is_hybrid)) {
            for (const bool cut : { true, false }) {
                bytes_t bytes = whole;
                if (cut) {
                    bytes.resize(place);
                } else {
                    bytes[place] ^= 0x55;
                }
                const auto ctx = make_context(model.get(), opts);
                texts.read(ctx.get());
                const bool restored = form.restore(ctx.get(), bytes);

                const int n_before = n_failed;
                CHECK(!(cut && restored));
                for (llama_seq_id s = 0; s < 2; ++s) {
                    if (s >= form.n_seqs) {
                        CHECK(texts.is_as_before(ctx.get(), s));
                    } else if (!restored) {
                        CHECK(texts.is_as_before_or_empty(ctx.get(), s));
                    } else {
                        const int64_t n_past = lminf_n_past(ctx.get(), s);
                        CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx.get()), s) == llama_pos(n_past) - 1);
                        logits_t next;
                        CHECK(decode(ctx.get(), saved.tokens[s], 0, 20, s, next) == 0);
                    }
                }
                if (n_failed > n_before) {
                    report(kind, form, cut ? "cut" : "damaged", place);
                }
            }
        }
    }
}

static void test_damaged_states() {
    check_states(full_attention);
    check_states(sliding_layers);
    check_states(hybrids[0]);
    check_states(hybrids[3]);
}

// a state of a model with other keys and values is refused, as every other difference is
static void test_states_of_other_models() {
    tiny_model_params one;
    tiny_model_params two;
    two.n_head_kv = 2;
    const model_ptr models[] = { make_tiny_model(one), make_tiny_model(two) };
    const options   opts     = two_sequences();
    for (const int i : { 0, 1 }) {
        const texts saved(models[i    ].get(), opts, { 90, 33 }, 1);
        const texts texts(models[1 - i].get(), opts, { 70, 20 }, 5);
        for (const auto & form : all_forms()) {
            const auto source = make_context(models[i].get(), opts);
            saved.read(source.get());

            const auto ctx = make_context(models[1 - i].get(), opts);
            texts.read(ctx.get());
            CHECK(!form.restore(ctx.get(), form.save(source.get())));
            for (llama_seq_id s = 0; s < 2; ++s) {
                CHECK(texts.is_as_before_or_empty(ctx.get(), s));
            }
        }
    }
}

int main(int argc, char ** argv) {
    const std::pair<const char *, void (*)()> cases[] = {
        { "refused-operations",      test_refused_operations          },
        { "other-models",            test_states_of_other_models      },
        { "damaged-states",          test_damaged_states              },
        { "device-operations",       test_operations_on_a_device      },
        { "computations",            test_computations                },
        { "computations-of-hybrids", test_computations_of_hybrids     },
        { "middle-tokens",           test_middle_tokens               },
        { "allocations",             test_allocations                 },
        { "no-such-sequence",        test_sequences_that_do_not_exist },
    };

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    for (const auto & [name, run] : cases) {
        if (argc == 1 || std::find(argv + 1, argv + argc, std::string(name)) != argv + argc) {
            printf("%s\n", name);
            fflush(stdout);
            run();
        }
    }
    printf("%d failed\n", n_failed);
    return n_failed != 0;
}
