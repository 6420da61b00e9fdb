#include "random_model.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>

//
// metadata
//

static constexpr uint32_t n_layer     = 2;
static constexpr uint32_t n_embd      = 64;
static constexpr uint32_t n_head      = 2;
static constexpr uint32_t n_embd_head = n_embd/n_head;
static constexpr uint32_t n_ff        = 96;

using layers_t = std::vector<uint32_t>;

// What every model is given. Trained on 256 tokens, so that a window of 32 can be passed many times.
static metadata_map base_metadata() {
    return {
        { "vocab_size",                       64u },
        { "context_length",                   256u },
        { "embedding_length",                 n_embd },
        { "block_count",                      n_layer },
        { "feed_forward_length",              n_ff },
        { "attention.head_count",             n_head },
        { "attention.sliding_window_pattern", 2u },
        { "tokenizer.ggml.token_type_count",  2u },
        { "full_attention_interval",          2u },
    };
}

// All experts are used: which ones are chosen cannot depend on rounding.
static metadata_map experts() {
    return {
        { "expert_count",                      2u },
        { "expert_used_count",                 2u },
        { "expert_shared_count",               1u },
        { "expert_gating_func",                2u },
        { "expert_feed_forward_length",        48u },
        { "expert_shared_feed_forward_length", 48u },
        { "expert_chunk_feed_forward_length",  48u },
        { "expert_group_scale",                1.0f },
        { "experts_per_group",                 1u },
        { "interleave_moe_layer_step",         2u },
        { "leading_dense_block_count",         1u },
        { "moe_every_n_layers",                1u },
    };
}

// One KV head: a latent of 32 and a rotated part of 16.
static metadata_map latent_attention() {
    return {
        { "attention.head_count_kv",    1u },
        { "attention.q_lora_rank",      32u },
        { "attention.kv_lora_rank",     32u },
        { "attention.key_length",       48u },
        { "attention.value_length",     32u },
        { "attention.key_length_mla",   32u },
        { "attention.value_length_mla", 16u },
        { "rope.dimension_count",       16u },
    };
}

// The indexer selects more keys than there are: which ones are chosen cannot depend on rounding.
static metadata_map indexer() {
    return {
        { "attention.indexer.head_count",   2u },
        { "attention.indexer.key_length",   64u },
        { "attention.indexer.top_k",        131072u },
        { "attention.indexer.types",        layers_t{ 1, 0 } },
        { "attention.indexer.block_size",   4u },
        { "attention.indexer.kpool",        4u },
        { "attention.indexer.local_blocks", 1u },
    };
}

static metadata_map hyper_connections() {
    return {
        { "hyper_connection.count",               4u },
        { "hyper_connection.sinkhorn_iterations", 2u },
        { "hyper_connection.epsilon",             1e-6f },
        { "hyper_connection.magnitude",           2.0f },
        { "hyper_connection.low_rank",            8u },
    };
}

static metadata_map recurrent_state() {
    return {
        { "ssm.conv_kernel",    4u },
        { "ssm.inner_size",     2*n_embd },
        { "ssm.state_size",     32u },
        { "ssm.time_step_rank", n_head },
        { "ssm.group_count",    2u },
    };
}

// latent attention of sliding layers
static metadata_map latent_sliding_attention() {
    return {
        { "attention.kv_lora_rank_swa",     32u },
        { "attention.key_length_swa",       48u },
        { "attention.value_length_swa",     32u },
        { "attention.key_length_mla_swa",   32u },
        { "attention.value_length_mla_swa", 16u },
        { "rope.freq_base_swa",             10000.0f },
    };
}

