#include "lminf.h"

#include "lminf-attention-op.h"
#include "lminf-build-id.h"
#include "lminf-env.h"
#include "lminf-hooks.h"
#include "lminf-memory.h"
#include "lminf-middle.h"
#include "lminf-params.h"
#include "lminf-products.h"
#include "lminf-room.h"
#include "lminf-test.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// what the last call on this thread said
static thread_local lminf_status last_status = LMINF_STATUS_OK;
static thread_local std::string  last_error;

// What the contexts made on this thread are to have, if a caller has decided that. Otherwise the environment does.
struct lminf_request {
    bool by_caller = false;

    std::optional<lminf_params> params; // none: a context without LM-Infinite
    std::string                 path;   // of the store; the caller's may be gone when a context is made
};
static thread_local lminf_request request;

lminf_status lminf_fail(lminf_status status, const std::string & message) {
    last_status = status;
    last_error  = message;
    return status;
}

lminf_status lminf_succeed() {
    last_error.clear();
    return last_status = LMINF_STATUS_OK;
}

//
// context
//

// the part of a memory that is not recurrent
static llama_memory_i * get_attention(llama_memory_i * memory) {
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return hybrid->get_mem_attn();
    }
    if (auto * hybrid_iswa = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return hybrid_iswa->get_mem_attn();
    }
    return memory;
}

void lminf_use_params(const struct lminf_params * params) {
    request = {};
    request.by_caller = true;
    if (params) {
        request.params = *params;
        request.path   = params->middle.path ? params->middle.path : "";
        request.params->middle.path = nullptr;
    }
    lminf_succeed();
}

void lminf_use_environment(void) {
    request = {};
}

// What llama.cpp made of the parameters that a program gave it, whichever way LM-Infinite was asked for.
static lminf_status check_context(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (cparams.kv_unified && cparams.n_seq_max > 1) {
        return lminf_fail(LMINF_STATUS_CONFIG, "LM-Infinite keeps each sequence in cells of its own: kv_unified must be off with n_seq_max = " +
                std::to_string(cparams.n_seq_max));
    }
    if (!cparams.causal_attn) {
        return lminf_fail(LMINF_STATUS_CONFIG, "LM-Infinite needs causal attention, and the context's attention_type is another one");
    }
    return lminf_check_cache_types(model, params.type_k, params.type_v);
}

