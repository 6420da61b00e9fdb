// Computes the memory's own small graphs (sink placement, rebase, copies of values) beside the model's graphs.
//
// It has a scheduler of its own over the context's devices, so that the context's reusable decode graph stays valid, and a
// CPU backend of its own, so that an abort callback cannot leave a rebase half done. Called by lminf-kv-cache.cpp.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <functional>

struct llama_context;

class lminf_runner {
public:
    lminf_runner(const llama_context & lctx, size_t max_nodes);

    // Computes the graph that build() adds to the given context, after set_inputs() has filled its inputs.
    // The last graph is kept: a call with the same key (not 0) skips build(). Returns false if the computation failed.
    bool run(uint64_t key, int n_threads,
             const std::function<void(ggml_context *, ggml_cgraph *)> & build,
             const std::function<void()> & set_inputs);

private:
    size_t   max_nodes;
    uint64_t key_last = 0;

    ggml_backend_ptr       backend_cpu;
    ggml_backend_sched_ptr sched;
    ggml_context_ptr       ctx;
    ggml_cgraph *          gf = nullptr;

    ggml_backend_set_n_threads_t set_n_threads = nullptr;
};
