// C++ exceptions that arrive in Python as the classes of lminf_edge.errors.

#pragma once

#include <stdexcept>
#include <string>

namespace lminf_python {

enum class error_type {
    config,
    context,
    state,
    model_load,
    unsupported_model,
};

class error : public std::runtime_error {
public:
    error(error_type type, const std::string & message) : std::runtime_error(message), type(type) {}

    const error_type type;
};

// Called once, by module.cpp.
void register_errors();

} // namespace lminf_python
