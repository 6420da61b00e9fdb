#include "lminf-products.h"

#include "llama-context.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

// How many rows there are to tell: ggml has kernels from 2, from 4 and from 8 rows on, for pairs of rows, and for what is left over.
static constexpr int64_t N_ROWS[] = { 2, 7, 8 };

template <typename F> static F cpu_function(ggml_backend_t backend, const char * name) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    return (F) ggml_backend_reg_get_proc_address(reg, name);
}

static void set_single_row(ggml_backend_t backend) {
    const auto set_use_ref = cpu_function<void (*)(ggml_backend_t, bool)>(backend, "ggml_backend_cpu_set_use_ref");
    if (!set_use_ref) {
        throw std::runtime_error("this CPU backend of ggml has no kernels of reference");
    }
    set_use_ref(backend, true);
}

void lminf_use_single_row_products(const llama_context & lctx) {
    ggml_backend_sched_t sched = lctx.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU) {
            set_single_row(backend);
        }
    }
}

// products [ne1, n] of a weight, or of its first expert, with the first n of these rows
static std::vector<float> multiply(ggml_backend_t backend, ggml_tensor * weight, const std::vector<float> & rows, int64_t n) {
    const ggml_init_params params = { /*.mem_size =*/ 8*ggml_tensor_overhead() + ggml_graph_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    const ggml_context_ptr ctx { ggml_init(params) };

    ggml_tensor * x   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, weight->ne[0], 1, n);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 1, n);
    ggml_tensor * y   = weight->ne[2] > 1 ? ggml_mul_mat_id(ctx.get(), weight, x, ids)
                                          : ggml_mul_mat   (ctx.get(), weight, ggml_reshape_2d(ctx.get(), x, weight->ne[0], n));
    ggml_cgraph * gf  = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, y);

    const ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), backend) };
    if (!buffer) {
        throw std::runtime_error("no memory to try products with the model's weights");
    }
    ggml_backend_tensor_set(x, rows.data(), 0, ggml_nbytes(x));
    ggml_backend_tensor_memset(ids, 0, 0, ggml_nbytes(ids));
    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("products with the model's weights failed");
    }
    std::vector<float> res(ggml_nelements(y));
    ggml_backend_tensor_get(y, res.data(), 0, ggml_nbytes(y));
    return res;
}

static bool has_same_bits(ggml_backend_t one_thread, ggml_backend_t two_threads, ggml_tensor * weight) {
    const int64_t n_max = *std::max_element(std::begin(N_ROWS), std::end(N_ROWS));
    const int64_t n_in  = weight->ne[0];

    std::vector<float> rows(n_in*n_max);
    for (size_t i = 0; i < rows.size(); ++i) {
        rows[i] = std::sin(1.0f + 0.37f*(float) i*(1.0f + 0.01f*(float) (i % 31))); // anything that is not regular
    }
    std::vector<float> alone;
    for (int64_t j = 0; j < n_max; ++j) {
        const auto y = multiply(one_thread, weight, { rows.begin() + j*n_in, rows.begin() + (j + 1)*n_in }, 1);
        alone.insert(alone.end(), y.begin(), y.end());
    }
    return std::all_of(std::begin(N_ROWS), std::end(N_ROWS), [&](int64_t n) {
        const auto together = multiply(two_threads, weight, rows, n);
        return std::memcmp(together.data(), alone.data(), together.size()*sizeof(float)) == 0;
    });
}

static ggml_backend_ptr make_backend(int n_threads, bool single_row) {
    ggml_backend_ptr res { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    if (!res) {
        throw std::runtime_error("no CPU backend to try products");
    }
    cpu_function<ggml_backend_set_n_threads_t>(res.get(), "ggml_backend_set_n_threads")(res.get(), n_threads);
    if (single_row) {
        set_single_row(res.get());
    }
    return res;
}

// lookup tables that only the token's row is taken of, and vectors, are not multiplied with
static bool is_factor(const llama_model & model, const ggml_tensor * weight) {
    if (weight->ne[1] == 1 || !weight->buffer || (weight == model.tok_embd && model.output != model.tok_embd)) {
        return false;
    }
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(weight->buffer));
    return !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

std::string lminf_why_not_same_bits(const llama_model & model) {
    if (model.arch == LLM_ARCH_MINIMAX_01) {
        return "linear attention takes the tokens of a micro-batch together";
    }
    if (model.arch == LLM_ARCH_CHAMELEON) {
        return "llama.cpp rules image tokens out after the first token of a batch only";
    }
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            return std::string(ggml_backend_dev_description(dev)) + " computes products of long batches: build without it";
        }
    }
    for (const auto & weights : lminf_try_products(model, true)) {
        if (!weights.same_bits) {
            return std::string("products with ") + ggml_type_name(weights.type) + " weights in a buffer of type " +
                ggml_backend_buft_name(weights.buft) + " do: load the model with use_extra_bufts = false";
        }
    }
    return "";
}

std::vector<lminf_weights> lminf_try_products(const llama_model & model, bool single_row) {
    if (model.hparams.no_alloc || model.hparams.vocab_only) {
        return {};
    }
    struct kind { lminf_weights weights; ggml_tensor * smallest; bool has_experts; };
    std::vector<kind> kinds;

    for (const auto & [name, weight] : model.tensors_by_name) {
        if (!is_factor(model, weight)) {
            continue;
        }
        auto * buft = ggml_backend_buffer_get_type(weight->buffer);
        const bool has_experts = weight->ne[2] > 1;
        auto it = std::find_if(kinds.begin(), kinds.end(), [&, w = weight](const kind & k) {
            return k.weights.type == w->type && k.weights.buft == buft && k.has_experts == has_experts;
        });
        if (it == kinds.end()) {
            it = kinds.insert(it, { { weight->type, buft, 0, true }, weight, has_experts });
        }
        it->weights.n_bytes += ggml_nbytes(weight);
        if (ggml_nbytes(weight) < ggml_nbytes(it->smallest)) {
            it->smallest = weight;
        }
    }

    const auto one_thread  = make_backend(1, single_row);
    const auto two_threads = make_backend(2, single_row);

    std::vector<lminf_weights> res;
    for (auto & [weights, smallest, _] : kinds) {
        weights.same_bits = has_same_bits(one_thread.get(), two_threads.get(), smallest);
        const auto it = std::find_if(res.begin(), res.end(), [&, w = weights](const lminf_weights & other) {
            return other.type == w.type && other.buft == w.buft;
        });
        if (it == res.end()) {
            res.push_back(weights);
        } else {
            it->n_bytes   += weights.n_bytes;
            it->same_bits &= weights.same_bits;
        }
    }
    std::stable_sort(res.begin(), res.end(), [](const auto & a, const auto & b) { return a.n_bytes > b.n_bytes; });
    return res;
}
