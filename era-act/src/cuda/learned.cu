// The forms of ERA with their parameters in device memory: temperature and strength, or gamma. The backward kernels add
// up the parameters' gradients as they go, a pair of f64 a block, which `learned_sums` adds up in their order: the same
// bits in every run.

#include "gated.cuh"

template <Kind K> __device__ __forceinline__ Params with(const float *learned, Params p) {
    if (K == GATE_ENTROPY) {
        const float temperature = learned[0];
        p.a = 1.0f / temperature;
        p.a_low = __fmaf_rn(-p.a, temperature, 1.0f) * p.a;
        p.b = learned[1];
    } else {
        p.a = learned[0];
    }
    return p;
}

// The sum over the threads of a block, in an order that is fixed; in the first thread.
__device__ Sums block_sums(Sums s) {
    __shared__ Sums warps[32];
    const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    // Threads past the end of the last warp do not exist, so their values must not be asked for.
    const uint32_t lanes = min(32u, threads - thread / 32 * 32);
    for (uint32_t offset = 16; offset > 0; offset /= 2) {
        const uint32_t mask = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        const double a = __shfl_down_sync(mask, s.a, offset), b = __shfl_down_sync(mask, s.b, offset);
        if (thread % 32 + offset < lanes) {
            s.a += a;
            s.b += b;
        }
    }
    if (thread % 32 == 0) warps[thread / 32] = s;
    __syncthreads();
    if (thread == 0)
        for (uint32_t w = 1; w < (threads + 31) / 32; w++) {
            s.a += warps[w].a;
            s.b += warps[w].b;
        }
    return s;
}

template <Kind K, typename T>
__device__ __forceinline__ void learned_backward(const T *x, const T *dy, const float *learned, T *dx, Sums *partial,
                                                 Params p) {
    p = with<K>(learned, p);
    Sums sums = {0, 0};
    const uint64_t blocks = (p.n + blockDim.x * UNROLL * WIDE<T> - 1) / (blockDim.x * UNROLL * WIDE<T>);
    for (uint64_t block = blockIdx.x; block < blocks; block += gridDim.x)
        backward<K, T, true>(x, dy, dx, sums, p, block);
    sums = block_sums(sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

template <Kind K, typename T, int V>
__device__ __forceinline__ void learned_gated_backward(const T *packed, const T *dy, const float *learned, T *dpacked,
                                                       Sums *partial, Params p) {
    p = with<K>(learned, p);
    Sums sums = {0, 0};
    gated_backward<K, T, V, true>(packed, dy, dpacked, (T *)nullptr, sums, p);
    sums = block_sums(sums);
    if (threadIdx.x == 0 && threadIdx.y == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sums;
}

// One block: n pairs to the two gradients.
extern "C" __global__ void __launch_bounds__(256) learned_sums(const Sums *partial, float *out, uint32_t n) {
    Sums sums = {0, 0};
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
        sums.a += partial[i].a;
        sums.b += partial[i].b;
    }
    sums = block_sums(sums);
    if (threadIdx.x == 0) {
        out[0] = (float)sums.a;
        out[1] = (float)sums.b;
    }
}

#define GATED(K, NAME, T, WIDTH, V)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        learned_gated_forward_##NAME##_##T##_##WIDTH(const T *packed, const float *learned, T *y, Params p) {          \
        gated_forward<K, T, V>(packed, y, with<K>(learned, p));                                                        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) learned_gated_backward_##NAME##_##T##_##WIDTH(                   \
        const T *packed, const T *dy, const float *learned, T *dpacked, Sums *partial, Params p) {                     \
        learned_gated_backward<K, T, V>(packed, dy, learned, dpacked, partial, p);                                     \
    }
#define KERNELS(K, NAME, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        learned_forward_##NAME##_##T(const T *x, const float *learned, T *y, Params p) {                               \
        forward<K, T>(x, y, with<K>(learned, p));                                                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) learned_backward_##NAME##_##T(                                   \
        const T *x, const T *dy, const float *learned, T *dx, Sums *partial, Params p) {                               \
        learned_backward<K, T>(x, dy, learned, dx, partial, p);                                                        \
    }                                                                                                                  \
    GATED(K, NAME, T, wide, WIDE<T>)                                                                                   \
    GATED(K, NAME, T, single, 1)
#define ALL(T)                                                                                                         \
    KERNELS(GATE_ENTROPY, gate_entropy, T)                                                                             \
    KERNELS(GELU_SOFTPLUS, gelu_softplus, T)

ALL(f32)
ALL(bf16)
ALL(f16)
