// A row of RMSNorm or LayerNorm by one warp. With J > 0 the row stays in registers, J vectors of V elements a lane; with
// J = 0 it may be of any length, and is read again, from the cache, for each pass over it.
#pragma once

#include "common.cuh"

struct NormParams {
    uint64_t rows;
    uint32_t d;
    float eps;
};
static_assert(sizeof(NormParams) == 16, "the Rust side has the same layout");

// The mean is a sum of two numbers, to be subtracted one after the other: one alone is rounded to the size of the values,
// which may be much more than the distances between them. So the first is one of the values, and the other the mean of
// the distances to it.
struct Statistics {
    float first, rest, r;

    __device__ __forceinline__ float centred(float x) const { return x - first - rest; }
};

// Lane l has the vectors l, l + 32, ...
template <typename T, int V, int J> struct Row {
    Vec<T, V> v[J > 0 ? J : 1];

    // f(j, i): the lane's vector j, which begins at element i of the row.
    template <typename F> static __device__ __forceinline__ void each(uint32_t d, int lane, F f) {
#pragma unroll
        for (int j = 0; j < J; j++) {
            const uint32_t i = (j * 32 + lane) * V;
            if (i < d) f(j, i);
        }
    }

    __device__ __forceinline__ void read(const T *x, uint32_t d, int lane) {
        each(d, lane, [&](int j, uint32_t i) { v[j] = load<T, V>(x + i); });
    }

    __device__ __forceinline__ void write(T *x, uint32_t d, int lane) const {
        each(d, lane, [&](int j, uint32_t i) { store<T, V>(x + i, v[j]); });
    }

    // The mean, in every lane.
    __device__ __forceinline__ Statistics mean(uint32_t d, int lane) const {
        const float first = __shfl_sync(0xffffffffu, to_float(v[0].v[0]), 0);
        float rest = 0;
        each(d, lane, [&](int j, uint32_t) {
#pragma unroll
            for (int k = 0; k < V; k++) rest += to_float(v[j].v[k]) - first;
        });
        return {first, warp_sum(rest) * (1.0f / d), 0};
    }

    // The mean and 1 / sqrt(variance + eps), in every lane.
    __device__ __forceinline__ Statistics statistics(uint32_t d, float eps, int lane) const {
        Statistics s = mean(d, lane);
        float squares = 0;
        each(d, lane, [&](int j, uint32_t) {
#pragma unroll
            for (int k = 0; k < V; k++) {
                const float centred = s.centred(to_float(v[j].v[k]));
                squares += centred * centred;
            }
        });
        s.r = 1.0f / sqrtf(warp_sum(squares) / d + eps);
        return s;
    }

    // 1 / sqrt(mean square + eps), in every lane.
    __device__ __forceinline__ float scale(uint32_t d, float eps, int lane) const {
        float squares = 0;
        each(d, lane, [&](int j, uint32_t) {
#pragma unroll
            for (int k = 0; k < V; k++) squares += to_float(v[j].v[k]) * to_float(v[j].v[k]);
        });
        return 1.0f / sqrtf(warp_sum(squares) / d + eps);
    }

    __device__ __forceinline__ void layer_norm(const T *w, const T *b, T *y, uint32_t d, float eps, int lane) const {
        const Statistics s = statistics(d, eps, lane);
        each(d, lane, [&](int j, uint32_t i) {
            const Vec<T, V> c = load<T, V>(w + i), e = load<T, V>(b + i);
            Vec<T, V> out;
#pragma unroll
            for (int k = 0; k < V; k++)
                out.v[k] = from_float<T>(s.centred(to_float(v[j].v[k])) * s.r * to_float(c.v[k]) + to_float(e.v[k]));
            store<T, V>(y + i, out);
        });
    }

    __device__ __forceinline__ void rms_norm(const T *w, T *y, uint32_t d, float eps, int lane) const {
        const float r = scale(d, eps, lane);
        each(d, lane, [&](int j, uint32_t i) {
            const Vec<T, V> c = load<T, V>(w + i);
            Vec<T, V> out;
#pragma unroll
            for (int k = 0; k < V; k++) out.v[k] = from_float<T>(to_float(v[j].v[k]) * r * to_float(c.v[k]));
            store<T, V>(y + i, out);
        });
    }
};

