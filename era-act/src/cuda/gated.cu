// The gated forms, over vectors of 16 bytes (`wide`: the width is a multiple of them) or single elements.

#include "gated.cuh"

#define KERNELS(K, NAME, T, WIDTH, V)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        gated_forward_##NAME##_##T##_##WIDTH(const T *packed, T *y, Params p) {                                        \
        gated_forward<K, T, V>(packed, y, p);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) gated_backward_##NAME##_##T##_##WIDTH(                           \
        const T *packed, const T *dy, T *dpacked, T *inner, Params p) {                                                \
        Sums none = {0, 0};                                                                                                     \
        gated_backward<K, T, V, false>(packed, dy, dpacked, inner, none, p);                                           \
    }
#define ALL(T, WIDTH, V)                                                                                               \
    KERNELS(GATE_ENTROPY, gate_entropy, T, WIDTH, V)                                                                   \
    KERNELS(GELU_SOFTPLUS, gelu_softplus, T, WIDTH, V)                                                                 \
    KERNELS(SILU, silu, T, WIDTH, V)                                                                                   \
    KERNELS(GELU_TANH, gelu_tanh, T, WIDTH, V)                                                                         \
    KERNELS(GELU, gelu, T, WIDTH, V)                                                                                   \
    KERNELS(RELU, relu, T, WIDTH, V)                                                                                   \
    KERNELS(RELU_SQUARED, relu_squared, T, WIDTH, V)

ALL(f32, wide, WIDE<f32>)
ALL(f32, single, 1)
ALL(bf16, wide, WIDE<bf16>)
ALL(bf16, single, 1)
ALL(f16, wide, WIDE<f16>)
ALL(f16, single, 1)
