// What is wrong with a grammar, before llama.cpp's sampler is made from it.
//
// The sampler itself prints to standard error and keeps the reason to itself, and some left-recursive rules let it grow
// its stacks without end. Reads the grammar with llama.cpp's own parser, which is no part of llama.h (see src/README.md,
// "Private interfaces relied on").

#pragma once

#include "llama.h"

#include <string>

namespace lminf_python {

// Throws error_type::config with the reason if the sampler cannot be made from this GBNF text with a rule named root.
void check_grammar(const llama_vocab * vocab, const std::string & text);

} // namespace lminf_python
