#include "lminf-middle.h"

#include "lminf-kv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

// keys that tell the mean of all
static constexpr int64_t N_MEAN = 256;

//
// creation
//

// The store is filled and read by operations of our own, which run on the CPU: where keys and values are computed or kept elsewhere,
// they would be handed pointers into a device's memory, or be sent to another machine.
static void check_devices(const llama_model & model, const lminf_layers & layers, const llama_context & lctx) {
    const auto is_cpu = [](ggml_backend_dev_t dev) {
        const auto type = ggml_backend_dev_type(dev);
        return type == GGML_BACKEND_DEVICE_TYPE_CPU || type == GGML_BACKEND_DEVICE_TYPE_ACCEL;
    };
    bool ok = layers.is_host();
    for (const auto & layer : layers.all) {
        ok = ok && is_cpu(model.dev_layer(layer.il));
    }
    // large products of weights in host memory are computed on any device that is there
    for (const auto & dev : model.devices) {
        ok = ok && (is_cpu(dev.dev) || !lctx.get_cparams().op_offload);
    }
    if (!ok) {
        lminf_refuse_middle(model, "they are stored and looked up by the CPU alone, and this context computes on another device; "
                "load the model for the CPU (no devices)");
    }
}

std::unique_ptr<lminf_middle> lminf_middle::make(
        const llama_model & model, const lminf_policy & policy, lminf_layers & layers, lminf_cache_group & group,
        const lminf_attention_op * attention) {
    const auto & hparams = model.hparams;
    const auto & params  = group.params.middle;
    if (policy.n_middle == 0) {
        return nullptr;
    }
    check_devices(model, layers, group.lctx);
    if (!attention) {
        lminf_refuse_middle(model, "they are looked up by attention of our own, which this context has not: " + group.why_stock);
    }
    std::vector<int32_t>                  store_layers(layers.all.size(), -1);
    std::vector<lminf_store::layer_shape> shapes;
    std::vector<int64_t>                  n_heads;
    for (size_t i = 0; i < layers.all.size(); ++i) {
        const auto & layer = layers.all[i];
        const auto   il    = (uint32_t) layer.il;
        if (il >= params.layer_begin && il < params.layer_end) {
            store_layers[i] = (int32_t) shapes.size();
            shapes .push_back({ layer.n_head_kv, layer.n_embd_k, layer.n_embd_v,
                    params.n_candidates > 0 ? lminf_sketcher::n_words(layer.n_embd_k) : 0 });
            n_heads.push_back(hparams.n_head(il));
        }
    }
    if (shapes.empty()) {
        lminf_refuse_middle(model, "none of the layers that are to recall has full attention");
    }
    group.store_size += lminf_store::full_size(shapes, (ggml_type) params.cache_type, policy.n_slots(), layers.n_stream);
    if (hparams.no_alloc) {
        return nullptr;
    }
    return std::unique_ptr<lminf_middle>(
            new lminf_middle(model, policy, layers, group, *attention, std::move(store_layers), std::move(shapes), std::move(n_heads)));
}

lminf_middle::lminf_middle(
        const llama_model & model, const lminf_policy & policy, lminf_layers & layers, const lminf_cache_group & group,
        const lminf_attention_op & attention, std::vector<int32_t> store_layers, std::vector<lminf_store::layer_shape> shapes, std::vector<int64_t> n_heads) :
    model(model), policy(policy), layers(layers), attention(attention), store_layers(std::move(store_layers)),
    distance((int32_t) group.params.middle.distance), has_candidates(group.params.middle.n_candidates > 0),
    store(std::move(shapes), (ggml_type) group.params.middle.cache_type, policy.n_slots(), layers.n_stream, group.store_path),
    recall(store, std::move(n_heads), group.params.middle.k, group.params.middle.per_head, group.params.middle.n_candidates),
    stored_k(store.n_layers()), stored_v(store.n_layers()), hooked(store.n_layers()), q_ropes(store.n_layers()) {
}

bool lminf_middle::is_hooked() const {
    return std::all_of(hooked.begin(), hooked.end(), [](bool x) { return x; });
}

