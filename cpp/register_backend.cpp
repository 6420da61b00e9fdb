#include "log.h"
#include "module.h"

#include "llama.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace lminf_python {

static std::vector<std::string> devices() {
    std::vector<std::string> result;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        result.push_back(std::string(ggml_backend_dev_name(dev)) + ": " + ggml_backend_dev_description(dev));
    }
    return result;
}

static std::vector<std::string> backends() {
    std::vector<std::string> result;
    for (size_t i = 0; i < ggml_backend_reg_count(); i++) {
        result.push_back(ggml_backend_reg_name(ggml_backend_reg_get(i)));
    }
    return result;
}

static void init_backends(const std::string & lib_path) {
    const log_scope scope(false);
    // With GGML_BACKEND_DL ggml would look beside the executable and in the working folder, but not here.
    if (ggml_backend_reg_count() == 0) {
        ggml_backend_load_all_from_path(lib_path.c_str());
    }
    llama_backend_init();
}

void register_backend(py::module_ & m) {
    install_log_callback();

    m.def("init_backends", &init_backends, py::arg("lib_path"),
        "Loads ggml's backends from a folder if none is linked in.");
    m.def("backends", &backends, "Name of each backend that ggml has.");
    m.def("system_info", &llama_print_system_info, "What ggml was compiled for and has found, such as CPU features.");
    m.def("devices", &devices, "Name and description of each device that ggml can compute on.");
    m.def("llama_cpp_version", &llama_version, "Version of the llama.cpp source.");
    m.def("supports_gpu_offload", &llama_supports_gpu_offload);
}

} // namespace lminf_python
