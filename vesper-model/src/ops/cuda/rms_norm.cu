// RMSNorm: one warp a row.
//
//     r = 1 / sqrt(mean(x^2) + eps)     y = x r w
//     dx = r (w dy - x r^2 mean(x w dy))     dw = sum over rows of x r dy
//
// The gradient of w is summed by each warp over its rows, then over the warps and blocks in order: no atomics, so the
// same bits each time.

#include "norms.cuh"

template <typename T, int V, int J>
__device__ void forward(const T *x, const T *w, T *y, NormParams p) {
    const int lane = threadIdx.x % 32;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    Row<T, V, J> a;
    if constexpr (J > 0)
        a.read(x + row * p.d, p.d, lane);
    else
        a.x = x + row * p.d;
    a.rms_norm(w, y + row * p.d, p.d, p.eps, lane);
}

// How many blocks of the backward at least are to fit on a multiprocessor: as many as the registers of a lane suffice for.
template <int V, int J> constexpr int RESIDENT = V * J <= 24 ? 4 : 1;

// With J > 0 a lane's share of dw stays in registers too; with J = 0 dw is added up in global memory, each element by one
// lane alone.
// partial: (parts, d), or null where w needs no gradient; a part is a block with J > 0, else a warp. base: what is added
// to dx, or null.
template <typename T, int V, int J>
__device__ void backward(const T *x, const T *w, const T *dy, const T *base, T *dx, float *partial, NormParams p) {
    const int lane = threadIdx.x % 32;
    const size_t warps = (size_t)gridDim.x * (blockDim.x / 32);
    const size_t warp = (size_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    constexpr int K = J > 0 ? J : 1;
    if (partial) partial += (J > 0 ? blockIdx.x : warp) * p.d;
    float dw[K][V];
#pragma unroll
    for (int j = 0; j < K; j++)
#pragma unroll
        for (int k = 0; k < V; k++) dw[j][k] = 0;
    if (J == 0 && partial) {
        for (uint32_t i = lane; i < p.d; i += 32) partial[i] = 0;
        __syncwarp();
    }
    if constexpr (J > 0) {
        const float each = 1.0f / p.d;
        for (size_t row = warp; row < p.rows; row += warps) {
            Vec<T, V> a[K], g[K];
#pragma unroll
            for (int j = 0; j < J; j++) {
                const uint32_t i = (j * 32 + lane) * V;
                if (i < p.d) {
                    a[j] = load<T, V>(x + row * p.d + i);
                    g[j] = load<T, V>(dy + row * p.d + i);
                }
            }
            // Asked for first, needed last.
            Vec<T, V> more[K];
            if (base)
#pragma unroll
                for (int j = 0; j < J; j++) {
                    const uint32_t i = (j * 32 + lane) * V;
                    if (i < p.d) more[j] = load<T, V>(base + row * p.d + i);
                }
            float squares = 0, dot = 0;
#pragma unroll
            for (int j = 0; j < J; j++) {
                const uint32_t i = (j * 32 + lane) * V;
                if (i < p.d) {
                    const Vec<T, V> b = load<T, V>(w + i);
#pragma unroll
                    for (int k = 0; k < V; k++) {
                        const float xv = to_float(a[j].v[k]);
                        squares += xv * xv;
                        dot += xv * to_float(b.v[k]) * to_float(g[j].v[k]);
                    }
                }
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                squares += __shfl_xor_sync(0xffffffffu, squares, offset);
                dot += __shfl_xor_sync(0xffffffffu, dot, offset);
            }
            const float r = rsqrtf(squares * each + p.eps);  // by one division for all rows
            dot *= each * r * r;
#pragma unroll
            for (int j = 0; j < J; j++) {
                const uint32_t i = (j * 32 + lane) * V;
                if (i < p.d) {
                    const Vec<T, V> b = load<T, V>(w + i);
                    Vec<T, V> out;
#pragma unroll
                    for (int k = 0; k < V; k++) {
                        const float xv = to_float(a[j].v[k]), gv = to_float(g[j].v[k]);
                        const float to_x = r * (to_float(b.v[k]) * gv - xv * dot);
                        out.v[k] = from_float<T>(base ? to_float(more[j].v[k]) + to_x : to_x);
                        dw[j][k] += xv * r * gv;
                    }
                    store<T, V>(dx + row * p.d + i, out);
                }
            }
        }
    } else {
        for (size_t row = warp; row < p.rows; row += warps) {
            const T *xr = x + row * p.d, *dyr = dy + row * p.d;
            float squares = 0, dot = 0;
            for (uint32_t i = lane * V; i < p.d; i += 32 * V) {
                const Vec<T, V> a = load<T, V>(xr + i), b = load<T, V>(w + i), g = load<T, V>(dyr + i);
#pragma unroll
                for (int k = 0; k < V; k++) {
                    const float xv = to_float(a.v[k]);
                    squares += xv * xv;
                    dot += xv * to_float(b.v[k]) * to_float(g.v[k]);
                }
            }
            const float r = 1.0f / sqrtf(warp_sum(squares) / p.d + p.eps);
            dot = warp_sum(dot) / p.d * r * r;
            for (uint32_t i = lane * V; i < p.d; i += 32 * V) {
                const Vec<T, V> a = load<T, V>(xr + i), b = load<T, V>(w + i), g = load<T, V>(dyr + i);
                Vec<T, V> out{};
                if (base) out = load<T, V>(base + row * p.d + i);
#pragma unroll
                for (int k = 0; k < V; k++) {
                    const float xv = to_float(a.v[k]), gv = to_float(g.v[k]);
                    const float to_x = r * (to_float(b.v[k]) * gv - xv * dot);
                    out.v[k] = from_float<T>(base ? to_float(out.v[k]) + to_x : to_x);
                    if (partial) partial[i + k] += xv * r * gv;
                }
                store<T, V>(dx + row * p.d + i, out);
            }
        }
    }
    if constexpr (J > 0)
        if (partial) write_sums(dw, partial, p.d);
}

#define FORWARD(T, NAME, V, J)                                                                                         \
    extern "C" __global__ void rms_norm_forward_##T##_##NAME(const T *x, const T *w, T *y, NormParams p) {             \
        forward<T, V, J>(x, w, y, p);                                                                                  \
    }
#define BACKWARD(T, NAME, V, J)                                                                                        \
    extern "C" __global__ void __launch_bounds__(128, RESIDENT<V, J>) rms_norm_backward_##T##_##NAME(                                  \
        const T *x, const T *w, const T *dy, const T *base, T *dx, float *partial, NormParams p) {                                    \
        backward<T, V, J>(x, w, dy, base, dx, partial, p);                                                                   \
    }
#define ONE(T, NAME, V, J)                                                                                             \
    FORWARD(T, NAME, V, J)                                                                                             \
    BACKWARD(T, NAME, V, J)

EACH(ONE, f32)
EACH(ONE, bf16)
EACH(ONE, f16)
