#include "errors.h"
#include "json-schema-to-grammar.h"
#include "model.h"
#include "module.h"

#include <pybind11/stl.h>

#include <limits>

namespace py = pybind11;

namespace lminf_python {

static std::vector<std::string> builtin_chat_templates() {
    std::vector<const char *> names(llama_chat_builtin_templates(nullptr, 0));
    llama_chat_builtin_templates(names.data(), names.size());
    return {names.begin(), names.end()};
}

static std::string apply_chat_template(const std::string &   name,
    const std::vector<std::pair<std::string, std::string>> & messages, bool add_generation_prompt) {
    size_t                          n_bytes = 0;
    std::vector<llama_chat_message> chat;
    for (const auto & [role, content] : messages) {
        chat.push_back({role.c_str(), content.c_str()});
        n_bytes += role.size() + content.size();
    }
    if (n_bytes > static_cast<size_t>(std::numeric_limits<int32_t>::max()) / 2) {
        throw error(error_type::config, "messages of " + std::to_string(n_bytes) + " bytes are too long");
    }
    std::string text(2 * n_bytes + 256, '\0');

    const auto apply = [&] {
        return llama_chat_apply_template(name.c_str(), chat.data(), chat.size(), add_generation_prompt, text.data(),
            static_cast<int32_t>(text.size()));
    };
    int32_t n = apply();
    if (n > static_cast<int32_t>(text.size())) {
        text.resize(n);
        n = apply();
    }
    if (n < 0) {
        throw error(error_type::config, "llama.cpp has no chat template named '" + name + "'");
    }
    text.resize(n);
    return text;
}

static std::string schema_to_grammar(const std::string & schema) {
    try {
        return json_schema_to_grammar(common_json::parse(schema), true);
    } catch (const std::exception & err) {
        throw error(error_type::config, err.what());
    }
}

void register_chat(py::module_ & m) {
    m.def("builtin_chat_templates", &builtin_chat_templates);
    m.def("apply_chat_template", &apply_chat_template, py::arg("name"), py::arg("messages"),
        py::arg("add_generation_prompt"));
    m.def("json_schema_to_grammar", &schema_to_grammar, py::arg("schema"));
}

} // namespace lminf_python