static const metadata_map & single_values() {
    static const metadata_map res = {
        { "activation.situ_beta",                   4.0f },
        { "activation.situ_linear_beta",            25.0f },
        { "adapters.count",                         1u },
        { "adapters.lora_rank",                     4u },
        { "adapters.token_ids_activate",            layers_t{ 1 } },
        { "adapters.token_ids_substitute",          layers_t{ 2 } },
        { "attention.clamp_kqv",                    4.0f },
        { "attention.compress_ratios",              layers_t{ 0, 4 } },
        { "attention.compress_rope_freq_base",      10000.0f },
        { "attention.decay_lora_rank",              16u },
        { "attention.gate_lora_rank",               16u },
        { "attention.group_norm_epsilon",           1e-5f },
        { "attention.group_norm_groups",            8u },
        { "attention.iclr_lora_rank",               16u },
        { "attention.key_length_swa",               n_embd_head },
        { "attention.layer_norm_epsilon",           1e-5f },
        { "attention.layer_norm_rms_epsilon",       1e-5f },
        { "attention.output_group_count",           2u },
        { "attention.output_lora_rank",             16u },
        { "attention.relative_buckets_count",       8u },
        { "attention.scale",                        0.2f },
        { "attention.sliding_window",               16u },
        { "attention.sliding_window_pattern",       layers_t{ 1, 0 } },
        { "attention.value_length_swa",             n_embd_head },
        { "attention.value_residual_mix_lora_rank", 16u },
        { "attn_res.block_size",                    12u },
        { "convnext.block_count",                   n_layer },
        { "convnext.embedding_length",              n_embd },
        { "embedding_length_per_layer_input",       n_embd_head },
        { "embedding_scale",                        1.0f },
        { "expert_weights_norm",                    true },
        { "expert_weights_scale",                   1.0f },
        { "features_length",                        n_embd },
        { "hash_layer_count",                       0u },
        { "kda.gate_lower_bound",                   -5.0f },
        { "kda.head_dim",                           n_embd_head },
        { "kda.safe_gate",                          true },
        { "logit_scale",                            1.0f },
        { "posnet.block_count",                     n_layer },
        { "posnet.embedding_length",                n_embd },
        { "residual_scale",                         1.0f },
        { "rope.dimension_sections",                layers_t{ 8, 4, 4, 0 } },
        { "shortconv.l_cache",                      3u },
        { "swiglu_clamp_exp",                       7.0f },
        { "target_hidden_size",                     n_embd },
        { "time_decay_extra_dim",                   16u },
        { "time_mix_extra_dim",                     16u },
        { "use_parallel_residual",                  true },
        { "wkv.head_size",                          n_embd_head },
        { "xielu.alpha_n",                          1.0f },
        { "xielu.alpha_p",                          1.0f },
        { "xielu.beta",                             1.0f },
        { "xielu.eps",                              1e-7f },
    };
    return res;
}

// what a model is given when llama.cpp asks for a key; nothing if the key is unknown here
static metadata_map metadata_on_demand(const std::string & key) {
    const auto single = single_values().find(key);
    if (single != single_values().end()) {
        return { *single };
    }
    for (const auto & group : { experts(), latent_attention(), latent_sliding_attention(), indexer(), hyper_connections(),
             recurrent_state() }) {
        if (group.count(key)) {
            return group;
        }
    }
    return {};
}

static metadata_map operator+(metadata_map a, const metadata_map & b) {
    for (const auto & [key, value] : b) {
        a.insert_or_assign(key, value);
    }
    return a;
}

