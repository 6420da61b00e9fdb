// The parameters of LM-Infinite in environment variables, for programs that know llama.h only. Called by lminf.cpp.

#pragma once

#include "lminf.h"

#include <optional>

// LMINF_N_SINK, LMINF_N_WINDOW, LMINF_N_CLAMP, LMINF_N_BLOCK, LMINF_N_ROLLBACK and LMINF_N_REBASE: whole numbers that mean what they
// mean in lminf_params; LMINF_SINK_ORDER: "clamped" or "kept". A variable that is empty counts as not set, and one that is not set
// leaves the default; so does LMINF_DETERMINISTIC. Nothing if none is set. Throws, and says what it is, if a value cannot be read.
std::optional<lminf_params> lminf_params_from_env();

// LMINF_ATTENTION: "stock" turns attention of our own off, "lminf" or nothing leaves it on. Throws for anything else.
bool lminf_stock_attention_from_env();

// LMINF_DETERMINISTIC: "1" makes contexts with LM-Infinite deterministic, "0" or nothing leaves that to whoever makes them. Throws for
// anything else.
bool lminf_deterministic_from_env();
