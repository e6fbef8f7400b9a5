// The activations of the feed-forward.
#pragma once

#include "decode_step.cuh"

enum Kind { GATE_ENTROPY, GELU_SOFTPLUS, SILU, GELU_TANH, GELU, RELU, RELU_SQUARED };

constexpr float LARGEST = 3.402823466e38f;

// As era-act has it, for finite numbers and the infinities.
__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

__device__ __forceinline__ float gelu_tanh(float x) {
    const float inner = 1.5957691216057307f * x * __fmaf_rn(0.044715f, x * x, 1.0f);  // 2 sqrt(2 / pi) (..)
    return fmaxf(x, -LARGEST) * sigmoid(inner);
}

__device__ __forceinline__ float activate(float x, const DecodeParams &p) {
    switch (p.kind) {
        case GATE_ENTROPY: {
            const float z = fminf(fmaxf(x, -LARGEST), LARGEST) * p.a, size = fminf(fabsf(z), 104.0f);
            const float e = expf(-size), tail = e / (1.0f + e);
            const float gate = z < 0.0f ? tail : 1.0f / (1.0f + e);
            const float entropy = __fmaf_rn(size, tail, log1pf(e));
            return fmaxf(x, -LARGEST) * gate * __fmaf_rn(p.b, entropy, 1.0f);
        }
        case GELU_SOFTPLUS: return __fmaf_rn(p.a, softplus(x), gelu_tanh(x));
        case SILU: return fmaxf(x, -LARGEST) * sigmoid(x);
        case GELU_TANH: return gelu_tanh(x);
        case GELU: return fmaxf(x, -LARGEST) * (0.5f * erfcf(x * -0.7071067811865476f));
        case RELU: return fmaxf(x, 0.0f);
        default: {
            const float positive = fmaxf(x, 0.0f);
            return positive * positive;
        }
    }
}
