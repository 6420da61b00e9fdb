#include "errors.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace lminf_python {

static const char * class_name(error_type type) {
    switch (type) {
        case error_type::config: return "ConfigError";
        case error_type::context: return "ContextError";
        case error_type::state: return "StateError";
        case error_type::model_load: return "ModelLoadError";
        case error_type::unsupported_model: return "UnsupportedModelError";
    }
    return "LMInfError";
}

void register_errors() {
    py::register_local_exception_translator([](std::exception_ptr pending) {
        try {
            if (pending) {
                std::rethrow_exception(pending);
            }
        } catch (const error & err) {
            const std::string what = err.what();
            // a message may quote bytes of a damaged file
            const auto message = py::reinterpret_steal<py::object>(
                PyUnicode_DecodeUTF8(what.data(), static_cast<py::ssize_t>(what.size()), "replace"));
            const py::object type = py::module_::import("lminf_edge.errors").attr(class_name(err.type));
            PyErr_SetObject(type.ptr(), message.ptr());
        }
    });
}

} // namespace lminf_python
