#include "lminf-rope.h"

#include <cmath>
#include <cstring>

static bool is_hadamard(const ggml_tensor * t) {
    // the cache's rotation is a graph input, a model's weight is not
    return t->op == GGML_OP_MUL_MAT && (t->src[0]->flags & GGML_TENSOR_FLAG_INPUT);
}

static bool moves_data_only(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_CONT:
        case GGML_OP_REPEAT:
            return true;
        default:
            return false;
    }
}

// true if t comes straight from a projection, without RoPE
static bool is_plain(const ggml_tensor * t) {
    for (; t; t = t->src[0]) {
        switch (t->op) {
            case GGML_OP_MUL_MAT:
                return true;
            case GGML_OP_NORM:
            case GGML_OP_RMS_NORM:
            case GGML_OP_L2_NORM:
            case GGML_OP_MUL:
            case GGML_OP_ADD:
            case GGML_OP_SCALE:
            case GGML_OP_CLAMP:
                break;
            default:
                if (!moves_data_only(t)) {
                    return false;
                }
        }
    }
    return false;
}

static const ggml_tensor * skip_moves(const ggml_tensor * t) {
    while (t && (moves_data_only(t) || is_hadamard(t))) {
        t = is_hadamard(t) ? t->src[1] : t->src[0];
    }
    return t;
}

lminf_rope lminf_rope::find(const ggml_tensor * k_cur) {
    lminf_rope res;
    res.state = UNSUPPORTED;

    for (const ggml_tensor * t = k_cur; t && (moves_data_only(t) || is_hadamard(t)); t = is_hadamard(t) ? t->src[1] : t->src[0]) {
        res.is_hadamard_rotated |= is_hadamard(t);
    }
    const ggml_tensor * t = skip_moves(k_cur);

    // A norm over a whole head commutes with the rotation (Llama 4); its weights do not, but can be taken off (Hunyuan).
    const ggml_tensor * norm = t;
    if (t && t->op == GGML_OP_MUL && t->src[1]->op == GGML_OP_NONE && t->src[1]->ne[0] == ggml_nelements(t->src[1])) {
        norm = skip_moves(t->src[0]);
    }
    if (norm && (norm->op == GGML_OP_RMS_NORM || norm->op == GGML_OP_L2_NORM)) {
        const ggml_tensor * rope = skip_moves(norm->src[0]);
        if (rope && rope->op == GGML_OP_ROPE && rope->ne[0] == norm->ne[0]) {
            res.norm_weight = norm == t ? nullptr : t->src[1];
            t = rope;
        }
    }

    if (t && t->op == GGML_OP_ROPE) {
        res.read(t);
    } else if (t && t->op == GGML_OP_CONCAT && t->op_params[0] == 0) {
        // a key in two parts, one of them rotated: that of latent attention
        const ggml_tensor * a = skip_moves(t->src[0]);
        const ggml_tensor * b = skip_moves(t->src[1]);
        if (a->op == GGML_OP_ROPE && is_plain(b)) {
            res.read(a);
        } else if (b->op == GGML_OP_ROPE && is_plain(a)) {
            res.read(b);
            res.n_offs += (int) t->src[0]->ne[0];
        } else if (is_plain(a) && is_plain(b)) {
            res.state = PLAIN;
        }
    } else if (is_plain(t)) {
        res.state = PLAIN;
    }

    return res;
}

lminf_rope lminf_rope::find_query(const ggml_tensor * q) {
    const ggml_tensor * t = skip_moves(q);
    while (t && (t->op == GGML_OP_SCALE || (t->op == GGML_OP_MUL && t->src[1]->ne[0] == 1))) {
        t = skip_moves(t->src[0]);
    }
    return find(t);
}

lminf_rope lminf_rope::any(int64_t n_embd_head, uint32_t n_pos_per_embd) {
    lminf_rope res;
    res.state     = ROTATED;
    res.n_dims    = (int) n_embd_head/2*2;
    res.mode      = n_pos_per_embd > 1 ? GGML_ROPE_TYPE_MROPE : GGML_ROPE_TYPE_NEOX;
    res.sections[0] = res.n_dims/2;
    res.freq_base = 10000.0f;
    return res;
}

// op_params as laid out by ggml_rope_impl()
void lminf_rope::read(const ggml_tensor * rope) {
    const int32_t * ints = rope->op_params;

    n_dims     = ints[1];
    mode       = ints[2];
    n_ctx_orig = ints[4];
    n_offs     = ints[15];
    memcpy(&freq_base,   ints +  5, sizeof(float));
    memcpy(&freq_scale,  ints +  6, sizeof(float));
    memcpy(&ext_factor,  ints +  7, sizeof(float));
    memcpy(&beta_fast,   ints +  9, sizeof(float));
    memcpy(&beta_slow,   ints + 10, sizeof(float));
    memcpy(sections,     ints + 11, sizeof(sections));
    factors = rope->src[2];

    const bool is_weight = !factors || factors->op == GGML_OP_NONE;

    state = is_weight && mode != GGML_ROPE_TYPE_VISION ? ROTATED : UNSUPPORTED;
}

float lminf_rope::yarn_magnitude() const {
    return ext_factor != 0.0f ? 1.0f + 0.1f*logf(1.0f/freq_scale) : 1.0f;
}

ggml_tensor * lminf_rope::shift(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * delta) const {
    if (state != ROTATED) {
        return cur;
    }
    if (norm_weight) {
        cur = ggml_div(ctx, cur, norm_weight);
    }
    const float magnitude = 1.0f/yarn_magnitude();
    cur = mode & GGML_ROPE_TYPE_MROPE
        ? ggml_rope_multi(ctx, cur, delta, factors, n_dims, const_cast<int *>(sections), mode, n_ctx_orig, freq_base, freq_scale,
                ext_factor, magnitude, beta_fast, beta_slow)
        : ggml_rope_ext(ctx, cur, delta, factors, n_dims, mode, n_ctx_orig, freq_base, freq_scale,
                ext_factor, magnitude, beta_fast, beta_slow);

    cur = ggml_rope_set_offset(cur, n_offs);

    return norm_weight ? ggml_mul(ctx, cur, norm_weight) : cur;
}
