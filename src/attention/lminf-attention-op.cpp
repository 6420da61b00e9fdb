#include "lminf-attention-op.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

static constexpr size_t N_ALIGN = 64; // of the work area

// sources of an operation
enum { SRC_Q, SRC_K, SRC_V, SRC_Q_FAR, SRC_ORIGINALS, SRC_SINK_LOGITS };

struct lminf_attention_op::layer_op {
    const lminf_attention_op * self;
    size_t                     ikv;
    bool                       parts;

    float scale     = 1.0f;
    int   src[6]    = { 0, 1, 2, -1, -1, -1 }; // where each source is, -1: there is none
    int   n_head    = 0;

    std::vector<float>                  slopes; // ALiBi
    std::vector<lminf_attention_stream> streams;

    const ggml_tensor * source(const ggml_tensor * dst, int i) const { return src[i] < 0 ? nullptr : dst->src[src[i]]; }
};

struct lminf_attention_op::view {
    std::vector<lminf_attention_query> queries;

    std::map<std::pair<int64_t, int64_t>, lminf_attention_plan> plans; // by number of query heads, of KV heads
};

std::string lminf_attention_op::why_not(const llama_model & model, ggml_type type_k, ggml_type type_v) {
    const auto & hparams = model.hparams;

    if (hparams.is_mla()) {
        return "latent attention";
    }
    if (model.arch == LLM_ARCH_GROK) {
        return "logits are squeezed in a way of their own";
    }
    for (const auto & dev : model.devices) {
        if (ggml_backend_dev_type(dev.dev) != GGML_BACKEND_DEVICE_TYPE_CPU && ggml_backend_dev_type(dev.dev) != GGML_BACKEND_DEVICE_TYPE_ACCEL) {
            return "another device than the CPU";
        }
    }
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.is_recr(il) && !lminf_attention_serves(type_k, type_v, hparams.n_embd_head_k(il), hparams.n_embd_head_v(il))) {
            return std::string("keys ") + ggml_type_name(type_k) + ", values " + ggml_type_name(type_v) + ", heads of " +
                std::to_string(hparams.n_embd_head_k(il)) + " components";
        }
    }
    return "";
}

lminf_attention_op::lminf_attention_op(const llama_model & model, const lminf_policy & policy, const lminf_layers & layers,
        const std::vector<ggml_tensor *> & originals) :
    model(model), policy(policy), layers(layers), originals(originals), q_ropes(layers.all.size()),
    all(std::make_unique<view>()), near(std::make_unique<view>()) {
    for (size_t i = 0; i < layers.all.size(); ++i) {
        ops.push_back(std::make_unique<layer_op>());
    }
}

lminf_attention_op::~lminf_attention_op() = default;

//
// a micro-batch
//

void lminf_attention_op::begin(const std::vector<part> & parts, int32_t n_threads) {
    this->parts     = parts;
    this->n_threads = n_threads;

    is_far = std::any_of(parts.begin(), parts.end(), [&](const part & part) {
        return policy.rotates_queries && policy.sinks_far(part.p0 + part.n - 1) > 0;
    });
}

void lminf_attention_op::begin_any() {
    is_far = policy.rotates_queries && policy.n_sink > 0;
}

void lminf_attention_op::build_inputs(ggml_context * ctx, int64_t n_tokens) const {
    was_far = is_far;
    if (is_far) {
        q_shift = layers.new_positions(ctx, n_tokens);
        ggml_set_name(q_shift, "lminf_inp_q_far");
    }
}

void lminf_attention_op::prepare(view & view, const std::vector<int64_t> & near) const {
    view.queries.clear();
    size_t i = 0;
    for (size_t s = 0; s < parts.size(); ++s) {
        for (int64_t p = parts[s].p0; p < parts[s].p0 + parts[s].n; ++p, ++i) {
            lminf_attention_query query = {};
            query.stream    = (int32_t) s;
            query.pos       = p;
            query.sinks     = std::min(policy.n_sink, p + 1);
            query.sinks_far = policy.rotates_queries ? std::min(query.sinks, policy.sinks_far(p)) : 0;
            query.begin     = std::max(policy.window_begin(p), near.empty() ? 0 : near[i]);
            query.end       = p + 1;
            view.queries.push_back(query);
        }
    }
    for (auto & [shape, plan] : view.plans) {
        lminf_attention_job job = {};
        job.n_head    = shape.first;
        job.n_head_kv = shape.second;
        job.n_embd_k  = layers.all[0].n_embd_k;
        job.n_embd_v  = layers.all[0].n_embd_v;
        job.n_tokens  = (int64_t) view.queries.size();
        job.queries   = view.queries.data();
        plan.make(job, n_threads);
    }
}