// What some architectures cannot be without although they do not ask, or what they need to be other than above.
static metadata_map metadata_of(const std::string & arch) {
    // the second layer has no attention
    const metadata_map attention_then_recurrent = {
        { "attention.head_count",    layers_t{ n_head, 0 } },
        { "attention.head_count_kv", layers_t{ n_head, 0 } },
    };
    const metadata_map latent_then_recurrent = latent_attention() + metadata_map{
        { "attention.head_count",    layers_t{ n_head, 0 } },
        { "attention.head_count_kv", layers_t{ 1, 0 } },
    };
    const metadata_map encoder = {
        { "attention.causal", false },
    };
    // latents that are multiplied out before they are stored: an unrotated half of each key and a rotated one
    const metadata_map latent_parts = {
        { "attention.q_lora_rank",  32u },
        { "attention.kv_lora_rank", 32u },
        { "rope.dimension_count",   n_embd_head/2 },
    };
    // as wide in all as keys and values are, a head each
    const metadata_map delta_net = {
        { "ssm.inner_size",     n_embd },
        { "ssm.state_size",     n_embd_head },
        { "ssm.time_step_rank", n_head },
        { "ssm.group_count",    n_head },
    };

    // attention, a recurrent layer, a feed-forward layer
    const metadata_map one_of_each = {
        { "block_count",             3u },
        { "feed_forward_length",     layers_t{ 0, 0, n_ff } },
        { "attention.head_count",    layers_t{ n_head, 0, 0 } },
        { "attention.head_count_kv", layers_t{ n_head, 0, 0 } },
    };

    static const std::map<std::string, metadata_map> res = {
        { "arctic",         experts() },
        { "cohere2moe",     experts() + metadata_map{{ "attention.layer_norm_epsilon", 1e-5f }} },
        { "dbrx",           experts() },
        { "grok",           experts() },
        { "llada-moe",      experts() },
        { "minimax-01",     experts() },
        { "olmoe",          experts() },
        { "phimoe",         experts() },
        { "qwen2moe",       experts() },
        { "qwen3moe",       experts() },
        { "qwen3vlmoe",     experts() },
        { "rnd1",           experts() },
        { "smallthinker",   experts() },

        { "bert",           encoder },
        { "eurobert",       encoder },
        { "jina-bert-v2",   encoder },
        { "jina-bert-v3",   encoder },
        { "llama-embed",    encoder },
        { "modern-bert",    encoder },
        { "neo-bert",       encoder },
        { "nomic-bert",     encoder },
        { "nomic-bert-moe", encoder + experts() },

        { "bailingmoe3",    latent_then_recurrent },
        { "glm5-next",      latent_then_recurrent + metadata_map{ // nothing is rotated
            { "attention.key_length", 32u },
            { "rope.dimension_count", 0u },
        } },
        { "granitehybrid",  attention_then_recurrent },
        { "jamba",          attention_then_recurrent },
        { "kimi-k3",        latent_then_recurrent },
        { "kimi-linear",    latent_then_recurrent },
        { "lfm2",           attention_then_recurrent },
        { "lfm2moe",        attention_then_recurrent },
        { "nemotron_h",     one_of_each },
        { "nemotron_h_moe", experts() + one_of_each },
        { "plamo2",         attention_then_recurrent + metadata_map{{ "ssm.group_count", 0u }} },
        { "qwen35",         delta_net },
        { "qwen35moe",      experts() + delta_net },
        { "qwen3next",      experts() + delta_net },
        { "qwen4exp",       experts() + delta_net },
        { "arwkv7",         {{ "attention.gate_lora_rank", 16u }} },
        { "rwkv7",          {{ "attention.gate_lora_rank", 16u }} },

        { "afmoe",          {{ "attention.sliding_window", 16u }} },
        { "chameleon",      {{ "vocab_size", 8256u }} },  // 8192 tokens of images are among them
        { "deepseek4",      experts() + metadata_map{
            { "expert_gating_func",      4u },
            { "attention.head_count_kv", 1u },
            { "attention.key_length",    32u },
            { "attention.value_length",  32u },
        } },
        { "dflash",         {{ "target_layers", layers_t{ 0, 1 } }} },
        { "dots3note",      {{ "attention.sliding_window_pattern", layers_t{ 0, 1 } }} }, // the first layer has an indexer
        { "eagle3",         {{ "block_count", 1u }, { "target_layers", layers_t{ 0, 1, 2 } }} },
        { "gemma3n",        {{ "block_count", 22u }} },   // the first 20 have keys and values of their own
        { "jais",           {{ "attention.max_alibi_bias", 8.0f }} },
        { "llama4",         {{ "block_count", 4u }} },    // every fourth layer has no RoPE
        { "minicpm3",       latent_parts },
        { "paddleocr",      {{ "rope.dimension_sections", layers_t{ 8, 4, 4, 0 } }} },
        { "plm",            latent_parts },
        { "qwen3tts",       {{ "vocab_size", 3072u }} }, // as many as its output layer has
        { "hrm_text",       {
            { "block_count",          6u }, // passes through two layers
            { "hrm.layers_per_stack", 1u },
            { "hrm.h_cycles",         2u },
            { "hrm.l_cycles",         2u },
        } },
    };
    const auto found = res.find(arch);
    return found == res.end() ? metadata_map{} : found->second;
}

static void set_value(gguf_context * gguf, const std::string & key, const metadata_value & value) {
    struct setter {
        gguf_context * gguf;
        const char   * key;

        void operator()(uint32_t x) const { gguf_set_val_u32 (gguf, key, x); }
        void operator()(float    x) const { gguf_set_val_f32 (gguf, key, x); }
        void operator()(bool     x) const { gguf_set_val_bool(gguf, key, x); }

        void operator()(const layers_t & x) const {
            gguf_set_arr_data(gguf, key, GGUF_TYPE_UINT32, x.data(), x.size());
        }
    };
    std::visit(setter{ gguf, key.c_str() }, value);
}

//
// weights
//

static bool contains(const std::string & name, const char * part) {
    return name.find(part) != std::string::npos;
}

