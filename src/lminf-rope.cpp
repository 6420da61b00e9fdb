#include "lminf-rope.h"

#include <cmath>
#include <cstring>

// as laid out by ggml_rope_impl()
static lminf_rope::status read_params(const ggml_tensor * rope, int * ints, float * floats) {
    memcpy(ints,   rope->op_params + 1, 4*sizeof(int));   // n_dims, mode, (unused), n_ctx_orig
    memcpy(floats, rope->op_params + 5, 6*sizeof(float)); // freq_base, freq_scale, ext_factor, attn_factor, beta_*

    const int  mode      = ints[1];
    const bool is_weight = !rope->src[2] || rope->src[2]->op == GGML_OP_NONE;
    const bool is_head   = rope->op_params[15] == 0; // ggml_rope_set_offset() was not used

    return (mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX) && is_weight && is_head
                   ? lminf_rope::ROTATED
                   : lminf_rope::UNSUPPORTED;
}

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
            return true;
        default:
            return false;
    }
}

lminf_rope lminf_rope::find(const ggml_tensor * k_cur) {
    lminf_rope res;

    const ggml_tensor * t = k_cur;
    while (t && (moves_data_only(t) || is_hadamard(t))) {
        t = is_hadamard(t) ? t->src[1] : t->src[0];
    }

    if (t && t->op == GGML_OP_ROPE) {
        int   ints[4];
        float floats[6];
        res.state       = read_params(t, ints, floats);
        res.n_dims      = ints[0];
        res.mode        = ints[1];
        res.n_ctx_orig  = ints[3];
        res.freq_base   = floats[0];
        res.freq_scale  = floats[1];
        res.ext_factor  = floats[2];
        res.attn_factor = floats[3];
        res.beta_fast   = floats[4];
        res.beta_slow   = floats[5];
        res.factors     = t->src[2];
        return res;
    }

    // no RoPE at the end: either the layer has none down to its projection, or something stands between
    for (; t; t = t->src[0]) {
        switch (t->op) {
            case GGML_OP_MUL_MAT:
                res.state = PLAIN;
                return res;
            case GGML_OP_RESHAPE:
            case GGML_OP_VIEW:
            case GGML_OP_PERMUTE:
            case GGML_OP_TRANSPOSE:
            case GGML_OP_CONT:
            case GGML_OP_NORM:
            case GGML_OP_RMS_NORM:
            case GGML_OP_L2_NORM:
            case GGML_OP_MUL:
            case GGML_OP_ADD:
            case GGML_OP_SCALE:
            case GGML_OP_CLAMP:
                break;
            default:
                res.state = UNSUPPORTED;
                return res;
        }
    }

    res.state = UNSUPPORTED;
    return res;
}

float lminf_rope::yarn_magnitude() const {
    return ext_factor != 0.0f ? 1.0f + 0.1f*logf(1.0f/freq_scale) : 1.0f;
}

ggml_tensor * lminf_rope::unrotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * neg_pos) const {
    const float m = yarn_magnitude();
    return apply(ctx, cur, neg_pos, 1.0f/(attn_factor*m*m));
}

ggml_tensor * lminf_rope::rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos) const {
    return apply(ctx, cur, pos, attn_factor);
}

ggml_tensor * lminf_rope::shift(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * delta) const {
    return apply(ctx, cur, delta, 1.0f/yarn_magnitude());
}

ggml_tensor * lminf_rope::apply(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * pos, float attn_factor) const {
    if (state != ROTATED) {
        return cur;
    }
    return ggml_rope_ext(ctx, cur, pos, factors, n_dims, mode, n_ctx_orig, freq_base, freq_scale,
            ext_factor, attn_factor, beta_fast, beta_slow);
}