//
// a micro-batch
//

void lminf_middle::reserve_or_throw(int64_t seq_id, int64_t n_past) {
    store.reserve(seq_id, n_past);
}

bool lminf_middle::reserve(int64_t seq_id, int64_t n_past) {
    try {
        store.reserve(seq_id, n_past);
        return true;
    } catch (const std::runtime_error & error) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }
}

void lminf_middle::find_means(int64_t seq_id, const lminf_sequence & seq, llama_context & lctx) {
    const auto [slot, n] = rows(seq);
    if (has_candidates && n >= N_MEAN && !store.has_means(seq_id)) {
        lctx.synchronize();
        recall.find_means(seq_id, slot, n);
        store.found_means(seq_id);
    }
}

void lminf_middle::begin(const std::vector<lminf_attention_op::part> & parts, lminf_recall_mode mode) {
    std::vector<lminf_recall_token> tokens;

    bool any = false;
    near_begin.clear();
    for (const auto & part : parts) {
        for (int64_t p = part.p0; p < part.p0 + part.n; ++p) {
            const auto [begin, end] = part.seq->middle(p, mode == LMINF_RECALL_GATED);
            tokens.push_back({ part.seq_id, p, begin, end, -1 });
            near_begin.push_back(begin < end ? end : 0);
            any = any || begin < end;
        }
    }
    recalls = any && mode != LMINF_RECALL_OFF;
    recall.begin(std::move(tokens), recalls, mode == LMINF_RECALL_GATED);
}

//
// its graph
//

void lminf_middle::build_inputs(ggml_context * ctx, int64_t n_tokens) const {
    // a context is made with several graphs, so the first one's layers are known before a token is decoded
    if (neg_pos && !is_hooked()) {
        lminf_refuse_middle(model, "its attention is built in a way of its own");
    }
    neg_pos = layers.new_positions(ctx, n_tokens);
    q_shift = layers.new_positions(ctx, n_tokens);
    ggml_set_name(neg_pos, "lminf_inp_neg_pos");
    ggml_set_name(q_shift, "lminf_inp_q_shift");

    was_built = recalls;
}

void lminf_middle::set_inputs(const std::vector<int32_t> & pos_rope) const {
    std::vector<int32_t> back;
    std::vector<int32_t> far;
    for (const int32_t pos : pos_rope) {
        back.push_back(-pos);
        far .push_back(distance - pos);
    }
    layers.set_positions(neg_pos, back);
    layers.set_positions(q_shift, far);
}

ggml_tensor * lminf_middle::store_k(ggml_context * ctx, ggml_tensor * k_cur, size_t ikv) const {
    const int32_t layer = store_layers[ikv];
    if (layer < 0) {
        return k_cur;
    }
    return stored_k[layer] = recall.store_keys(ctx, layer, k_cur, layers.all[ikv].unstored(ctx, k_cur, neg_pos));
}

ggml_tensor * lminf_middle::store_v(ggml_context * ctx, ggml_tensor * v_cur, size_t ikv) const {
    const int32_t layer = store_layers[ikv];
    if (layer < 0) {
        return v_cur;
    }
    return stored_v[layer] = recall.store_values(ctx, layer, v_cur);
}

std::vector<int64_t> lminf_middle::near() const {
    return recalls ? near_begin : std::vector<int64_t>();
}