static bool ends_with(const std::string & name, const std::string & end) {
    return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

// Weights keep the size of what passes through them, so that a text of any length keeps logits of a normal size.
static void set_random_weights(ggml_tensor * tensor, void * /*user_data*/) {
    const std::string name = tensor->name;

    uint32_t seed = 1;
    for (const char c : name) {
        seed = 31*seed + (unsigned char) c;
    }
    std::mt19937                    generator(seed);
    std::normal_distribution<float> normal;

    const bool is_vector = ggml_nrows(tensor) == 1;

    float mean  = 0.0f;
    float scale = 1.0f/std::sqrt(float(tensor->ne[0]));
    if ((contains(name, "norm") || contains(name, "scale")) && !ends_with(name, ".bias")) {
        mean  = 1.0f;
        scale = 0.1f;
    } else if (contains(name, "rope_f")) {
        mean  = 1.5f;
        scale = 0.1f;
    } else if (is_vector) {
        scale = 0.1f;
    } else if (contains(name, "token_embd")) {
        scale = 1.0f;
    } else if (contains(name, "attn_q.") || contains(name, "attn_k.") || contains(name, "attn_qkv.")) {
        scale *= 2.0f; // sharp attention: a wrong position shows
    }
    const bool is_decay = contains(name, "ssm_a"); // of a recurrent state, must be negative

    std::vector<float> data(size_t(ggml_nelements(tensor)));
    for (auto & x : data) {
        x = mean + scale*normal(generator);
        x = is_decay ? -std::fabs(x) : x;
    }

    std::vector<uint8_t> bytes(ggml_nbytes(tensor), 0); // integers stay 0
    if (tensor->type == GGML_TYPE_F32) {
        memcpy(bytes.data(), data.data(), bytes.size());
    } else if (tensor->type == GGML_TYPE_F16) {
        ggml_fp32_to_fp16_row(data.data(), reinterpret_cast<ggml_fp16_t *>(bytes.data()), int64_t(data.size()));
    }
    ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
}

//
// model
//

static std::string last_log_error; // of llama.cpp; one line

static void keep_error(ggml_log_level level, const char * text, void * /*user_data*/) {
    const std::string sign = "error loading model: ";
    const std::string line = text;
    const size_t      at   = line.find(sign);
    if (level == GGML_LOG_LEVEL_ERROR && at != std::string::npos) {
        last_log_error = line.substr(at + sign.size(), line.find_last_not_of('\n') + 1 - at - sign.size());
    }
}

static bool has_prefix(const std::string & key) {
    return !contains(key, "tokenizer.") && !contains(key, "xielu.");
}

// the key that llama.cpp missed, without the architecture's name, or ""
static std::string missing_key(const std::string & error, const std::string & arch) {
    const std::string sign = "key not found in model: ";
    const size_t      at   = error.find(sign);
    if (at == std::string::npos) {
        return "";
    }
    const std::string key = error.substr(at + sign.size(), error.find('\n', at) - at - sign.size());
    return has_prefix(key) ? key.substr(arch.size() + 1) : key;
}

static llama_model_ptr load(const std::string & arch, const metadata_map & metadata, ggml_backend_dev_t device) {
    gguf_context_ptr gguf(gguf_init_empty());
    gguf_set_val_str(gguf.get(), "general.architecture", arch.c_str());
    gguf_set_val_str(gguf.get(), "tokenizer.ggml.model", "no_vocab");
    for (const auto & [key, value] : metadata) {
        set_value(gguf.get(), has_prefix(key) ? arch + "." + key : key, value);
    }

    ggml_backend_dev_t   devices[] = { device, nullptr };
    llama_model_params   params    = llama_model_default_params();
    params.devices           = devices;
    params.progress_callback = [](float, void *) { return true; };
    return llama_model_ptr(llama_model_init_from_user(gguf.get(), set_random_weights, nullptr, params));
}

llama_model_ptr make_random_model(llm_arch arch, const metadata_map & given, std::string & error, ggml_backend_dev_t device) {
    const std::string name = llm_arch_name(arch);

    metadata_map          metadata = base_metadata() + metadata_of(name) + given;
    std::set<std::string> asked; // keys; each once

    if (arch == LLM_ARCH_GEMMA4_ASSISTANT) {
        error = "the draft head of a Gemma 4 model, which llama.cpp makes from a file only";
        return nullptr;
    }

    llama_log_set(keep_error, nullptr);
    while (true) {
        last_log_error.clear();
        if (auto model = load(name, metadata, device)) {
            if (model->hparams.use_alibi) {
                model->pos_embd = nullptr; // optional tensors are all made, but no model has both kinds of positions
            }
            return model;
        }
        const std::string key   = missing_key(last_log_error, name);
        const auto        group = metadata_on_demand(key);
        if (group.empty() || !asked.insert(key).second) {
            error = last_log_error;
            return nullptr;
        }
        // the key itself may be there in a form that llama.cpp does not take
        metadata = group + metadata + metadata_map{ *group.find(key) };
    }
}
