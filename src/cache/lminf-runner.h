// Computes the memory's own small graphs (sink placement, rebase, copies of values) beside the model's graphs.
//
// It has a scheduler of its own over the context's devices, so that the context's reusable decode graph stays valid, and a
// CPU backend of its own, so that an abort callback cannot leave a rebase half done. Called by lminf-mover.cpp.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <functional>
#include <vector>

struct llama_context;

class lminf_runner {
public:
    using build_fn = std::function<void(ggml_context *, ggml_cgraph *)>;

    // Throws std::runtime_error if that is impossible.
    lminf_runner(const llama_context & lctx, size_t max_nodes);

    // Makes room for the graph that build() adds, and for every smaller one: they fail for want of memory now or never.
    // Throws std::runtime_error then.
    void reserve(const build_fn & build);

    // Computes the graph that build() adds to the given context, after set_inputs() has filled its inputs.
    // The last graph is kept: a call with the same key (not 0) skips build(). Returns false if the computation failed: what it
    // was to write is then unknown.
    bool run(uint64_t key, int n_threads, const build_fn & build, const std::function<void()> & set_inputs);

private:
    const size_t max_nodes;
    uint64_t     key_last = 0;

    ggml_backend_ptr       backend_cpu;
    ggml_backend_sched_ptr sched;
    std::vector<uint8_t>   metadata; // of the last graph
    ggml_context_ptr       ctx;
    ggml_cgraph *          gf = nullptr;

    ggml_backend_set_n_threads_t set_n_threads = nullptr;

    void build_graph(const build_fn & build);
};
