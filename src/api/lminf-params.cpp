#include "lminf-params.h"

#include "lminf-policy.h"

#include "llama-model.h"

#include <algorithm>
#include <string>

struct lminf_params lminf_default_params(void) {
    return {
        /*.n_sink     =*/ 4,
        /*.n_window   =*/ 0,
        /*.n_clamp    =*/ 0,
        /*.n_block    =*/ 0,
        /*.n_rollback =*/ 128,
        /*.n_rebase   =*/ 0,
        /*.sink_order =*/ LMINF_SINK_ORDER_CLAMPED,
        /*.deterministic =*/ false,
        /*.middle     =*/ {
            /*.k           =*/ 0,
            /*.per_head    =*/ false,
            /*.distance    =*/ 0,
            /*.layer_begin =*/ 4,
            /*.layer_end   =*/ 0,
            /*.max_tokens  =*/ 65536,
            /*.n_candidates =*/ 0,
            /*.cache_type  =*/ GGML_TYPE_Q8_0,
            /*.path        =*/ nullptr,
        },
    };
}

static std::string unsupported_reason(const llama_model & model, llama_context_type ctx_type, uint32_t n_seq_max) {
    const auto & hparams = model.hparams;

    if (hparams.vocab_only) {
        return "only its vocabulary was loaded";
    }
    if (!model.target_layer_ids.empty() || model.arch == LLM_ARCH_GEMMA4_ASSISTANT) {
        return "it drafts tokens for another model and cannot run alone";
    }
    if (llm_arch_is_recurrent(model.arch)) {
        return "it is purely recurrent: its memory does not grow, there is nothing to bound";
    }
    if (llama_model_has_encoder(&model) || !hparams.causal_attn || llama_model_is_diffusion(&model)) {
        return "it is not a causal decoder: it reads its whole text at once";
    }
    if (model.pos_embd) {
        return "it has learned absolute positions, which end at the trained length";
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_VISION) {
        return "its RoPE is that of a vision model";
    }
    if (hparams.indexer_head_size > 0 || model.arch == LLM_ARCH_QWEN4EXP) {
        return "its sparse attention chooses keys by a cache of their own";
    }
    if (hparams.ple_n_heads > 0) {
        return "its input embeddings depend on the tokens before";
    }
    if ((model.arch == LLM_ARCH_PLAMO2 || model.arch == LLM_ARCH_KIMI_LINEAR) && n_seq_max > 1) {
        return "llama.cpp's own graph of it stops the process with several sequences; use n_seq_max = 1";
    }
    if (ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return "the context is not a plain one (multi-token prediction)";
    }
    return "";
}

lminf_status lminf_fail_unsupported(const llama_model & model, const std::string & reason) {
    return lminf_fail(LMINF_STATUS_UNSUPPORTED, "LM-Infinite does not support this model (" + model.arch_name() + "): " + reason);
}

// Middle tokens can be recalled only in attention of the plain kind.
static std::string middle_unsupported_reason(const llama_model & model) {
    const auto & hparams = model.hparams;

    if (hparams.is_mla()) {
        return "latent attention has one key for all heads";
    }
    if (hparams.use_alibi) {
        return "it has ALiBi instead of RoPE";
    }
    if (model.arch == LLM_ARCH_GROK) {
        return "its attention squeezes logits in a way of its own";
    }
    if (std::any_of(model.layers.begin(), model.layers.end(), [](const llama_layer & layer) { return layer.attn_sinks; })) {
        return "its attention has learned sink logits";
    }
    return "";
}

lminf_status lminf_fail_middle(const llama_model & model, const std::string & reason) {
    return lminf_fail(LMINF_STATUS_UNSUPPORTED, "middle tokens cannot be recalled by this model (" + model.arch_name() + "): " + reason);
}

lminf_status lminf_fail_deterministic(const llama_model & model, const std::string & reason) {
    return lminf_fail(LMINF_STATUS_UNSUPPORTED, "deterministic: logits of this model (" + model.arch_name() +
            ") would depend on how a text is cut: " + reason);
}