llama_memory_i * lminf_create_memory(
        llama_context & lctx, const llama_model & model, const llama_memory_params & params, llama_cparams & cparams) {
    auto asked = request.by_caller ? request.params : lminf_params_from_env();

    if (asked && !request.by_caller && cparams.embeddings && !model.hparams.causal_attn) {
        LLAMA_LOG_WARN("%s: LM-Infinite is off for this context: the model reads each text at once and keeps nothing\n", __func__);
        asked.reset();
    }
    if (!asked) {
        return model.create_memory(params, cparams);
    }

    auto & p = *asked;
    p.deterministic = p.deterministic || lminf_deterministic_from_env();
    if (request.by_caller && !request.path.empty()) {
        p.middle.path = request.path.c_str();
    }
    if (lminf_resolve_params(model, params.ctx_type, cparams.n_seq_max, cparams.n_ubatch, p) != LMINF_STATUS_OK ||
            check_context(model, params, cparams) != LMINF_STATUS_OK) {
        throw std::runtime_error(last_error);
    }
    LLAMA_LOG_INFO("%s: LM-Infinite: n_sink = %u, n_window = %u, n_clamp = %u, n_block = %u, n_rollback = %u, sink_order = %s\n", __func__,
            p.n_sink, p.n_window, p.n_clamp, p.n_block, p.n_rollback, p.sink_order == LMINF_SINK_ORDER_KEPT ? "kept" : "clamped");

    // however long the text is that a program has in mind
    const auto has_factors = [](const llama_layer & layer) { return layer.rope_long || layer.rope_short; };
    if (std::any_of(model.layers.begin(), model.layers.end(), has_factors)) {
        cparams.n_ctx_seq = lminf_largest_distance(model, p);
    }

    const std::string why_stock = lminf_stock_attention_from_env() ? "LMINF_ATTENTION=stock"
                                                                   : lminf_attention_op::why_not(model, params.type_k, params.type_v);
    LLAMA_LOG_INFO("%s: attention: %s\n", __func__, why_stock.empty() ? "lminf" : ("llama.cpp's (" + why_stock + ")").c_str());
    if (!why_stock.empty()) {
        cparams.n_ubatch = lminf_largest_ubatch(p, cparams.n_ubatch);
    }

    if (p.deterministic) {
        const std::string reason = why_stock.empty() ? lminf_why_not_same_bits(model) : "attention is llama.cpp's (" + why_stock + ")";
        if (!reason.empty()) {
            lminf_fail_deterministic(model, reason);
            throw std::runtime_error(last_error);
        }
    }

    const auto group = std::make_shared<lminf_cache_group>(p, cparams.n_ubatch, cparams.n_seq_max, lctx);
    group->why_stock = why_stock;
    group->attention = why_stock.empty() ? std::string("own kernel (") + lminf_attention_simd() + ")" : "llama.cpp's (" + why_stock + ")";

    std::unique_ptr<llama_memory_i> memory;
    try {
        const lminf_cache_group_scope scope(group);
        memory.reset(model.create_memory(params, cparams));
    } catch (const lminf_no_room & error) {
        lminf_fail(LMINF_STATUS_CONFIG, std::string("middle tokens: ") + error.what());
        throw std::runtime_error(last_error);
    }
    if (group->caches.empty()) {
        lminf_fail_unsupported(model, "it has a memory of its own kind");
        throw std::runtime_error(last_error);
    }
    return std::make_unique<lminf_memory>(std::move(memory), group).release();
}

void lminf_refuse_rope(const llama_model & model) {
    lminf_fail_unsupported(model, "its keys are changed again after RoPE");
    throw std::runtime_error(last_error);
}

void lminf_refuse_middle(const llama_model & model, const std::string & reason) {
    lminf_fail_middle(model, reason);
    throw std::runtime_error(last_error);
}

struct llama_context * lminf_init_from_model(
        struct llama_model * model, struct llama_context_params cparams, struct lminf_params params) {
    if (lminf_resolve_params(model, cparams, &params) != LMINF_STATUS_OK ||
            lminf_check_cache_types(*model, cparams.type_k, cparams.type_v) != LMINF_STATUS_OK) {
        return nullptr;
    }
    if (ggml_is_quantized(cparams.type_v) && cparams.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        lminf_fail(LMINF_STATUS_CONFIG, std::string("cache type ") + ggml_type_name(cparams.type_v) + " for values needs flash attention");
        return nullptr;
    }

    const uint32_t n_batch = cparams.n_batch ? cparams.n_batch : cparams.n_ubatch;

    cparams.n_seq_max  = std::max(1u, cparams.n_seq_max);
    cparams.n_ctx      = std::max(params.n_window, n_batch)*cparams.n_seq_max; // it also bounds n_batch
    cparams.kv_unified = cparams.n_seq_max == 1;

    const lminf_request before = request;

    lminf_use_params(&params);
    llama_context * ctx = llama_init_from_model(model, cparams);
    request = before;

    if (!ctx && last_status == LMINF_STATUS_OK) {
        lminf_fail(LMINF_STATUS_CONTEXT, "llama.cpp could not create the context; its log says why");
    }
    return ctx;
}

struct llama_model_params lminf_deterministic_model_params(struct llama_model_params params) {
    static ggml_backend_dev_t no_devices[] = { nullptr };

    params.devices         = no_devices;
    params.n_gpu_layers    = 0;
    params.use_extra_bufts = false;
    return params;
}

// llama-model.cpp is compiled with this name for its own (CMakeLists.txt)
extern "C" LLAMA_API struct llama_model_params lminf_stock_model_default_params(void);

// A value that cannot be read is refused where a context is made.
static bool is_deterministic_by_env() {
    try {
        return lminf_deterministic_from_env();
    } catch (const std::exception &) {
        return false;
    }
}