// A row in memory.
template <typename T, int V> struct Row<T, V, 0> {
    const T *x;

    __device__ __forceinline__ Statistics statistics(uint32_t d, float eps, int lane) const {
        Statistics s = {to_float(x[0]), 0, 0};
        float rest = 0, squares = 0;
        for (uint32_t i = lane * V; i < d; i += 32 * V) {
            const Vec<T, V> a = load<T, V>(x + i);
#pragma unroll
            for (int k = 0; k < V; k++) rest += to_float(a.v[k]) - s.first;
        }
        s.rest = warp_sum(rest) / d;
        for (uint32_t i = lane * V; i < d; i += 32 * V) {
            const Vec<T, V> a = load<T, V>(x + i);
#pragma unroll
            for (int k = 0; k < V; k++) {
                const float centred = s.centred(to_float(a.v[k]));
                squares += centred * centred;
            }
        }
        s.r = 1.0f / sqrtf(warp_sum(squares) / d + eps);
        return s;
    }

    __device__ __forceinline__ void layer_norm(const T *w, const T *b, T *y, uint32_t d, float eps, int lane) const {
        const Statistics s = statistics(d, eps, lane);
        for (uint32_t i = lane * V; i < d; i += 32 * V) {
            const Vec<T, V> a = load<T, V>(x + i), c = load<T, V>(w + i), e = load<T, V>(b + i);
            Vec<T, V> out;
#pragma unroll
            for (int k = 0; k < V; k++)
                out.v[k] = from_float<T>(s.centred(to_float(a.v[k])) * s.r * to_float(c.v[k]) + to_float(e.v[k]));
            store<T, V>(y + i, out);
        }
    }

    __device__ __forceinline__ void rms_norm(const T *w, T *y, uint32_t d, float eps, int lane) const {
        float squares = 0;
        for (uint32_t i = lane * V; i < d; i += 32 * V) {
            const Vec<T, V> a = load<T, V>(x + i);
#pragma unroll
            for (int k = 0; k < V; k++) squares += to_float(a.v[k]) * to_float(a.v[k]);
        }
        const float r = 1.0f / sqrtf(warp_sum(squares) / d + eps);
        for (uint32_t i = lane * V; i < d; i += 32 * V) {
            const Vec<T, V> a = load<T, V>(x + i), c = load<T, V>(w + i);
            Vec<T, V> out;
#pragma unroll
            for (int k = 0; k < V; k++) out.v[k] = from_float<T>(to_float(a.v[k]) * r * to_float(c.v[k]));
            store<T, V>(y + i, out);
        }
    }
};

// How many blocks of the backward at least are to fit on a multiprocessor: three where the registers of a lane suffice.
template <int V, int J> constexpr int BLOCKS = V * J <= 24 ? 3 : 1;

// Sums over rows of which each lane keeps its share, as in Row: those of the block, its warps' in order, to `to`.
template <int V, int J> __device__ __forceinline__ void write_sums(const float (&sums)[J][V], float *to, uint32_t d) {
    __shared__ float whole[J * V * 32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t turn = 0; turn < blockDim.x / 32; turn++) {
        if (warp == turn)
#pragma unroll
            for (int j = 0; j < J; j++)
#pragma unroll
                for (int k = 0; k < V; k++) {
                    float &sum = whole[(j * V + k) * 32 + lane];
                    sum = turn == 0 ? sums[j][k] : sum + sums[j][k];
                }
        __syncthreads();
    }
    for (uint32_t i = threadIdx.x; i < d; i += blockDim.x) to[i] = whole[(i / (32 * V) * V + i % V) * 32 + i / V % 32];
    __syncthreads();  // before others are written there
}

// EACH(ONE, T): the kernels for rows of up to J vectors a lane, for longer ones, and for those that vectors do not fit.
#define EACH(ONE, T)                                                                                                   \
    ONE(T, wide1, WIDE<T>, 1)                                                                                          \
    ONE(T, wide2, WIDE<T>, 2)                                                                                          \
    ONE(T, wide3, WIDE<T>, 3)                                                                                          \
    ONE(T, wide4, WIDE<T>, 4)                                                                                          \
    ONE(T, wide6, WIDE<T>, 6)                                                                                          \
    ONE(T, wide8, WIDE<T>, 8)                                                                                          \
    ONE(T, wide, WIDE<T>, 0)                                                                                           \
    ONE(T, single, 1, 0)
