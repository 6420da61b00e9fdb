// Models on a device whose memory the CPU cannot reach: the same text as on the CPU, or a refusal with its reason.
//
//   test_devices [CASE ...]
//
// A case that goes wrong may end the process, as it would on a GPU: the name of each is printed before it begins.

#include "fake_device.h"
#include "small_context.h"
#include "tiny_model.h"

#include <unistd.h>

#include <filesystem>
#include <string>
#include <utility>

static std::string model_path;

// n_layers: of the device, counted from the last, with the output as one more
static model_ptr load_model(ggml_backend_dev_t device, int n_layers = 99) {
    ggml_backend_dev_t devices[] = { device, nullptr };

    llama_model_params params = llama_model_default_params();
    params.devices      = devices;
    params.n_gpu_layers = n_layers;
    model_ptr res(llama_model_load_from_file(model_path.c_str(), params), llama_model_free);
    CHECK(res);
    return res;
}

static bool is_quantised_copy(const ggml_tensor * op) {
    return (op->op == GGML_OP_CPY || op->op == GGML_OP_DUP || op->op == GGML_OP_CONT) &&
        ggml_is_quantized(op->src[0]->type) && ggml_is_quantized(op->type);
}

// rounding of a quantised cache depends on how sums run, and so does that of flash attention
static float tolerance(const options & opts) {
    return opts.type == GGML_TYPE_F32 && !opts.flash_attn ? 1e-4f : 5e-2f;
}

static std::vector<options> all_caches() {
    std::vector<options> res;
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const bool flash_attn : { false, true }) {
            options opts;
            opts.type       = type;
            opts.flash_attn = flash_attn;
            res.push_back(opts);
        }
    }
    return res;
}

// A prompt, single tokens, and a prompt again: sink tokens are captured and placed, keys evicted, the window rebased.
static logits_t read_text(llama_context * ctx, const tokens_t & tokens, llama_seq_id seq_id = 0) {
    logits_t res;
    for (const auto & [i0, i1] : { std::pair(0, 70), std::pair(70, 150), std::pair(150, 300) }) {
        for (int i = i0; i < i1; i += i0 == 70 ? 1 : 64) {
            const logits_t next = eval(ctx, tokens, size_t(i), size_t(i0 == 70 ? i + 1 : std::min(i + 64, i1)), seq_id);
            res.insert(res.end(), next.begin(), next.end());
        }
    }
    return res;
}

// the text is read as on the CPU, which computes the same attention as the device, llama.cpp's
static void check_agrees(ggml_backend_dev_t device, int n_layers, const options & opts) {
    const model_ptr on_device = load_model(device, n_layers);
    const model_ptr on_cpu    = load_model(nullptr);
    const tokens_t  tokens    = make_tokens(300, 1);

    const context_ptr ctx = make_context(on_device.get(), opts);
    setenv("LMINF_ATTENTION", "stock", 1);
    const context_ptr same = make_context(on_cpu.get(), opts);
    unsetenv("LMINF_ATTENTION");
    CHECK(difference(read_text(ctx.get(), tokens), read_text(same.get(), tokens)) < tolerance(opts));

    lminf_stats stats;
    CHECK(lminf_get_stats(ctx.get(), 0, &stats) && stats.n_evicted > 200 && stats.n_placements > 0);
    CHECK(opts.n_rebase == 0 || stats.n_rebases > 0);
}

static void test_streams() {
    const fake_device device;
    for (options opts : all_caches()) {
        const int n_before = device.n_computations();
        for (const uint32_t n_rebase : { 0u, 1u }) {
            opts.n_rebase = n_rebase;
            check_agrees(device.get(), 99, opts);
        }
        CHECK(device.n_computations() > n_before + 100);
    }
}

// layers on both sides, and products that only borrow the device
static void test_shared_work() {
    const fake_device device;
    for (const int n_layers : { 0, 1, 2 }) {
        for (options opts : all_caches()) {
            opts.n_rebase = 1;
            const int n_before = device.n_computations();
            check_agrees(device.get(), n_layers, opts);
            CHECK(device.n_computations() > n_before);
        }
    }
}

