// y[i] = f(x[i]) and dx[i] = dy[i] f'(x[i]); pointers are multiples of 16 bytes.

#include "elementwise.cuh"

#define KERNELS(K, NAME, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) forward_##NAME##_##T(const T *x, T *y, Params p) {               \
        forward<K, T>(x, y, p);                                                                                        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        backward_##NAME##_##T(const T *x, const T *dy, T *dx, Params p) {                                              \
        Sums none = {0, 0};                                                                                                     \
        backward<K, T, false>(x, dy, dx, none, p, blockIdx.x);                                                         \
    }
#define ALL(T)                                                                                                         \
    KERNELS(GATE_ENTROPY, gate_entropy, T)                                                                             \
    KERNELS(GELU_SOFTPLUS, gelu_softplus, T)                                                                           \
    KERNELS(SILU, silu, T)                                                                                             \
    KERNELS(GELU_TANH, gelu_tanh, T)                                                                                   \
    KERNELS(GELU, gelu, T)                                                                                             \
    KERNELS(RELU, relu, T)                                                                                             \
    KERNELS(RELU_SQUARED, relu_squared, T)

ALL(f32)
ALL(bf16)
ALL(f16)
