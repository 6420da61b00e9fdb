// Middle tokens: what the cache stores of every token, and the attention that recalls it.

#include "lminf-kv-cache.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

// keys that tell the mean of all
static constexpr int64_t N_MEAN = 256;

lminf_kv_cache::middle_tokens::middle_tokens(
        std::vector<lminf_store::layer_shape> shapes, std::vector<int64_t> n_heads, const lminf_cache_group & group,
        int64_t n_slots, int64_t n_seqs) :
    store(std::move(shapes), (ggml_type) group.params.middle.cache_type, n_slots, n_seqs, group.store_path),
    recall(store, std::move(n_heads), group.params.middle.k, group.params.middle.per_head, group.params.middle.n_candidates),
    stored_k(store.n_layers()), stored_v(store.n_layers()), is_hooked(store.n_layers()), q_ropes(store.n_layers()) {
}

void lminf_kv_cache::make_middle() {
    middle_layers.assign(layers.size(), -1);

    if (policy.n_middle == 0) {
        return;
    }

    std::vector<lminf_store::layer_shape> shapes;
    std::vector<int64_t>                  n_heads;
    for (size_t i = 0; i < layers.size(); ++i) {
        const uint32_t il = layers[i].il;
        if (il >= group->params.middle.layer_begin && il < group->params.middle.layer_end) {
            middle_layers[i] = (int32_t) shapes.size();
            const int64_t n_embd_k = hparams.n_embd_head_k(il);
            const int64_t n_words  = group->params.middle.n_candidates > 0 ? lminf_sketcher::n_words(n_embd_k) : 0;
            shapes .push_back({ hparams.n_head_kv(il), n_embd_k, hparams.n_embd_head_v(il), n_words });
            n_heads.push_back(hparams.n_head(il));
        }
    }
    if (shapes.empty()) {
        lminf_refuse_middle(model, "none of the layers that are to recall has full attention");
    }
    store_size = lminf_store::full_size(shapes, (ggml_type) group->params.middle.cache_type, policy.n_slots(), n_stream);
    if (hparams.no_alloc) {
        return;
    }
    middle = std::make_unique<middle_tokens>(shapes, n_heads, *group, policy.n_slots(), n_stream);
}

bool lminf_kv_cache::has_recall_hooks() const {
    return !middle || std::all_of(middle->is_hooked.begin(), middle->is_hooked.end(), [](bool x) { return x; });
}

//
// a micro-batch
//

bool lminf_kv_cache::reserve_middle(llama_seq_id seq_id, int64_t n_past) {
    try {
        middle->store.reserve(seq_id, n_past);
        return true;
    } catch (const std::runtime_error & error) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }
}

void lminf_kv_cache::begin_middle(const llama_ubatch & ubatch) {
    std::vector<lminf_recall_token> tokens;

    bool any = false;
    for (const auto & part : parts(ubatch)) {
        const auto & seq = seqs[part.seq_id];
        if (group->params.middle.n_candidates > 0) {
            find_means(part.seq_id);
        }
        for (uint32_t i = 0; i < part.n; ++i) {
            const int64_t p = seq.n_past + i;

            const auto [begin, end] = seq.middle(p, group->recall == LMINF_RECALL_GATED);
            tokens.push_back({ part.seq_id, p, begin, end, -1 });
            any = any || begin < end;
        }
    }
    middle->recalls = any && group->recall != LMINF_RECALL_OFF;
    middle->recall.begin(std::move(tokens), middle->recalls, group->recall == LMINF_RECALL_GATED);
}

void lminf_kv_cache::find_means(llama_seq_id seq_id) {
    const auto [slot, n] = middle_rows(seqs[seq_id]);
    if (n >= N_MEAN && !middle->store.has_means(seq_id)) {
        lctx->synchronize();
        middle->recall.find_means(seq_id, slot, n);
    }
}

