// Vectors in shared memory, and their products with rows of weights.
#pragma once

#include "decode_rows.cuh"
#include "decode_step.cuh"

// Where element i of a vector lies in shared memory. A lane reads 8 elements of half types at once, as two float4:
// those are put so that the lanes of a warp read from addresses that follow each other.
template <int V> __device__ __forceinline__ uint32_t slot(uint32_t i) {
    if (V <= 4) return i;
    const uint32_t in_chunk = i % (32 * V), lane = in_chunk / V, j = in_chunk % V;
    return i - in_chunk + (j / 4) * 128 + lane * 4 + j % 4;
}

// Elements that a vector of n takes there.
template <int V> __device__ __forceinline__ uint32_t padded(uint32_t n) {
    return V <= 4 ? n : (n + 32 * V - 1) / (32 * V) * (32 * V);
}

// The elements of one load of this lane; chunk is the start of the warp's 32 V elements.
template <int V> __device__ __forceinline__ void read(const float *xs, uint32_t chunk, float (&x)[V]) {
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (V == 8) {
        const float4 low = *reinterpret_cast<const float4 *>(xs + chunk + lane * 4);
        const float4 high = *reinterpret_cast<const float4 *>(xs + chunk + 128 + lane * 4);
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else if constexpr (V == 4) {
        const float4 all = *reinterpret_cast<const float4 *>(xs + chunk + lane * 4);
        x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
    } else {
        x[0] = xs[chunk + lane];
    }
}

// out[r][b] = w[r] . xs[b], n elements each, in every lane of the warp. F is the format of the rows.
template <typename F, int R, int B>
__device__ __forceinline__ void dots(const uint8_t *const (&w)[R], const float *xs, uint32_t stride, uint32_t n,
                                     float (&out)[R][B]) {
    constexpr int V = F::V, LOADS = V == 1 ? 4 : R >= 4 ? 2 : 8 / R;  // of each row, before the first is used
    const uint32_t lane = threadIdx.x % 32, units = n / V;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int b = 0; b < B; b++) out[r][b] = 0.0f;
    for (uint32_t first = 0; first < units; first += 32 * LOADS) {
        typename F::Unit loaded[LOADS][R];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const uint32_t at = first + 32 * i + lane;
            if (at < units) {
#pragma unroll
                for (int r = 0; r < R; r++) loaded[i][r] = F::load(w[r], at);
            }
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const uint32_t at = first + 32 * i + lane;
            if (at < units) {
                float own[R][V], scale[R], least[R];
#pragma unroll
                for (int r = 0; r < R; r++) {
                    F::values(loaded[i][r], own[r]);
                    scale[r] = F::scale(loaded[i][r]);
                    least[r] = F::least(loaded[i][r]);
                }
#pragma unroll
                for (int b = 0; b < B; b++) {
                    float x[V], all = 0.0f;
                    read<V>(xs + b * stride, (first + 32 * i) * V, x);
                    if (F::LEAST) {
#pragma unroll
                        for (int j = 0; j < V; j++) all += x[j];
                    }
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        float sum = F::SCALED ? 0.0f : out[r][b];
#pragma unroll
                        for (int j = 0; j < V; j++) sum = __fmaf_rn(own[r][j], x[j], sum);
                        out[r][b] = F::SCALED ? __fmaf_rn(scale[r], sum, out[r][b]) : sum;
                        if (F::LEAST) out[r][b] = __fmaf_rn(-least[r], all, out[r][b]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int b = 0; b < B; b++) out[r][b] = warp_sum(out[r][b]);
}

// What lane b of a warp finishes: the sums of row b.
template <int R, int B> __device__ __forceinline__ void mine(const float (&all)[R][B], float (&own)[R]) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < R; r++) {
        own[r] = all[r][0];
#pragma unroll
        for (int b = 1; b < B; b++)
            if (lane == b) own[r] = all[r][b];
    }
}

// Elements of a vector that follow each other in shared memory too, and are read at once: the step of a thread.
template <int V> constexpr int TOGETHER = V >= 4 ? 4 : 1;

// Puts vectors of n from `first` on into shared memory, all B at once. Rows that are not there are the last one again.
template <int V, int B>
__device__ __forceinline__ void stage(float *xs, const float *x, uint32_t n, uint32_t first, const DecodeParams &p) {
    constexpr int S = TOGETHER<V>;
    const uint32_t stride = padded<V>(n);
    for (uint32_t i = threadIdx.x * S; i < n; i += blockDim.x * S) {
        Vec<float, S> own[B];
#pragma unroll
        for (int b = 0; b < B; b++) own[b] = load<float, S>(x + (size_t)min(first + b, p.rows - 1) * n + i);
#pragma unroll
        for (int b = 0; b < B; b++) store<float, S>(xs + b * stride + slot<V>(i), own[b]);
    }
    __syncthreads();
}

// The same of rms_norm(h).
template <int V, int B>
__device__ __forceinline__ void stage_normed(float *xs, const float *h, const float *weight, uint32_t first,
                                             const DecodeParams &p, float *scratch) {
    constexpr int S = TOGETHER<V>;
    const uint32_t stride = padded<V>(p.d);
    float scale[B];
#pragma unroll
    for (int b = 0; b < B; b++) scale[b] = 0.0f;
    for (uint32_t i = threadIdx.x * S; i < p.d; i += blockDim.x * S) {
        Vec<float, S> own[B];
#pragma unroll
        for (int b = 0; b < B; b++) own[b] = load<float, S>(h + (size_t)min(first + b, p.rows - 1) * p.d + i);
#pragma unroll
        for (int b = 0; b < B; b++) {
            store<float, S>(xs + b * stride + slot<V>(i), own[b]);
#pragma unroll
            for (int j = 0; j < S; j++) scale[b] = __fmaf_rn(own[b].v[j], own[b].v[j], scale[b]);
        }
    }
    block_sums<B>(scale, scratch);
#pragma unroll
    for (int b = 0; b < B; b++) scale[b] = 1.0f / sqrtf(scale[b] / p.d + p.eps);
    // What a thread has put there itself.
    for (uint32_t i = threadIdx.x * S; i < p.d; i += blockDim.x * S) {
        const Vec<float, S> w = load<float, S>(weight + i);
#pragma unroll
        for (int b = 0; b < B; b++) {
            float *at = xs + b * stride + slot<V>(i);
            Vec<float, S> own = load<float, S>(at);
#pragma unroll
            for (int j = 0; j < S; j++) own.v[j] = own.v[j] * scale[b] * w.v[j];
            store<float, S>(at, own);
        }
    }
    __syncthreads();
}
