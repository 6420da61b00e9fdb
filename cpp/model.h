// A loaded GGUF model, shared by the contexts and samplers made from it.

#pragma once

#include "llama.h"

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <vector>

namespace lminf_python {

using token_array = pybind11::array_t<llama_token, pybind11::array::c_style>;

struct model_deleter {
    void operator()(llama_model * model) const { llama_model_free(model); }
};

struct Model {
    std::unique_ptr<llama_model, model_deleter> ptr;
    const llama_vocab *                         vocab = nullptr;
    std::string                                 path;
    bool                                        verbose = false;

    int32_t n_vocab() const { return llama_vocab_n_tokens(vocab); }

    // Throws error_type::config: llama.cpp indexes tables with token ids without looking.
    void check_tokens(const llama_token * tokens, size_t n) const;
};

} // namespace lminf_python
