// A tiny model of any architecture with seeded random weights, made in memory: no file, no download.
//
// Used by test_architectures.cpp and test_failures.cpp. Includes private headers of llama.cpp, so the library's C++ symbols
// must be visible: they are on Linux and macOS, where shared libraries export everything unless told otherwise.

#pragma once

#include "llama-arch.h"
#include "llama-cpp.h"

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

using metadata_value = std::variant<uint32_t, float, bool, std::vector<uint32_t>>; // a vector has a value for each layer

// values by GGUF key, without the architecture's name in front
using metadata_map = std::map<std::string, metadata_value>;

// Makes a model from as little metadata as its architecture can be loaded with, and from what is given here. Returns NULL
// if llama.cpp cannot load such a model; error then says why. Its layers are on the device, if one is given, else on the CPU.
llama_model_ptr make_random_model(
        llm_arch arch, const metadata_map & given, std::string & error, ggml_backend_dev_t device = nullptr);