struct llama_model_params llama_model_default_params(void) {
    const auto params = lminf_stock_model_default_params();
    return is_deterministic_by_env() ? lminf_deterministic_model_params(params) : params;
}

uint64_t lminf_available_memory(void) {
    return lminf_room_in_memory();
}

enum lminf_status lminf_last_status(void) {
    return last_status;
}

const char * lminf_last_error(void) {
    return last_error.c_str();
}

//
// a context in use
//

bool lminf_get_params(const struct llama_context * ctx, struct lminf_params * params) {
    const auto * memory = lminf_memory::of(ctx);
    if (memory && params) {
        const auto & group = memory->get_group();
        *params = group.params;
        params->middle.path = group.store_path.empty() ? nullptr : group.store_path.c_str();
    }
    return memory != nullptr;
}

// whether the context has this sequence
static bool has_seq(const llama_context * ctx, llama_seq_id seq_id) {
    return ctx && llama_get_memory(ctx) && seq_id >= 0 && (uint32_t) seq_id < llama_n_seq_max(ctx);
}

bool lminf_get_stats(const struct llama_context * ctx, llama_seq_id seq_id, struct lminf_stats * stats) {
    if (!stats || !has_seq(ctx, seq_id)) {
        return false;
    }
    const llama_memory_i * memory = llama_get_memory(ctx);

    if (const auto * ours = lminf_memory::of(ctx)) {
        *stats = ours->get_cache().stats(seq_id);
    } else {
        *stats = {};
        stats->n_past        = lminf_n_past(ctx, seq_id);
        stats->pos_physical  = stats->n_past;
        stats->n_cells       = llama_n_ctx_seq(ctx);
        stats->n_cells_used  = (uint32_t) stats->n_past;
        stats->sink_distance = -1;
    }
    for (const auto & [_, size] : memory->memory_breakdown()) {
        stats->n_bytes += size;
    }
    return true;
}

const char * lminf_get_attention(const struct llama_context * ctx, int32_t il) {
    if (!ctx || il < 0 || (uint32_t) il >= ctx->get_model().hparams.n_layer()) {
        return nullptr;
    }
    const auto & hparams = ctx->get_model().hparams;
    if (hparams.is_recr(il) || hparams.n_head_kv(il) == 0) {
        return "";
    }
    const auto * memory = lminf_memory::of(ctx);
    return memory ? memory->get_group().attention.c_str() : "llama.cpp's (full attention)";
}

int32_t lminf_get_weights(const struct llama_model * model, bool deterministic, struct lminf_weights_info * dst, int32_t n_max) {
    const auto all = lminf_try_products(*model, deterministic);
    for (int32_t i = 0; i < std::min((int32_t) all.size(), n_max); ++i) {
        dst[i] = { all[i].type, ggml_backend_buft_name(all[i].buft), all[i].n_bytes, all[i].same_bits };
    }
    return (int32_t) all.size();
}

// what stores middle tokens of a context, NULL if it stores none
static lminf_middle * get_middle(const llama_context * ctx) {
    const auto * memory = lminf_memory::of(ctx);
    return memory ? memory->get_cache().get_middle() : nullptr;
}

bool lminf_get_middle_stats(const struct llama_context * ctx, llama_seq_id seq_id, struct lminf_middle_stats * stats) {
    if (!stats || !has_seq(ctx, seq_id)) {
        return false;
    }
    const auto * middle = get_middle(ctx);
    *stats = middle ? middle->stats(lminf_memory::of(ctx)->get_cache().sequence(seq_id)) : lminf_middle_stats{};
    if (const auto * memory = lminf_memory::of(ctx)) {
        stats->n_bytes_full = (int64_t) memory->get_group().store_size;
    }
    return true;
}

bool lminf_set_recall(struct llama_context * ctx, enum lminf_recall_mode mode) {
    if (!get_middle(ctx)) {
        return mode == LMINF_RECALL_OFF;
    }
    lminf_memory::of(ctx)->get_group().recall = mode;
    return true;
}

