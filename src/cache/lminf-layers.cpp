#include "lminf-layers.h"

#include "ggml-backend.h"
#include "llama-impl.h"

#include <algorithm>
#include <set>

#if defined(__linux__)
#include <sys/mman.h>
#endif

ggml_tensor * lminf_layer::k_rows(ggml_context * ctx) const {
    return ggml_reshape_2d(ctx, k, k->ne[0], k->ne[1]*k->ne[2]);
}

ggml_tensor * lminf_layer::v_rows(ggml_context * ctx) const {
    return ggml_reshape_2d(ctx, v, v->ne[0], v->ne[1]*v->ne[2]);
}

ggml_tensor * lminf_layer::unstored(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * delta) const {
    if (hadamard()) { // its own inverse
        keys = llama_mul_mat_hadamard(ctx, keys, hadamard());
    }
    return rope.shift(ctx, keys, delta);
}

ggml_tensor * lminf_layer::restored(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * delta) const {
    keys = rope.shift(ctx, keys, delta);
    return hadamard() ? llama_mul_mat_hadamard(ctx, keys, hadamard()) : keys;
}

bool lminf_layers::is_host() const {
    const auto is_host = [](const ggml_tensor * t) { return !t || ggml_backend_buffer_is_host(t->buffer); };
    return std::all_of(all.begin(), all.end(), [&](const auto & layer) { return is_host(layer.k) && is_host(layer.v); });
}

#if defined(__linux__)

static void use_large_pages_in(const ggml_backend_buffer_t buffer) {
    constexpr uintptr_t SIZE     = 2 << 20; // on x86-64, and on aarch64 with pages of 4 KiB
    constexpr int       COLLAPSE = 25;      // MADV_COLLAPSE, Linux 6.1

    const auto      base  = (uintptr_t) ggml_backend_buffer_get_base(buffer);
    const uintptr_t begin = GGML_PAD(base, SIZE);
    const uintptr_t end   = (base + ggml_backend_buffer_get_size(buffer))/SIZE*SIZE;
    if (begin < end) {
        // advice: where the system does not follow it, everything works as before
        madvise((void *) begin, end - begin, MADV_HUGEPAGE);
        madvise((void *) begin, end - begin, COLLAPSE);
    }
}

#else

static void use_large_pages_in(const ggml_backend_buffer_t /*buffer*/) {}

#endif

void lminf_layers::use_large_pages() const {
    std::set<ggml_backend_buffer_t> buffers;
    for (const auto & layer : all) {
        for (const ggml_tensor * t : { layer.k, layer.v }) {
            if (t && t->data && ggml_backend_buffer_is_host(t->buffer) && buffers.insert(t->buffer).second) {
                use_large_pages_in(t->buffer);
            }
        }
    }
}

std::vector<int32_t> lminf_layers::rope_positions(const std::vector<int32_t> & pos) const {
    std::vector<int32_t> res;
    for (uint32_t i = 0; i < n_pos_per_embd; ++i) {
        for (const int32_t p : pos) {
            res.push_back(i < 3 ? p : 0);
        }
    }
    return res;
}

ggml_tensor * lminf_layers::new_positions(ggml_context * ctx, int64_t n) const {
    ggml_tensor * res = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n*n_pos_per_embd);
    ggml_set_input(res);
    return res;
}

void lminf_layers::set_positions(ggml_tensor * input, const std::vector<int32_t> & pos) const {
    if (input->buffer) {
        ggml_backend_tensor_set(input, rope_positions(pos).data(), 0, ggml_nbytes(input));
    }
}