// what is not computed stays on the device too: removal, copies, saved states
static void test_sequences() {
    const fake_device device;
    const model_ptr   model  = load_model(device.get());
    const tokens_t    tokens = make_tokens(300, 2);
    const tokens_t    other  = make_tokens(300, 3);
    for (options opts : all_caches()) {
        opts.n_seq_max = 2;
        const context_ptr    ctx = make_context(model.get(), opts);
        const llama_memory_t mem = llama_get_memory(ctx.get());

        eval(ctx.get(), tokens, 0, 200);
        eval(ctx.get(), other, 200, 210);
        CHECK(llama_memory_seq_rm(mem, 0, 200, -1));
        llama_memory_seq_cp(mem, 0, 1, -1, -1);

        std::vector<uint8_t> state(llama_state_seq_get_size(ctx.get(), 0));
        CHECK(llama_state_seq_get_data(ctx.get(), state.data(), state.size(), 0) == state.size());

        const context_ptr never = make_context(model.get(), opts);
        eval(never.get(), tokens, 0, 200);
        const logits_t expected = eval(never.get(), tokens, 200, 300);

        CHECK(difference(eval(ctx.get(), tokens, 200, 300, 0), expected) < tolerance(opts));
        CHECK(difference(eval(ctx.get(), tokens, 200, 300, 1), expected) < tolerance(opts));
        CHECK(llama_state_seq_set_data(ctx.get(), state.data(), state.size(), 1) == state.size());
        CHECK(difference(eval(ctx.get(), tokens, 200, 300, 1), expected) < tolerance(opts));
    }
}

// Metal copies quantised values only into F32 and F16
static void test_without_quantised_copies() {
    fake_device_traits metal;
    metal.refuses = is_quantised_copy;
    const fake_device device(metal);
    for (options opts : all_caches()) {
        opts.n_rebase = 1;
        check_agrees(device.get(), 99, opts);
    }
}

// Middle tokens are stored and looked up by the CPU: what it cannot reach is refused, or brought to it
static void check_middle(ggml_backend_dev_t device, int n_layers, bool must_work) {
    const model_ptr on_device = load_model(device, n_layers);
    const model_ptr on_cpu    = load_model(nullptr);
    const tokens_t  tokens    = make_tokens(300, 4);

    for (const bool flash_attn : { false, true }) {
        options opts;
        opts.n_recalled = 4;
        opts.flash_attn = flash_attn;
        opts.n_rebase   = 1;

        const context_ptr ctx = try_context(on_device.get(), opts);
        if (!ctx) {
            CHECK(!must_work);
            CHECK(lminf_last_status() == LMINF_STATUS_UNSUPPORTED);
            CHECK(std::string(lminf_last_error()).find("device") != std::string::npos);
            continue;
        }
        const logits_t logits = read_text(ctx.get(), tokens);

        const context_ptr same = make_context(on_cpu.get(), opts);
        CHECK(difference(logits, read_text(same.get(), tokens)) < tolerance(opts));
        CHECK(lminf_set_recall(same.get(), LMINF_RECALL_OFF));
        llama_memory_clear(llama_get_memory(same.get()), true);
        CHECK(difference(logits, read_text(same.get(), tokens)) > 1e-2f); // it does recall
    }
}

static void test_middle_in_host_memory() {
    fake_device_traits one_chip;
    one_chip.host_memory = true;
    const fake_device device(one_chip);
    check_middle(nullptr, 0, true);
    check_middle(device.get(), 99, false);
}

static void test_middle_of_offloaded_products() {
    const fake_device device;
    check_middle(device.get(), 0, false);
}

static void test_middle_of_offloaded_layers() {
    const fake_device device;
    for (const int n_layers : { 1, 2, 99 }) {
        check_middle(device.get(), n_layers, false);
    }
}

// a server elsewhere, which says that it can compute whatever it is sent
static void test_middle_elsewhere() {
    fake_device_traits server;
    server.claims_custom = true;
    const fake_device device(server);
    for (const int n_layers : { 0, 1, 99 }) {
        check_middle(device.get(), n_layers, false);
    }
}

int main(int argc, char ** argv) {
    const std::pair<const char *, void (*)()> cases[] = {
        { "streams",                  test_streams                     },
        { "shared-work",              test_shared_work                 },
        { "sequences",                test_sequences                   },
        { "middle-host-memory",       test_middle_in_host_memory       },
        { "without-quantised-copies", test_without_quantised_copies    },
        { "middle-products",          test_middle_of_offloaded_products },
        { "middle-layers",            test_middle_of_offloaded_layers  },
        { "middle-elsewhere",         test_middle_elsewhere            },
    };

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    model_path = (std::filesystem::temp_directory_path() / ("lminf-test-devices-" + std::to_string(getpid()) + ".gguf")).string();

    tiny_model_params params;
    params.n_embd    = 128; // heads of 64: quantised keys are rotated
    params.n_head_kv = 2;
    write_tiny_model(model_path, params);

    for (const auto & [name, run] : cases) {
        if (argc == 1 || std::find(argv + 1, argv + argc, std::string(name)) != argv + argc) {
            printf("%s\n", name);
            fflush(stdout);
            run();
        }
    }
    std::filesystem::remove(model_path);

    printf("%d failed\n", n_failed);
    return n_failed != 0;
}
