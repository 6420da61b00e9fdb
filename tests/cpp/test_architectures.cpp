// Every architecture that llama.cpp knows, as a tiny random model: what the engine says of it, and, if it supports it,
// whether the rules that need no reference hold.
//
//   test_architectures [--list] [--json] [--arch NAME ...]
//
// --list prints the architectures, --json one object for each kind of model that was made of one. The exit status is 1 if
// a check failed. tests/python/architectures.py runs it, a process for each architecture, and writes docs/architectures.md.

#include "invariants.h"
#include "lminf.h"
#include "random_model.h"

#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

//
// what a model is
//

static std::string attention_of(const llama_model & model) {
    const llama_hparams & hparams = model.hparams;

    uint32_t n_full    = 0;
    uint32_t n_sliding = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (hparams.is_recr(il) && model.arch != LLM_ARCH_FALCON_H1) {
            continue; // Falcon-H1 has both in each layer
        }
        (hparams.is_swa(il) ? n_sliding : n_full)++;
    }

    std::string res = hparams.swa_type == LLAMA_SWA_TYPE_CHUNKED ? "chunked" : "sliding";
    res = n_sliding == 0 ? "full" : n_full == 0 ? res : res + " + full";
    res += " attention";
    if (hparams.is_mla()) {
        res += ", latent (MLA)";
    }
    if (hparams.indexer_n_head > 0) {
        res += ", sparse";
    }
    return llm_arch_is_hybrid(model.arch) ? "recurrent + " + res : res;
}

static std::string positions_of(const llama_model & model) {
    const llama_hparams & hparams = model.hparams;
    if (hparams.use_alibi) {
        return "ALiBi";
    }
    if (model.pos_embd) {
        return "learned positions";
    }
    switch (hparams.rope_type) {
        case LLAMA_ROPE_TYPE_NONE:   return "no positions";
        case LLAMA_ROPE_TYPE_NORM:   return "RoPE";
        case LLAMA_ROPE_TYPE_NEOX:   return "RoPE (NeoX)";
        case LLAMA_ROPE_TYPE_MROPE:
        case LLAMA_ROPE_TYPE_IMROPE: return "M-RoPE";
        default:                     return "other RoPE";
    }
}

static std::string kind_of(const llama_model & model) {
    if (!model.target_layer_ids.empty()) {
        return "draft head of another model";
    }
    if (llama_model_has_encoder(&model)) {
        return llama_model_has_decoder(&model) ? "encoder-decoder" : "encoder";
    }
    if (llama_model_is_diffusion(&model)) {
        return "diffusion";
    }
    if (!model.hparams.causal_attn) {
        return "encoder";
    }
    if (llm_arch_is_recurrent(model.arch)) {
        return "recurrent";
    }
    return attention_of(model) + ", " + positions_of(model);
}

//
// one architecture
//

struct report {
    std::string arch;
    std::string kind;
    std::string reason; // why it is refused, "" if it is supported
    std::vector<result> results;
};

static report examine(llama_model & model) {
    report res;
    res.arch = model.arch_name();
    res.kind = kind_of(model);

    const llama_context_ptr ctx(init_small_window(model));
    if (ctx) {
        res.results = check_invariants(model);
    } else if (lminf_last_status() == LMINF_STATUS_UNSUPPORTED) {
        const std::string error = lminf_last_error();
        const size_t      begin = error.find("): "); // the architecture's name and a colon, then the reason
        res.reason = begin == std::string::npos ? error : error.substr(begin + 3);
    } else {
        res.results = { { "context", FAILED, NAN, lminf_last_error() } };
    }
    return res;
}

