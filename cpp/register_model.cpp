#include "errors.h"
#include "interrupt.h"
#include "lminf.h"
#include "log.h"
#include "model.h"
#include "module.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <map>
#include <optional>
#include <tuple>

namespace py = pybind11;

namespace lminf_python {

void Model::check_tokens(const llama_token * tokens, size_t n) const {
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= n_vocab()) {
            throw error(error_type::config,
                "token " + std::to_string(tokens[i]) + " at index " + std::to_string(i) +
                    " is outside the vocabulary (0 to " + std::to_string(n_vocab() - 1) + ")");
        }
    }
}

// llama.cpp aborts the process when it has no tokenizer
static void require_tokenizer(const Model & model) {
    if (llama_vocab_type(model.vocab) == LLAMA_VOCAB_TYPE_NONE) {
        throw error(error_type::unsupported_model, "the model has no tokenizer");
    }
}

static bool is_unsupported(const std::string & reason) {
    return reason.find("unknown model architecture") != std::string::npos ||
        reason.find("unknown pre-tokenizer type") != std::string::npos;
}

struct load_progress {
    interrupt_check check;
    py::object      callable;
};

static bool on_load_progress(float fraction, void * data) {
    auto * progress = static_cast<load_progress *>(data);
    if (!progress->callable.is_none() && progress->check.call([&] { progress->callable(fraction); })) {
        return false;
    }
    return !progress->check.poll();
}

static std::shared_ptr<Model> load_model(const std::string & path, int32_t n_gpu_layers, bool use_mmap, bool use_mlock,
    bool vocab_only, bool no_alloc, bool deterministic, bool verbose, const py::object & progress) {
    load_progress state;
    state.callable = progress;

    llama_model_params params = llama_model_default_params();
    if (deterministic) {
        params = lminf_deterministic_model_params(params);
    }
    params.n_gpu_layers                = n_gpu_layers;
    params.load_mode                   = use_mlock ? (use_mmap ? LLAMA_LOAD_MODE_MMAP_MLOCK : LLAMA_LOAD_MODE_MLOCK)
                                                   : (use_mmap ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE);
    params.vocab_only                  = vocab_only;
    params.no_alloc                    = no_alloc;
    params.progress_callback           = on_load_progress;
    params.progress_callback_user_data = &state;

    auto            model = std::make_shared<Model>();
    const log_scope scope(verbose);
    {
        const py::gil_scoped_release released;
        model->ptr.reset(llama_model_load_from_file(path.c_str(), params));
    }
    state.check.rethrow();
    if (!model->ptr) {
        const std::string reason = scope.explain("cannot load " + path);
        throw error(is_unsupported(reason) ? error_type::unsupported_model : error_type::model_load, reason);
    }
    model->vocab   = llama_model_get_vocab(model->ptr.get());
    model->path    = path;
    model->verbose = verbose;
    return model;
}

static token_array tokenize(const Model & model, const std::string & text, bool add_special, bool parse_special) {
    require_tokenizer(model);
    if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()) - 16) {
        throw error(
            error_type::config, "text of " + std::to_string(text.size()) + " bytes: tokenize at most 2 GiB at once");
    }
    std::vector<llama_token> tokens(text.size() + 16);
    {
        const py::gil_scoped_release released;
        const auto                   size = static_cast<int32_t>(text.size());

        int32_t n = llama_tokenize(model.vocab, text.data(), size, tokens.data(), static_cast<int32_t>(tokens.size()),
            add_special, parse_special);
        if (n < 0 && n != std::numeric_limits<int32_t>::min()) {
            tokens.resize(-n);
            n = llama_tokenize(model.vocab, text.data(), size, tokens.data(), -n, add_special, parse_special);
        }
        if (n < 0) {
            throw error(error_type::state, "llama.cpp cannot tokenize this text");
        }
        tokens.resize(n);
    }
    return token_array(static_cast<py::ssize_t>(tokens.size()), tokens.data());
}

static py::bytes detokenize(
    const Model & model, const token_array & tokens, bool remove_special, bool unparse_special) {
    require_tokenizer(model);
    model.check_tokens(tokens.data(), tokens.size());
    std::string text(tokens.size() * 8 + 16, '\0');

    const auto n_tokens = static_cast<int32_t>(tokens.size());
    const auto convert  = [&] {
        return llama_detokenize(model.vocab, tokens.data(), n_tokens, text.data(), static_cast<int32_t>(text.size()),
            remove_special, unparse_special);
    };
    int32_t n = convert();
    if (n < 0) {
        text.resize(-n);
        n = convert();
    }
    return py::bytes(text.data(), n);
}

static py::bytes token_to_piece(const Model & model, llama_token token, bool special) {
    require_tokenizer(model);
    model.check_tokens(&token, 1);
    std::string piece(32, '\0');

    const auto convert = [&] {
        return llama_token_to_piece(model.vocab, token, piece.data(), static_cast<int32_t>(piece.size()), 0, special);
    };
    int32_t n = convert();
    if (n < 0) {
        piece.resize(-n);
        n = convert();
    }
    return py::bytes(piece.data(), n);
}

// Spellings of the tokens that stand for structure, such as the beginning of a turn, and not for text.
static std::vector<py::bytes> control_tokens(const Model & model) {
    require_tokenizer(model);
    std::vector<py::bytes> texts;
    for (llama_token token = 0; token < model.n_vocab(); token++) {
        if (llama_vocab_is_control(model.vocab, token)) {
            texts.emplace_back(token_to_piece(model, token, true));
        }
    }
    return texts;
}