int32_t lminf_get_recall(
        const struct llama_context * ctx, llama_seq_id seq_id, int64_t pos, struct lminf_recalled_token * dst, int32_t n_max) {
    const auto * middle = get_middle(ctx);
    if (!middle || !has_seq(ctx, seq_id)) {
        return 0;
    }
    const auto found = middle->recalled(seq_id, pos);
    for (int32_t i = 0; i < std::min((int32_t) found.size(), n_max); ++i) {
        dst[i] = { found[i].pos, found[i].weight };
    }
    return (int32_t) found.size();
}

// llama.cpp's shift takes quantised keys for rotated by a Hadamard matrix, whole heads of them.
static bool can_shift(const llama_kv_cache & kv, const llama_hparams & hparams) {
    if (!ggml_is_quantized(kv.type_k())) {
        return true;
    }
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (hparams.has_kv(il) && hparams.has_rope(il) && hparams.n_rot(il) != hparams.n_embd_head_k(il)) {
            return false;
        }
    }
    const ggml_init_params params = { /*.mem_size =*/ ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true };
    const ggml_context_ptr ctx { ggml_init(params) };
    return kv.build_input_k_rot(ctx.get()) != nullptr;
}

bool lminf_can_shift(const struct llama_context * ctx) {
    llama_memory_i * memory = ctx ? llama_get_memory(ctx) : nullptr;
    if (!memory || !memory->get_can_shift()) {
        return false;
    }
    memory = get_attention(memory);

    const auto & hparams = ctx->get_model().hparams;
    if (const auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return can_shift(*iswa->get_base(), hparams) && can_shift(*iswa->get_swa(), hparams);
    }
    const auto * kv = dynamic_cast<llama_kv_cache *>(memory);
    return !kv || can_shift(*kv, hparams);
}

int64_t lminf_n_past(const struct llama_context * ctx, llama_seq_id seq_id) {
    if (!has_seq(ctx, seq_id)) {
        return -1;
    }
    const auto * memory = lminf_memory::of(ctx);
    return memory ? memory->get_cache().sequence(seq_id).n_past : (int64_t) llama_memory_seq_pos_max(llama_get_memory(ctx), seq_id) + 1;
}

static bool refuse(const std::string & reason) {
    if (reason.empty()) {
        lminf_succeed();
        return true;
    }
    lminf_fail(LMINF_STATUS_CONTEXT, reason);
    return false;
}

bool lminf_seq_rm(struct llama_context * ctx, llama_seq_id seq_id, int64_t p0, int64_t p1) {
    if (!has_seq(ctx, seq_id)) {
        return refuse("there is no sequence " + std::to_string(seq_id));
    }
    if (auto * memory = lminf_memory::of(ctx)) {
        return refuse(memory->remove(seq_id, p0, p1));
    }
    const int64_t n_past = lminf_n_past(ctx, seq_id);
    const bool    ok     = llama_memory_seq_rm(llama_get_memory(ctx), seq_id, (llama_pos) std::clamp<int64_t>(p0, 0, n_past),
            p1 < 0 || p1 >= n_past ? -1 : (llama_pos) p1);
    return refuse(ok ? "" : "llama.cpp cannot remove this part of the sequence");
}

bool lminf_seq_cp(struct llama_context * ctx, llama_seq_id src, llama_seq_id dst, int64_t n_tokens) {
    for (const llama_seq_id seq_id : { src, dst }) {
        if (!has_seq(ctx, seq_id)) {
            return refuse("there is no sequence " + std::to_string(seq_id));
        }
    }
    if (auto * memory = lminf_memory::of(ctx)) {
        return refuse(memory->copy(src, dst, n_tokens));
    }
    const bool is_whole = n_tokens < 0 || n_tokens >= lminf_n_past(ctx, src);
    if (!is_whole && !ctx->get_cparams().kv_unified) {
        return refuse("llama.cpp copies only whole sequences between streams of their own");
    }
    llama_memory_t memory = llama_get_memory(ctx);
    if (src != dst) {
        llama_memory_seq_rm(memory, dst, -1, -1);
        llama_memory_seq_cp(memory, src, dst, is_whole ? -1 : 0, is_whole ? -1 : (llama_pos) n_tokens);
    }
    return refuse("");
}