// Metadata that makes another kind of some architectures; it changes nothing in the others.
static std::vector<metadata_map> variants_of(llm_arch arch) {
    std::vector<metadata_map> res = {
        {},
        {{ "attention.sliding_window", 16u  }},
        {{ "attention.max_alibi_bias", 8.0f }},
        {{ "rope.dimension_sections",  std::vector<uint32_t>{ 8, 4, 4, 0 } }},
    };
    if (arch == LLM_ARCH_BAICHUAN) {
        res.push_back({{ "block_count", 40u }}); // ALiBi
    }
    if (arch == LLM_ARCH_EXAONE4) {
        res.push_back({{ "block_count", 64u }, { "attention.sliding_window", 16u }});
    }
    if (arch == LLM_ARCH_DEEPSEEK2) {
        res.push_back({ // latents multiplied out before they are stored, as in older files
            { "attention.head_count_kv",    2u  },
            { "attention.key_length",       32u },
            { "attention.key_length_mla",   0u  },
            { "attention.value_length_mla", 0u  },
        });
    }
    return res;
}

static std::vector<report> examine_all_kinds(llm_arch arch) {
    std::vector<report>   res;
    std::set<std::string> kinds;
    for (const auto & variant : variants_of(arch)) {
        std::string error;
        const llama_model_ptr model = make_random_model(arch, variant, error);
        if (!model && res.empty()) {
            return { { llm_arch_name(arch), "", error, {} } };
        }
        if (model && kinds.insert(kind_of(*model)).second) {
            res.push_back(examine(*model));
        }
    }
    return res;
}

//
// output
//

static std::string quoted(const std::string & text) {
    std::string res = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            res += '\\';
        }
        res += (unsigned char) c < 0x20 ? ' ' : c;
    }
    return res + "\"";
}

static const char * to_text(outcome verdict) {
    switch (verdict) {
        case PASSED: return "passed";
        case FAILED: return "failed";
        default:     return "not checked";
    }
}

static void print_json(const report & report) {
    printf("{\"arch\": %s, \"kind\": %s, \"supported\": %s, \"reason\": %s, \"checks\": {", quoted(report.arch).c_str(),
            quoted(report.kind).c_str(), report.reason.empty() ? "true" : "false", quoted(report.reason).c_str());
    const char * separator = "";
    for (const auto & result : report.results) {
        printf("%s%s: {\"verdict\": \"%s\", \"value\": ", separator, quoted(result.name).c_str(), to_text(result.verdict));
        printf(std::isfinite(result.value) ? "%.3g" : "null", result.value);
        printf(", \"note\": %s}", quoted(result.note).c_str());
        separator = ", ";
    }
    printf("}}\n");
}

static void print_text(const report & report) {
    printf("%-18s %-40s %s\n", report.arch.c_str(), report.kind.c_str(), report.reason.c_str());
    for (const auto & result : report.results) {
        printf("    %-10s %-11s %10.3g  %s\n", result.name.c_str(), to_text(result.verdict), result.value, result.note.c_str());
    }
}

int main(int argc, char ** argv) {
    bool list = false;
    bool json = false;

    std::set<std::string> only; // all of them if empty
    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--list") == 0) {
            list = true;
        } else if (strcmp(argv[i], "--json") == 0) {
            json = true;
        } else if (strcmp(argv[i], "--arch") == 0 && i + 1 < argc) {
            only.insert(argv[++i]);
        } else {
            fprintf(stderr, "usage: %s [--list] [--json] [--arch NAME ...]\n", argv[0]);
            return 2;
        }
    }
    for (const auto & name : only) {
        if (llm_arch_from_string(name) == LLM_ARCH_UNKNOWN) {
            fprintf(stderr, "no architecture is called %s\n", name.c_str());
            return 2;
        }
    }

    bool ok = true;
    for (const llm_arch arch : llm_arch_all()) {
        if (arch == LLM_ARCH_UNKNOWN || (!only.empty() && !only.count(llm_arch_name(arch)))) {
            continue;
        }
        if (list) {
            puts(llm_arch_name(arch));
            continue;
        }
        for (const auto & report : examine_all_kinds(arch)) {
            json ? print_json(report) : print_text(report);
            ok = ok && std::none_of(report.results.begin(), report.results.end(),
                           [](const result & result) { return result.verdict == FAILED; });
        }
        fflush(stdout);
    }
    return ok ? 0 : 1;
}