static lminf_status resolve_middle(const llama_model & model, const lminf_params & params, lminf_middle_params & p) {
    if (p.k == 0) {
        return LMINF_STATUS_OK;
    }
    const std::string reason = middle_unsupported_reason(model);
    if (!reason.empty()) {
        return lminf_fail_middle(model, reason);
    }

    const auto & hparams = model.hparams;
    const uint32_t n_layer = hparams.n_layer();

    p.distance  = p.distance  ? p.distance  : std::max(1u, params.n_clamp/2);
    p.layer_end = p.layer_end ? p.layer_end : n_layer;

    const auto str = [](uint64_t x) { return std::to_string(x); };

    if (p.k > 256) {
        return lminf_fail(LMINF_STATUS_CONFIG, "middle tokens: k = " + str(p.k) + " is larger than 256");
    }
    if (p.distance > params.n_clamp) {
        return lminf_fail(LMINF_STATUS_CONFIG, "middle tokens: distance = " + str(p.distance) + " is larger than n_clamp = " + str(params.n_clamp));
    }
    if (p.layer_begin >= p.layer_end || p.layer_end > n_layer) {
        return lminf_fail(LMINF_STATUS_CONFIG, "middle tokens: layers [" + str(p.layer_begin) + ", " + str(p.layer_end) +
                ") are no part of the model's " + str(n_layer));
    }
    if (p.max_tokens <= params.n_window || p.max_tokens > (1u << 28)) {
        return lminf_fail(LMINF_STATUS_CONFIG, "middle tokens: max_tokens = " + str(p.max_tokens) + " must be larger than n_window = " +
                str(params.n_window) + " and at most 2^28");
    }
    if (p.n_candidates > 0 && (p.n_candidates < p.k || p.n_candidates > 65536)) {
        return lminf_fail(LMINF_STATUS_CONFIG, "middle tokens: n_candidates = " + str(p.n_candidates) + " must be at least k = " + str(p.k) +
                " and at most 65536");
    }
    switch (p.cache_type) {
        case GGML_TYPE_F32: case GGML_TYPE_F16: case GGML_TYPE_Q8_0: case GGML_TYPE_Q4_0: break;
        default: return lminf_fail(LMINF_STATUS_CONFIG, "middle tokens: the cache type must be f32, f16, q8_0 or q4_0");
    }
    const int64_t n_block = ggml_blck_size((ggml_type) p.cache_type);
    for (uint32_t il = p.layer_begin; il < p.layer_end; ++il) {
        if (hparams.n_embd_head_k(il) % n_block != 0 || hparams.n_embd_head_v(il) % n_block != 0) {
            return lminf_fail(LMINF_STATUS_CONFIG, std::string("middle tokens: cache type ") + ggml_type_name((ggml_type) p.cache_type) +
                    " needs a head size that is a multiple of " + str(n_block) + "; this model's is " + str(hparams.n_embd_head_k(il)));
        }
    }
    return LMINF_STATUS_OK;
}

// llama.cpp counts cells in 32 bits
static lminf_status check_cells(const llama_model & model, uint32_t n_ubatch, const lminf_params & p) {
    lminf_policy policy;
    policy.n_sink     = p.n_sink;
    policy.n_window   = p.n_window;
    policy.n_clamp    = p.n_clamp;
    policy.n_block    = p.n_block;
    policy.n_rollback = p.n_rollback;
    policy.n_ubatch   = n_ubatch;
    policy.alibi      = model.hparams.use_alibi;
    if (policy.n_cells() > (int64_t) UINT32_MAX) {
        return lminf_fail(LMINF_STATUS_CONFIG, "n_sink = " + std::to_string(p.n_sink) + ", n_block = " + std::to_string(p.n_block) +
                ", n_ubatch = " + std::to_string(n_ubatch) + ": a sequence would have " + std::to_string(policy.n_cells()) +
                " cells, and can have at most 2^32 - 1");
    }
    return LMINF_STATUS_OK;
}

// of these, several copies take no room to speak of
static constexpr uint32_t N_SINK_FEW = 64;

uint32_t lminf_largest_ubatch(const lminf_params & params, uint32_t n_ubatch) {
    return params.n_sink > N_SINK_FEW ? std::min(n_ubatch, params.n_block + 1) : n_ubatch;
}