void lminf_kv_cache::build_middle_inputs(ggml_context * ctx, const llama_ubatch & ubatch) const {
    // a context is made with several graphs, so the first one's layers are known before a token is decoded
    if (middle->neg_pos && !has_recall_hooks()) {
        lminf_refuse_middle(model, "its attention is built in a way of its own");
    }
    for (auto * input : { &middle->neg_pos, &middle->q_shift }) {
        *input = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ubatch.n_tokens*hparams.n_pos_per_embd());
        ggml_set_input(*input);
    }
    ggml_set_name(middle->neg_pos, "lminf_inp_neg_pos");
    ggml_set_name(middle->q_shift, "lminf_inp_q_shift");

    middle->was_built = middle->recalls;
}

void lminf_kv_cache::set_middle_inputs(const llama_ubatch & ubatch) const {
    if (middle->recalls) {
        for (const auto & part : parts(ubatch)) {
            std::vector<int64_t> keys(policy.n_cells(), INT64_MAX);
            for (int64_t cell = policy.n_sink_cells(); cell < policy.n_cells(); ++cell) {
                keys[cell] = seqs[part.seq_id].key_at(cell);
            }
            middle->recall.set_cells(part.seq_id, std::move(keys));
        }
    }
    std::vector<int32_t> neg_pos;
    std::vector<int32_t> q_shift;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_pos pos = ubatch.get_pos_rope()[i];
        neg_pos.push_back(-pos);
        q_shift.push_back((int32_t) group->params.middle.distance - pos);
    }
    for (const auto & [input, pos] : { std::pair(middle->neg_pos, neg_pos), std::pair(middle->q_shift, q_shift) }) {
        if (input->buffer) { // it has a use: layers have RoPE, and recall
            ggml_backend_tensor_set(input, rope_positions(pos).data(), 0, ggml_nbytes(input));
        }
    }
}

ggml_tensor * lminf_kv_cache::store_k(ggml_context * ctx, ggml_tensor * k_cur, int32_t ikv) const {
    const int32_t layer = middle_layers[ikv];

    ggml_tensor * cur = k_cur;
    if (hadamard(ikv)) {
        cur = llama_mul_mat_hadamard(ctx, cur, hadamard(ikv));
    }
    // to position 0, not un-rotated: what YaRN multiplies keys with stays on them
    cur = ropes[ikv].shift(ctx, cur, middle->neg_pos);

    return middle->stored_k[layer] = middle->recall.store_keys(ctx, layer, k_cur, cur);
}

ggml_tensor * lminf_kv_cache::store_v(ggml_context * ctx, ggml_tensor * v_cur, int32_t ikv) const {
    const int32_t layer = middle_layers[ikv];
    const int32_t il    = (int32_t) layers[ikv].il;

    if (v_cur->ne[0] != hparams.n_embd_head_v(il)) { // the heads are merged already (PLM)
        v_cur = ggml_reshape_3d(ctx, v_cur, hparams.n_embd_head_v(il), hparams.n_head_kv(il), v_cur->ne[1]);
    }
    return middle->stored_v[layer] = middle->recall.store_values(ctx, layer, v_cur);
}

ggml_tensor * lminf_kv_cache::build_attn(
        ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * kq_mask,
        ggml_tensor * sinks, float kq_scale, int32_t il) const {
    const int32_t ikv   = map_layer_ids.at(il);
    const int32_t layer = middle ? middle_layers[ikv] : -1;
    if (layer < 0) {
        return nullptr;
    }
    if (kq_b || sinks) {
        lminf_refuse_middle(model, kq_b ? "its attention has a bias" : "its attention has learned sink logits");
    }
    auto & rope = middle->q_ropes[layer];
    if (rope.state == lminf_rope::UNKNOWN) {
        rope = lminf_rope::find_query(q);
        if (rope.state == lminf_rope::UNSUPPORTED) {
            lminf_refuse_middle(model, "its queries are changed again after RoPE");
        }
    }
    middle->is_hooked[layer] = true;

    if (!middle->recalls) {
        return nullptr;
    }

    ggml_tensor * q_far = q;
    if (hadamard(ikv)) {
        q_far = llama_mul_mat_hadamard(ctx, q_far, hadamard(ikv));
    }
    q_far = rope.shift(ctx, q_far, middle->q_shift);

    lminf_recall::inputs in = {};
    in.q         = q;
    in.q_far     = q_far;
    in.k         = k;
    in.v         = v;
    in.mask      = kq_mask;
    in.stored_k  = middle->stored_k[layer];
    in.stored_v  = middle->stored_v[layer];
    in.scale     = kq_scale;
    in.softcap   = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    in.n_threads = lctx ? std::max(lctx->n_threads(), lctx->n_threads_batch()) : 1;

    return middle->recall.attend(ctx, layer, in);
}