void lminf_attention_op::set_inputs(const std::vector<int64_t> & near) const {
    runs.resize(parts.size());
    std::vector<int32_t> shifts;
    for (size_t s = 0; s < parts.size(); ++s) {
        const auto & seq = *parts[s].seq;
        runs[s] = seq.kept();

        // from p - base, where RoPE put the query; far sink tokens in their own order stand where they stood at home
        const int64_t home = policy.kept_order ? seq.copies[0].base : 0;
        for (int64_t p = parts[s].p0; p < parts[s].p0 + parts[s].n; ++p) {
            shifts.push_back(policy.sinks_far(p) > 0 ? (int32_t) (seq.base - policy.sink_shift(p) - home) : 0);
        }
    }
    if (was_far) {
        layers.set_positions(q_shift, shifts);
    }

    prepare(*all, {});
    this->near->queries.clear();
    if (!near.empty()) {
        prepare(*this->near, near);
    }

    size_t size = 0;
    for (const auto & op : ops) {
        const auto & layer = layers.all[op->ikv];
        op->streams.clear();
        if (op->n_head == 0) {
            continue; // not in the graph
        }
        const auto rows = [](const ggml_tensor * t, int64_t seq_id, int64_t n_embd) {
            return lminf_rows{ t->type, (const char *) t->data + seq_id*t->nb[2], t->nb[1], ggml_row_size(t->type, n_embd) };
        };
        for (size_t s = 0; s < parts.size(); ++s) {
            lminf_attention_stream stream = {};
            stream.k      = rows(layer.k, parts[s].seq_id, layer.n_embd_k);
            stream.v      = rows(layer.v, parts[s].seq_id, layer.n_embd_v);
            stream.far_k  = stream.k;
            stream.runs   = runs[s].data();
            stream.n_runs = (int64_t) runs[s].size();
            if (const ggml_tensor * t = policy.kept_order ? nullptr : originals[op->ikv]) {
                stream.far_k = rows(t, 0, layer.n_embd_k);
                stream.far_k.data += parts[s].seq_id*policy.n_sink*t->nb[1];
            }
            op->streams.push_back(stream);
        }
        const auto & view = op->parts && !near.empty() ? *this->near : *all;
        const auto   job  = job_of(*op, view);
        size = std::max(size, view.plans.at({ job.n_head, job.n_head_kv }).work_size(job));
    }
    make_room(size);
}

void lminf_attention_op::make_room(size_t size) const {
    if (size <= work_size) {
        return;
    }
    work_size = size;
    work      = std::make_unique<char[]>(size + N_ALIGN);
    lminf_attention_work_init((char *) GGML_PAD((uintptr_t) work.get(), N_ALIGN));
}

//
// the operation
//

// as ggml_soft_max_ext() has them
static std::vector<float> alibi_slopes(float max_bias, int64_t n_head) {
    std::vector<float> res;
    const auto n_first = (int64_t) std::exp2(std::floor(std::log2((float) n_head)));
    for (int64_t h = 0; max_bias > 0.0f && h < n_head; ++h) {
        const float exponent = h < n_first ? -max_bias*(float) (h + 1) : -max_bias/2.0f*(float) (2*(h - n_first) + 1);
        res.push_back(std::exp2(exponent/(float) n_first));
    }
    return res;
}