ggml_tensor * lminf_middle::build_attn(ggml_context * ctx, size_t ikv, const lminf_attention_op::inputs & in, int32_t n_threads) const {
    const int32_t layer = store_layers[ikv];
    if (layer < 0) {
        return nullptr;
    }
    if (in.sink_logits) {
        lminf_refuse_middle(model, "its attention has learned sink logits");
    }
    auto & rope = q_ropes[layer];
    if (rope.state == lminf_rope::UNKNOWN) {
        rope = lminf_rope::find_query(in.q);
        if (rope.state == lminf_rope::UNSUPPORTED) {
            lminf_refuse_middle(model, "its queries are changed again after RoPE");
        }
    }
    hooked[layer] = true;

    if (!recalls) {
        return nullptr;
    }
    ggml_tensor * q_far = in.q;
    if (ggml_tensor * hadamard = layers.all[ikv].hadamard()) {
        q_far = llama_mul_mat_hadamard(ctx, q_far, hadamard);
    }
    q_far = rope.shift(ctx, q_far, q_shift);

    const auto & hparams = model.hparams;

    lminf_recall::inputs inputs = {};
    inputs.window    = attention.build(ctx, ikv, in, true);
    inputs.q_far     = q_far;
    inputs.stored_k  = stored_k[layer];
    inputs.stored_v  = stored_v[layer];
    inputs.scale     = in.scale;
    inputs.softcap   = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    inputs.n_threads = n_threads;

    return recall.attend(ctx, layer, inputs);
}

//
// between micro-batches
//

void lminf_middle::release(int64_t seq_id) {
    store.release(seq_id);
}

void lminf_middle::copy(int64_t src, int64_t dst, const lminf_sequence & seq) {
    const auto [slot, n] = rows(seq);
    store.copy(src, dst, slot, n);
}

std::pair<int64_t, int64_t> lminf_middle::rows(const lminf_sequence & seq) const {
    const auto [first, end] = seq.stored();

    const int64_t begin = std::max(first, end - policy.n_slots());
    return begin < end ? std::pair(policy.slot(begin), end - begin) : std::pair<int64_t, int64_t>(0, 0);
}

lminf_middle_stats lminf_middle::stats(const lminf_sequence & seq) const {
    const auto [begin, end] = seq.middle(seq.n_past);

    lminf_middle_stats res = {};
    res.n_stored      = rows(seq).second;
    res.n_retrievable = end - begin;
    res.n_bytes       = res.n_stored*(int64_t) store.token_size();
    res.n_bytes_token = (int64_t) store.token_size();
    res.scan_seconds  = recall.scan_seconds();
    return res;
}

std::vector<lminf_recalled> lminf_middle::recalled(int64_t seq_id, int64_t pos) const {
    return recalls ? recall.record(seq_id, pos) : std::vector<lminf_recalled>();
}

bool lminf_middle::check_candidates(bool check) {
    if (has_candidates) {
        recall.check_candidates(check);
    }
    return has_candidates;
}

// A file's checksum includes its sketches if the means were found: they may be found after the state was saved.
void lminf_middle::write(llama_io_write_i & io, int64_t seq_id, const lminf_sequence & seq) const {
    const auto [slot, n] = rows(seq);

    const uint64_t head[] = { (uint64_t) n, store.id() };
    io.write(head, sizeof(head));

    if (store.is_file()) {
        store.sync();
        const uint64_t sum = store.checksum(seq_id, slot, n, store.has_means(seq_id));
        io.write(&sum, sizeof(sum));
    } else {
        store.for_each_stretch(seq_id, slot, n, [&](const uint8_t * rows, size_t size) { io.write(rows, size); });
    }
}

void lminf_middle::read(llama_io_read_i & io, int64_t seq_id, const lminf_sequence & seq) {
    const auto [slot, n] = rows(seq);

    uint64_t head[2] = {};
    io.read(head, sizeof(head));
    if (head[0] != (uint64_t) n) {
        throw std::runtime_error("the state's middle tokens are damaged");
    }
    if (head[1] != store.id()) {
        throw std::runtime_error("the state's middle tokens are in another store than this context's");
    }
    if (!store.is_file()) {
        store.for_each_stretch(seq_id, slot, n, [&](uint8_t * rows, size_t size) { io.read(rows, size); });
        store.look_for_means(seq_id);
        return;
    }
    uint64_t sum = 0;
    io.read(&sum, sizeof(sum));
    const bool is_equal = (store.has_means(seq_id) && sum == store.checksum(seq_id, slot, n, true)) ||
        sum == store.checksum(seq_id, slot, n, false);
    if (!is_equal) {
        throw std::runtime_error("the store of middle tokens " + store.get_path() + " has changed since the state was saved");
    }
}
