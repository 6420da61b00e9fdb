// Matrix products whose result does not depend on how many rows are multiplied at once. Joined to ggml's CPU backend, not to libllama.
//
// ggml-cpu.c is compiled with lminf_sgemm() in the place of llamafile_sgemm() (CMakeLists.txt). It offers a product to it, and where
// the answer is false computes it itself. For a backend with use_ref (lminf_use_single_row_products()), a product of several rows is
// computed here, by the kernel that ggml has for a single row; a single row is left to ggml, which does the same with it.

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "llamafile/sgemm.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

extern "C" decltype(llamafile_sgemm) lminf_sgemm;

// rows of weights that stay in the processor's cache while they meet all others
static constexpr int64_t N_ROWS = 16;

// As llamafile_sgemm(): C[j][i] = A[i]*B[j] for m rows of A and n of B. k, lda, ldb and ldc count blocks of their types.
extern "C" bool lminf_sgemm(const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * A, int64_t lda,
        const void * B, int64_t ldb, void * C, int64_t ldc, int type_a, int type_b, int type_c) {
    if (!params->use_ref) {
        return llamafile_sgemm(params, m, n, k, A, lda, B, ldb, C, ldc, type_a, type_b, type_c);
    }
    const auto   type   = (ggml_type) type_a;
    const auto * traits = ggml_get_type_traits_cpu(type);
    if (n < 2 || type_b != traits->vec_dot_type || type_c != GGML_TYPE_F32) {
        return false;
    }
    const size_t  row_a = lda*ggml_type_size(type);
    const size_t  row_b = ldb*ggml_type_size(traits->vec_dot_type);
    const int     n_col = (int) (k*ggml_blck_size(type));
    const int64_t begin = m*params->ith/params->nth;
    const int64_t end   = m*(params->ith + 1)/params->nth;

    for (int64_t i0 = begin; i0 < end; i0 += N_ROWS) {
        for (int64_t j = 0; j < n; ++j) {
            for (int64_t i = i0; i < std::min(i0 + N_ROWS, end); ++i) {
                traits->vec_dot(n_col, (float *) C + j*ldc + i, 0, (const char *) A + i*row_a, 0, (const char *) B + j*row_b, 0, 1);
            }
        }
    }
    return true;
}