lminf_status lminf_resolve_params(
        const llama_model & model, llama_context_type ctx_type, uint32_t n_seq_max, uint32_t n_ubatch, lminf_params & p) {
    const std::string reason = unsupported_reason(model, ctx_type, n_seq_max);
    if (!reason.empty()) {
        return lminf_fail_unsupported(model, reason);
    }

    const uint32_t n_train = model.hparams.n_ctx_train;

    p.n_window = p.n_window ? p.n_window : std::min(2048u, n_train);
    p.n_clamp  = p.n_clamp  ? p.n_clamp  : p.n_window;
    p.n_block  = p.n_block  ? p.n_block  : std::min(p.n_sink > N_SINK_FEW && !p.deterministic ? std::max(64u, n_ubatch) : 64u, p.n_clamp);
    p.n_rebase = p.n_rebase ? p.n_rebase : 65536;

    const auto str = [](uint64_t x) { return std::to_string(x); };

    if (p.n_window > n_train) {
        return lminf_fail(LMINF_STATUS_CONFIG, "n_window = " + str(p.n_window) + " is larger than the model's trained context of " +
                str(n_train) + " tokens");
    }
    // a query may see a sixteenth more keys than in training: room for the sink tokens beside a window of full length
    const uint64_t n_visible_max = n_train + n_train/16;
    if ((uint64_t) p.n_sink + p.n_window > n_visible_max) {
        return lminf_fail(LMINF_STATUS_CONFIG, "n_sink + n_window = " + str((uint64_t) p.n_sink + p.n_window) +
                " is too large: with a trained context of " + str(n_train) + " tokens it can be at most " + str(n_visible_max));
    }
    if (p.n_clamp > (1u << 28)) {
        return lminf_fail(LMINF_STATUS_CONFIG, "n_clamp = " + str(p.n_clamp) + " is larger than 2^28");
    }
    if (p.n_block > p.n_clamp) {
        return lminf_fail(LMINF_STATUS_CONFIG, "n_block = " + str(p.n_block) + " is larger than n_clamp = " + str(p.n_clamp));
    }
    if (p.n_rollback > n_train + 65536u) {
        return lminf_fail(LMINF_STATUS_CONFIG, "n_rollback = " + str(p.n_rollback) + " is larger than " + str(n_train + 65536u));
    }
    if (p.n_rebase > (1u << 24)) {
        return lminf_fail(LMINF_STATUS_CONFIG, "n_rebase = " + str(p.n_rebase) + " is larger than 2^24, where float32 positions end");
    }
    if (p.sink_order != LMINF_SINK_ORDER_CLAMPED && p.sink_order != LMINF_SINK_ORDER_KEPT) {
        return lminf_fail(LMINF_STATUS_CONFIG, "sink_order = " + std::to_string((int) p.sink_order) + " is unknown");
    }
    if (p.sink_order == LMINF_SINK_ORDER_KEPT && (uint64_t) p.n_sink + p.n_window > (uint64_t) p.n_clamp + 1) {
        return lminf_fail(LMINF_STATUS_CONFIG, "with sink_order kept, n_sink + n_window = " + str((uint64_t) p.n_sink + p.n_window) +
                " must be at most n_clamp + 1 = " + str((uint64_t) p.n_clamp + 1));
    }
    if (p.deterministic && p.middle.k > 0 && p.middle.n_candidates > 0) {
        return lminf_fail(LMINF_STATUS_CONFIG, "deterministic: which keys are the " + str(p.middle.n_candidates) +
                " candidates depends on the number of threads; use n_candidates = 0");
    }
    lminf_status status = check_cells(model, n_ubatch, p);
    if (status == LMINF_STATUS_OK) {
        status = resolve_middle(model, p, p.middle);
    }
    return status == LMINF_STATUS_OK ? lminf_succeed() : status;
}

enum lminf_status lminf_resolve_params(
        const struct llama_model * model, struct llama_context_params cparams, struct lminf_params * params) {
    if (!model || !params) {
        return lminf_fail(LMINF_STATUS_CONFIG, "model and params must not be NULL");
    }
    // as llama.cpp does
    const uint32_t n_ubatch = cparams.n_ubatch == 0 ? cparams.n_batch : std::min(cparams.n_batch, cparams.n_ubatch);
    return lminf_resolve_params(*model, cparams.ctx_type, cparams.n_seq_max, n_ubatch, *params);
}

static bool is_castable(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q8_0:
            return true;
        default:
            return false;
    }
}

lminf_status lminf_check_cache_types(const llama_model & model, ggml_type type_k, ggml_type type_v) {
    const auto & hparams = model.hparams;

    for (const auto type : { type_k, type_v }) {
        const std::string name = std::string("cache type ") + ggml_type_name(type);
        if (!is_castable(type)) {
            return lminf_fail(LMINF_STATUS_CONFIG, name + " is not supported for " + (type == type_k ? "keys" : "values") +
                    ": use f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0");
        }
        const int64_t n_block = ggml_blck_size(type);
        for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
            if (hparams.n_embd_head_k(il) % n_block != 0 || hparams.n_embd_head_v(il) % n_block != 0) {
                return lminf_fail(LMINF_STATUS_CONFIG, name + " needs a head size that is a multiple of " + std::to_string(n_block) +
                        "; this model's is " + std::to_string(hparams.n_embd_head_k(il)));
            }
        }
    }
    return LMINF_STATUS_OK;
}

uint32_t lminf_largest_distance(const llama_model & model, const lminf_params & params) {
    return std::max(params.n_window, std::min(params.n_clamp, model.hparams.n_ctx_train));
}
