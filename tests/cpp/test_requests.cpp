// What llama_init_from_model() makes of the parameters that lminf_use_params() was given.

#include "check.h"
#include "lminf-hooks.h"
#include "lminf-memory.h"
#include "lminf.h"
#include "random_model.h"

#include "ggml-cpp.h"
#include "llama-arch.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-kv-cache.h"

#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>

static lminf_params params_with_store(const char * path) {
    lminf_params params = lminf_default_params();
    params.n_window           = 32;
    params.middle.k           = 4;
    params.middle.layer_begin = 0;
    params.middle.max_tokens  = 100;
    params.middle.path        = path;
    return params;
}

static llama_context_params small_context() {
    llama_context_params params = llama_context_default_params();
    params.n_ctx    = 64;
    params.n_batch  = 16;
    params.n_ubatch = 16;
    return params;
}

// The caller's text may be gone by the time that a context is made.
static void test_a_request_keeps_the_path(llama_model & model) {
    const auto        folder = std::filesystem::temp_directory_path();
    const std::string path   = (folder / "lminf-test-requests-store").string();
    {
        std::string given  = path;
        const auto  params = params_with_store(given.c_str());
        lminf_use_params(&params);
        given.assign(given.size(), '!');
    }
    const llama_context_ptr ctx(llama_init_from_model(&model, small_context()));
    CHECK(ctx);

    lminf_params used = {};
    CHECK(lminf_get_params(ctx.get(), &used) && used.middle.path && used.middle.path == path);
    CHECK(std::filesystem::exists(path));

    // the next one is not in the way of the first
    lminf_use_params(nullptr);
    const llama_context_ptr plain(llama_init_from_model(&model, small_context()));
    CHECK(plain && !lminf_get_params(plain.get(), nullptr));
    CHECK(lminf_get_params(ctx.get(), &used) && used.middle.path == path);

    lminf_use_environment();
    std::filesystem::remove(path);
}

// No model of this llama.cpp builds its attention without asking the cache for it; a later one may. Here the memory of a context
// is made, and graphs are begun as when the context reserves them, but no layer asks.
static void test_attention_that_does_not_ask_is_refused(llama_model & model) {
    const auto params = params_with_store(nullptr);
    lminf_use_params(&params);
    const llama_context_ptr usual(llama_init_from_model(&model, small_context()));
    CHECK(usual);

    const llama_memory_params memory_params = {
        /*.type_k    =*/ GGML_TYPE_F16,
        /*.type_v    =*/ GGML_TYPE_F16,
        /*.swa_full  =*/ true,
        /*.ctx_type  =*/ LLAMA_CONTEXT_TYPE_DEFAULT,
        /*.mem_other =*/ nullptr,
    };
    llama_cparams cparams = usual->get_cparams();

    const std::unique_ptr<llama_memory_i> memory(lminf_create_memory(*usual, model, memory_params, cparams));
    const auto * ours = dynamic_cast<lminf_memory *>(memory.get());
    CHECK(ours);
    const llama_kv_cache * kv = &ours->get_cache();

    const ggml_init_params iparams = { /*.mem_size =*/ 64*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    const ggml_context_ptr graph { ggml_init(iparams) };

    llama_ubatch ubatch = {};
    ubatch.n_tokens = 4;
    kv->build_input_k_idxs(graph.get(), ubatch);

    std::string reason;
    try {
        kv->build_input_k_idxs(graph.get(), ubatch);
    } catch (const std::runtime_error & error) {
        reason = error.what();
    }
    CHECK(reason.find("built in a way of its own") != std::string::npos);
    CHECK(lminf_last_status() == LMINF_STATUS_UNSUPPORTED && reason == lminf_last_error());

    lminf_use_environment();
}

int main() {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    std::string error;
    const llama_model_ptr model = make_random_model(LLM_ARCH_LLAMA, {}, error);
    CHECK(model);
    if (model) {
        test_a_request_keeps_the_path(*model);
        test_attention_that_does_not_ask_is_refused(*model);
    }
    return n_failed > 0;
}
