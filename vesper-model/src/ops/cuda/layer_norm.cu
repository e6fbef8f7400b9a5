// LayerNorm: one warp a row.
//
//     n = (x - mean(x)) r     r = 1 / sqrt(mean((x - mean(x))^2) + eps)     y = n w + b
//     g = w dy     dx = r (g - mean(g) - n mean(g n))     dw = sum over rows of n dy     db = sum over rows of dy
//
// The gradients of w and b are summed by each warp over its rows, then over the warps in order: no atomics, so the same
// bits each time. A row is read three times, from the cache after the first.

#include "norms.cuh"

struct LayerNormParams {
    uint64_t rows;
    uint32_t d;
    float eps;
};
static_assert(sizeof(LayerNormParams) == 16, "the Rust side has the same layout");

template <typename T, int V>
__device__ void forward(const T *x, const T *w, const T *b, T *y, LayerNormParams p) {
    const int lane = threadIdx.x % 32;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    x += row * p.d;
    layer_norm_row<T, V>(x, w, b, y + row * p.d, p.d, p.eps, lane);
}

// partial: (2, warps, d), the sums for w and then those for b, or null where neither needs a gradient.
template <typename T, int V>
__device__ void backward(const T *x, const T *w, const T *dy, T *dx, float *partial, LayerNormParams p) {
    const int lane = threadIdx.x % 32;
    const size_t warps = (size_t)gridDim.x * (blockDim.x / 32);
    const size_t warp = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    float *const dw = partial ? partial + warp * p.d : nullptr;
    float *const db = partial ? partial + (warps + warp) * p.d : nullptr;
    if (partial)
        for (uint32_t i = lane * V; i < p.d; i += 32 * V)
#pragma unroll
            for (int k = 0; k < V; k++) dw[i + k] = db[i + k] = 0;
    for (size_t row = warp; row < p.rows; row += warps) {
        const T *const xr = x + row * p.d, *const dyr = dy + row * p.d;
        const Statistics s = statistics<T, V>(xr, p.d, p.eps, lane);
        float g = 0, gn = 0;
        for (uint32_t i = lane * V; i < p.d; i += 32 * V) {
            const Vec<T, V> a = load<T, V>(xr + i), b = load<T, V>(w + i), c = load<T, V>(dyr + i);
#pragma unroll
            for (int k = 0; k < V; k++) {
                const float gv = to_float(b.v[k]) * to_float(c.v[k]);
                g += gv;
                gn += gv * (to_float(a.v[k]) - s.mean);
            }
        }
        g = warp_sum(g) / p.d;
        gn = warp_sum(gn) * s.r / p.d;
        for (uint32_t i = lane * V; i < p.d; i += 32 * V) {
            const Vec<T, V> a = load<T, V>(xr + i), b = load<T, V>(w + i), c = load<T, V>(dyr + i);
            Vec<T, V> out;
#pragma unroll
            for (int k = 0; k < V; k++) {
                const float n = (to_float(a.v[k]) - s.mean) * s.r, dyv = to_float(c.v[k]);
                out.v[k] = from_float<T>(s.r * (to_float(b.v[k]) * dyv - g - n * gn));
                if (partial) {
                    dw[i + k] += n * dyv; // the same lane alone, in each row
                    db[i + k] += dyv;
                }
            }
            store<T, V>(dx + row * p.d + i, out);
        }
    }
}

// out[c] = sum over n of partial[n][c], in a fixed order. One block of (32, 32) threads for 32 columns.
template <typename T> __device__ void reduce(const float *partial, T *out, uint32_t n, uint32_t d) {
    __shared__ float sums[32][33];
    const uint32_t c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0;
    if (c < d)
        for (uint32_t i = threadIdx.y; i < n; i += 32) sum += partial[(size_t)i * d + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < d) {
        float total = 0;
        for (int i = 0; i < 32; i++) total += sums[i][threadIdx.x];
        out[c] = from_float<T>(total);
    }
}

#define BOTH(T, NAME, V)                                                                                               \
    extern "C" __global__ void layer_norm_forward_##T##_##NAME(const T *x, const T *w, const T *b, T *y,               \
                                                               LayerNormParams p) {                                    \
        forward<T, V>(x, w, b, y, p);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void layer_norm_backward_##T##_##NAME(const T *x, const T *w, const T *dy, T *dx,            \
                                                                float *partial, LayerNormParams p) {                   \
        backward<T, V>(x, w, dy, dx, partial, p);                                                                      \
    }
#define ALL(T)                                                                                                         \
    BOTH(T, wide, WIDE<T>)                                                                                             \
    BOTH(T, single, 1)                                                                                                 \
    extern "C" __global__ void layer_norm_reduce_##T(const float *partial, T *out, uint32_t n, uint32_t d) {           \
        reduce<T>(partial, out, n, d);                                                                                 \
    }

ALL(f32)
ALL(bf16)
ALL(f16)