ggml_tensor * lminf_attention_op::rotate_far(ggml_context * ctx, size_t ikv, ggml_tensor * q) const {
    auto & rope = q_ropes[ikv];
    if (rope.state == lminf_rope::UNKNOWN) {
        rope = lminf_rope::find_query(q);
    }
    if (rope.state == lminf_rope::UNSUPPORTED) {
        throw std::runtime_error("queries of this model are changed again after RoPE: set LMINF_ATTENTION=stock");
    }
    ggml_tensor * hadamard = layers.all[ikv].hadamard();
    if (hadamard) {
        q = llama_mul_mat_hadamard(ctx, q, hadamard);
    }
    q = rope.shift(ctx, q, q_shift);
    return hadamard && policy.kept_order ? llama_mul_mat_hadamard(ctx, q, hadamard) : q; // the originals are not rotated
}

ggml_tensor * lminf_attention_op::build(ggml_context * ctx, size_t ikv, const inputs & in, bool parts) const {
    const auto & layer = layers.all[ikv];

    ggml_tensor * q = in.q->nb[0] == sizeof(float) ? in.q : ggml_cont(ctx, in.q);

    auto & op = *ops[ikv];
    op.self   = this;
    op.ikv    = ikv;
    op.parts  = parts;
    op.scale  = in.scale;
    op.n_head = (int) q->ne[1];
    op.slopes = alibi_slopes(policy.alibi ? model.hparams.f_max_alibi_bias : 0.0f, op.n_head);

    std::vector<ggml_tensor *> sources = { q, in.k, in.v };
    const auto add = [&](int i, ggml_tensor * t) {
        op.src[i] = t ? (int) sources.size() : -1;
        if (t) {
            sources.push_back(t);
        }
    };
    add(SRC_Q_FAR, is_far ? rotate_far(ctx, ikv, in.q) : nullptr);
    add(SRC_ORIGINALS, is_far ? originals[ikv] : nullptr);
    add(SRC_SINK_LOGITS, in.sink_logits);

    const std::pair<int64_t, int64_t> shape = { q->ne[1], layer.n_head_kv };
    all ->plans[shape];
    near->plans[shape];

    const int64_t n_row = parts ? layer.n_embd_v + 2 : layer.n_embd_v*q->ne[1];
    return ggml_custom_4d(ctx, GGML_TYPE_F32, n_row, parts ? q->ne[1] : q->ne[2], parts ? q->ne[2] : 1, 1,
            sources.data(), (int) sources.size(), compute, GGML_N_TASKS_MAX, &op);
}

lminf_attention_job lminf_attention_op::job_of(const layer_op & op, const view & view) const {
    const auto & layer   = layers.all[op.ikv];
    const auto & hparams = model.hparams;

    lminf_attention_job job = {};
    job.n_embd_k  = layer.n_embd_k;
    job.n_embd_v  = layer.n_embd_v;
    job.n_head    = op.n_head;
    job.n_head_kv = layer.n_head_kv;
    job.n_tokens  = (int64_t) view.queries.size();
    job.scale     = op.scale;
    job.softcap   = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;
    job.slopes    = op.slopes.empty() ? nullptr : op.slopes.data();
    job.n_clamp   = policy.n_clamp;
    job.queries   = view.queries.data();
    job.streams   = op.streams.data();
    job.parts     = op.parts;
    return job;
}

void lminf_attention_op::compute(ggml_tensor * dst, int ith, int nth, void * data) {
    const auto & op   = *(const layer_op *) data;
    const auto & self = *op.self;
    const auto & view = op.parts && !self.near->queries.empty() ? *self.near : *self.all;

    const auto vectors = [](const ggml_tensor * t) {
        return t ? lminf_attention_vectors{ (const float *) t->data, t->nb[1], t->nb[2] } : lminf_attention_vectors{ nullptr, 0, 0 };
    };
    const ggml_tensor * sink_logits = op.source(dst, SRC_SINK_LOGITS);

    lminf_attention_job job = self.job_of(op, view);
    job.q           = vectors(op.source(dst, SRC_Q));
    job.q_far       = vectors(op.source(dst, SRC_Q_FAR));
    job.sink_logits = sink_logits ? (const float *) sink_logits->data : nullptr;
    job.dst         = (float *) dst->data;

    lminf_attention_compute(job, view.plans.at({ job.n_head, job.n_head_kv }), ith, nth, (char *) GGML_PAD((uintptr_t) self.work.get(), N_ALIGN));
}