int32_t lminf_decode(
        struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, const int8_t * output) {
    if (n_tokens <= 0 || (uint32_t) n_tokens > llama_n_batch(ctx)) {
        lminf_fail(LMINF_STATUS_CONTEXT, "n_tokens = " + std::to_string(n_tokens) + " is not in [1, n_batch = " +
                std::to_string(llama_n_batch(ctx)) + "]");
        return -1;
    }
    if (!has_seq(ctx, seq_id)) {
        lminf_fail(LMINF_STATUS_CONTEXT, "there is no sequence " + std::to_string(seq_id));
        return -1;
    }
    auto * memory = lminf_memory::of(ctx);
    if (memory) {
        memory->renumber(seq_id);
    }

    std::vector<llama_token>    token(tokens, tokens + n_tokens);
    std::vector<int32_t>        n_seq_id(n_tokens, 1);
    std::vector<llama_seq_id *> seq_ids(n_tokens, &seq_id);
    std::vector<int8_t>         flags(n_tokens, 0);
    if (output) {
        flags.assign(output, output + n_tokens);
    } else {
        flags.back() = 1;
    }

    const llama_batch batch = {
        /*.n_tokens =*/ n_tokens,
        /*.token    =*/ token.data(),
        /*.embd     =*/ nullptr,
        /*.pos      =*/ nullptr, // continues the sequence
        /*.n_seq_id =*/ n_seq_id.data(),
        /*.seq_id   =*/ seq_ids.data(),
        /*.logits   =*/ flags.data(),
    };
    const int32_t res = llama_decode(ctx, batch);

    // llama.cpp undoes an unfinished micro-batch by removing it, which a recurrent state does not allow
    if (res != 0 && res != 1 && memory && memory->is_hybrid()) {
        llama_memory_seq_rm(llama_get_memory(ctx), seq_id, -1, -1);
    }
    return res;
}

const char * lminf_patch_id(void) {
    return LMINF_PATCH_ID;
}

const char * lminf_abi_id(void) {
    return LMINF_ABI_ID;
}

//
// test hooks
//

bool lminf_test_set_position(struct llama_context * ctx, llama_seq_id seq_id, int64_t pos) {
    auto * memory = lminf_memory::of(ctx);
    return memory && memory->set_position(seq_id, pos);
}

size_t lminf_test_get_key(
        const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int64_t pos, void * dst, size_t size) {
    const auto * memory = lminf_memory::of(ctx);
    return memory && has_seq(ctx, seq_id) ? memory->get_cache().get_key(seq_id, il, pos, dst, size) : 0;
}

int64_t lminf_test_get_n_used(const struct llama_context * ctx, llama_seq_id seq_id) {
    const auto * memory = lminf_memory::of(ctx);
    return memory && has_seq(ctx, seq_id) ? memory->get_cache().sequence(seq_id).n_used() : 0;
}

size_t lminf_test_get_sink_original(
        const struct llama_context * ctx, llama_seq_id seq_id, int32_t il, uint32_t j, void * dst, size_t size) {
    const auto * memory = lminf_memory::of(ctx);
    return memory && has_seq(ctx, seq_id) ? memory->get_cache().get_sink_original(seq_id, il, j, dst, size) : 0;
}

bool lminf_test_check_candidates(struct llama_context * ctx, bool check) {
    auto * middle = get_middle(ctx);
    return middle && middle->check_candidates(check);
}

bool lminf_test_get_candidates(const struct llama_context * ctx, int64_t * n_recalled, int64_t * n_found) {
    const auto * middle = get_middle(ctx);
    if (!middle || lminf_memory::of(ctx)->get_group().params.middle.n_candidates == 0) {
        return false;
    }
    const auto res = middle->check_result();
    *n_recalled = res.n_best;
    *n_found    = res.n_found;
    return true;
}