// snprintf-like functions of llama.h: they return the length without the final zero
template <typename F> static std::string read_string(F && f) {
    std::string   text(256, '\0');
    const int32_t n = f(text.data(), text.size());
    if (n < 0) {
        return "";
    }
    if (static_cast<size_t>(n) >= text.size()) {
        text.resize(n + 1);
        f(text.data(), text.size());
    }
    text.resize(n);
    return text;
}

static py::str lenient_str(const std::string & text) {
    return py::reinterpret_steal<py::str>(
        PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "replace"));
}

static py::dict metadata(const Model & model) {
    const llama_model * ptr = model.ptr.get();
    py::dict            result;
    for (int32_t i = 0; i < llama_model_meta_count(ptr); i++) {
        const auto key =
            read_string([&](char * buf, size_t size) { return llama_model_meta_key_by_index(ptr, i, buf, size); });
        const auto val =
            read_string([&](char * buf, size_t size) { return llama_model_meta_val_str_by_index(ptr, i, buf, size); });
        result[lenient_str(key)] = lenient_str(val);
    }
    return result;
}

static py::object chat_template(const Model & model) {
    const char * text = llama_model_chat_template(model.ptr.get(), nullptr);
    return text ? py::object(lenient_str(text)) : py::object(py::none());
}

// (type, type of buffer, bytes, whether products with them have the same bits alone and among others)
static std::vector<std::tuple<std::string, std::string, uint64_t, bool>> weights(
    const Model & model, bool deterministic) {
    std::vector<lminf_weights_info> found(64);
    {
        const py::gil_scoped_release released;
        const int32_t                n_max = static_cast<int32_t>(found.size());
        found.resize(static_cast<size_t>(std::min(n_max, lminf_get_weights(model.ptr.get(), deterministic, found.data(), n_max))));
    }
    std::vector<std::tuple<std::string, std::string, uint64_t, bool>> result;
    for (const auto & info : found) {
        result.emplace_back(
            ggml_type_name(static_cast<ggml_type>(info.type)), info.buffer_type, info.n_bytes, info.same_bits);
    }
    return result;
}

static py::str description(const Model & model) {
    return lenient_str(
        read_string([&](char * buf, size_t size) { return llama_model_desc(model.ptr.get(), buf, size); }));
}

void register_model(py::module_ & m) {
    using model_ptr = const llama_model *;

    const auto of_model = [](auto f) {
        return [f](const Model & model) { return f(static_cast<model_ptr>(model.ptr.get())); };
    };
    const auto of_vocab = [](auto f) { return [f](const Model & model) { return f(model.vocab); }; };

    py::class_<Model, std::shared_ptr<Model>>(m, "Model")
        .def(py::init(&load_model), py::arg("path"), py::kw_only(), py::arg("n_gpu_layers") = 0,
            py::arg("use_mmap") = true, py::arg("use_mlock") = false, py::arg("vocab_only") = false,
            py::arg("no_alloc") = false, py::arg("deterministic") = false, py::arg("verbose") = false, py::arg("progress") = py::none())
        .def_readonly("path", &Model::path)
        .def_property_readonly("n_vocab", &Model::n_vocab)
        .def_property_readonly("n_ctx_train", of_model(llama_model_n_ctx_train))
        .def_property_readonly("n_layer", of_model(llama_model_n_layer))
        .def_property_readonly("n_embd", of_model(llama_model_n_embd))
        .def_property_readonly("n_head", of_model(llama_model_n_head))
        .def_property_readonly("n_head_kv", of_model(llama_model_n_head_kv))
        .def_property_readonly("n_params", of_model(llama_model_n_params))
        .def_property_readonly("n_bytes", of_model(llama_model_size))
        .def_property_readonly("has_encoder", of_model(llama_model_has_encoder))
        .def_property_readonly("has_decoder", of_model(llama_model_has_decoder))
        .def_property_readonly("is_recurrent", of_model(llama_model_is_recurrent))
        .def_property_readonly("is_hybrid", of_model(llama_model_is_hybrid))
        .def_property_readonly("description", &description)
        .def_property_readonly("metadata", &metadata)
        .def_property_readonly("chat_template", &chat_template)
        .def("weights", &weights, py::arg("deterministic") = false)
        .def_property_readonly("bos", of_vocab(llama_vocab_bos))
        .def_property_readonly("eos", of_vocab(llama_vocab_eos))
        .def_property_readonly("add_bos", of_vocab(llama_vocab_get_add_bos))
        .def_property_readonly("control_tokens", &control_tokens)
        .def(
            "is_eog",
            [](const Model & model, llama_token token) {
                model.check_tokens(&token, 1);
                return llama_vocab_is_eog(model.vocab, token);
            },
            py::arg("token"))
        .def(
            "check_tokens",
            [](const Model & model, const token_array & tokens) { model.check_tokens(tokens.data(), tokens.size()); },
            py::arg("tokens").noconvert())
        .def("tokenize", &tokenize, py::arg("text"), py::arg("add_special"), py::arg("parse_special"))
        .def("detokenize", &detokenize, py::arg("tokens").noconvert(), py::arg("remove_special"),
            py::arg("unparse_special"))
        .def("token_to_piece", &token_to_piece, py::arg("token"), py::arg("special"));
}

} // namespace lminf_python
