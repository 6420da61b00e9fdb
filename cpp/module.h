// The extension module lminf_edge._core: one register function per topic. It only translates between Python and the C
// API.

#pragma once

#include <pybind11/pybind11.h>

namespace lminf_python {

void register_backend(pybind11::module_ & m);
void register_model(pybind11::module_ & m);
void register_context(pybind11::module_ & m);
void register_sampler(pybind11::module_ & m);
void register_chat(pybind11::module_ & m);

} // namespace lminf_python