//
// between micro-batches
//

void lminf_kv_cache::reset_sequence(llama_seq_id seq_id) {
    seqs[seq_id] = lminf_sequence(policy);
    if (middle) {
        middle->store.release(seq_id);
    }
}

std::pair<int64_t, int64_t> lminf_kv_cache::middle_rows(const lminf_sequence & seq) const {
    const auto [first, end] = seq.stored();

    const int64_t begin = std::max(first, end - policy.n_slots());
    return begin < end ? std::pair(policy.slot(begin), end - begin) : std::pair<int64_t, int64_t>(0, 0);
}

lminf_middle_stats lminf_kv_cache::middle_stats(llama_seq_id seq_id) const {
    lminf_middle_stats res = {};
    res.n_bytes_full = (int64_t) store_size;
    if (middle) {
        const auto & seq = seqs[seq_id];

        const auto [begin, end] = seq.middle(seq.n_past);

        res.n_stored      = middle_rows(seq).second;
        res.n_retrievable = end - begin;
        res.n_bytes       = res.n_stored*(int64_t) middle->store.token_size();
        res.n_bytes_token = (int64_t) middle->store.token_size();
        res.scan_seconds  = middle->recall.scan_seconds();
    }
    return res;
}

std::vector<lminf_recalled> lminf_kv_cache::recalled(llama_seq_id seq_id) const {
    return middle && middle->recalls ? middle->recall.record(seq_id) : std::vector<lminf_recalled>();
}

bool lminf_kv_cache::check_candidates(bool check) {
    if (!middle || group->params.middle.n_candidates == 0) {
        return false;
    }
    middle->recall.check_candidates(check);
    return true;
}

lminf_recall::checked lminf_kv_cache::check_result() const {
    return middle ? middle->recall.check_result() : lminf_recall::checked();
}

// [number of rows, id of the file] and, in memory, the rows; of a file, their checksum, with that of their sketches if the means
// were found: they may be found after the state was saved
void lminf_kv_cache::write_middle(llama_io_write_i & io, llama_seq_id seq_id) const {
    const auto & store = middle->store;

    const auto [slot, n] = middle_rows(seqs[seq_id]);

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

void lminf_kv_cache::read_middle(llama_io_read_i & io, llama_seq_id seq_id, const lminf_sequence & seq) {
    const auto & store = middle->store;

    const auto [slot, n] = middle_rows(seq);

    uint64_t head[2];
    io.read(head, sizeof(head));
    if (head[0] != (uint64_t) n) {
        throw std::runtime_error("the state's middle tokens are damaged");
    }
    if (head[1] != store.id()) {
        throw std::runtime_error("the state's middle tokens are in another store than this context's");
    }
    if (store.is_file()) {
        uint64_t sum = 0;
        io.read(&sum, sizeof(sum));
        const bool is_equal = (store.has_means(seq_id) && sum == store.checksum(seq_id, slot, n, true)) ||
            sum == store.checksum(seq_id, slot, n, false);
        if (!is_equal) {
            throw std::runtime_error("the store of middle tokens " + group->store_path + " has changed since the state was saved");
        }
    } else {
        store.for_each_stretch(seq_id, slot, n, [&](uint8_t * rows, size_t size) { io.read(rows, size); });
    }
}
