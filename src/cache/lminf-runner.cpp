#include "lminf-runner.h"

#include "llama-context.h"

#include <stdexcept>
#include <vector>

lminf_runner::lminf_runner(const llama_context & lctx, size_t max_nodes) :
    max_nodes(max_nodes), metadata(ggml_tensor_overhead()*max_nodes + ggml_graph_overhead_custom(max_nodes, false)) {
    backend_cpu.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!backend_cpu) {
        throw std::runtime_error("no CPU backend for the cache's own graphs");
    }

    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_cpu.get()));
    set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");

    std::vector<ggml_backend_t>             backends;
    std::vector<ggml_backend_buffer_type_t> bufts;

    ggml_backend_sched_t other = lctx.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(other); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(other, i);

        bufts.push_back(ggml_backend_sched_get_buffer_type(other, backend));

        const bool is_cpu = ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU;
        backends.push_back(is_cpu ? backend_cpu.get() : backend);
    }

    sched.reset(ggml_backend_sched_new(backends.data(), bufts.data(), (int) backends.size(), max_nodes, false, false));
    if (!sched) {
        throw std::runtime_error("no scheduler for the cache's own graphs");
    }
}

void lminf_runner::build_graph(const build_fn & build) {
    key_last = 0;

    const ggml_init_params params = {
        /*.mem_size   =*/ metadata.size(),
        /*.mem_buffer =*/ metadata.data(),
        /*.no_alloc   =*/ true,
    };
    ctx.reset(ggml_init(params));
    gf = ggml_new_graph_custom(ctx.get(), max_nodes, false);

    build(ctx.get(), gf);

    ggml_backend_sched_reset(sched.get());
}

void lminf_runner::reserve(const build_fn & build) {
    build_graph(build);
    if (ggml_graph_n_nodes(gf) > 0 && !ggml_backend_sched_reserve(sched.get(), gf)) {
        throw std::runtime_error("failed to allocate what placing sink tokens and a rebase need");
    }
}

bool lminf_runner::run(uint64_t key, int n_threads, const build_fn & build, const std::function<void()> & set_inputs) {
    if (key == 0 || key != key_last) {
        build_graph(build);
        if (ggml_graph_n_nodes(gf) == 0) {
            return true;
        }
        if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
            return false;
        }
        key_last = key;
    }

    if (set_n_threads) {
        set_n_threads(backend_cpu.get(), n_threads);
    }
    set_inputs();

    if (ggml_backend_sched_graph_compute(sched.get(), gf) != GGML_STATUS_SUCCESS) {
        key_last = 0;
        return false;
    }
    return true;
}
