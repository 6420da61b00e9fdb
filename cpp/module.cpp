#include "module.h"

#include "errors.h"
#include "lminf-build-id.h" // what this extension was compiled against
#include "lminf.h"

#include <string>

PYBIND11_MODULE(_core, m) {
    m.doc() = "LM-Infinite for llama.cpp: thin bindings of llama.h and lminf.h. Use lminf_edge.Llama instead.";

    const std::string built_for = LMINF_ABI_ID;
    const std::string loaded    = lminf_abi_id();
    if (built_for != loaded) {
        throw pybind11::import_error("lminf_edge._core was built for a libllama with the id " + built_for +
            ", but the loaded libllama has " + loaded +
            ". Another libllama came first: unset LD_LIBRARY_PATH (DYLD_LIBRARY_PATH on macOS) or reinstall "
            "lminf-edge.");
    }
    m.def("patch_id", &lminf_patch_id,
        "SHA-256 (hex) of the llama.cpp source and patch that the library was built from.");
    m.def("abi_id", &lminf_abi_id, "The same of all sources, those of the engine with them.");

    lminf_python::register_errors();
    lminf_python::register_backend(m);
    lminf_python::register_model(m);
    lminf_python::register_context(m);
    lminf_python::register_sampler(m);
    lminf_python::register_chat(m);
}
