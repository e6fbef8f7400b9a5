// The other products of a block.
#pragma once

#include "decode_activation.cuh"
#include "decode_vectors.cuh"

// cache: (2, rows, kv, capacity, dim), keys and values. q: (rows, query, dim). A warp takes the two elements of a head that
// are rotated together.
template <typename T, int V, int B>
__device__ __forceinline__ void qkv(const float *h, const T *norm, const T *weight, const float *cos, const float *sin,
                                    const uint32_t *position, float *q, T *cache, DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    __shared__ float scratch[B * WARPS];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t half = p.dim / 2, pairs = (p.query + 2 * p.kv) * half, stride = padded<V>(p.d);
    const uint32_t own_pair = blockIdx.x * WARPS + warp;
    let_next_begin();
    if (own_pair < pairs) {
        const T *low = weight + (size_t)(own_pair / half * p.dim + own_pair % half) * p.d;
        ask_for(low, p.d);
        ask_for(low + (size_t)half * p.d, p.d);
    }
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        if (first > 0) __syncthreads();  // the vectors before are still read
        stage_normed<T, V, B>(xs, h, norm, first, p, scratch);
        for (uint32_t pair = own_pair; pair < pairs; pair += gridDim.x * WARPS) {
            const uint32_t head = pair / half, i = pair % half;
            const T *low = weight + (size_t)(head * p.dim + i) * p.d;
            const T *const rows[2] = {low, low + (size_t)half * p.d};
            float sums[2][B], own[2];
            dots<T, V, 2, B>(rows, xs, stride, p.d, sums);
            mine<2, B>(sums, own);
            const uint32_t row = first + lane;
            if (lane >= B || row >= p.rows) continue;
            const uint32_t at = position[row];
            float x = own[0], y = own[1];
            if (head < p.query + p.kv) {
                const size_t angle = (size_t)min(at, p.capacity - 1) * half + i;
                const float c = cos[angle], s = sin[angle];
                x = own[0] * c - own[1] * s;
                y = own[1] * c + own[0] * s;
            }
            if (head < p.query) {
                float *to = q + ((size_t)row * p.query + head) * p.dim + i;
                to[0] = x;
                to[half] = y;
            } else if (at < p.capacity) {  // a row that rests may be full
                const uint32_t values = head >= p.query + p.kv ? 1 : 0, own_head = head - p.query - values * p.kv;
                T *to = cache + ((((size_t)values * p.rows + row) * p.kv + own_head) * p.capacity + at) * p.dim + i;
                to[0] = from_float<T>(x);
                to[half] = from_float<T>(y);
            }
        }
    }
}

// inner: (rows, ffn)
template <typename T, int V, int B>
__device__ __forceinline__ void gate_up(const float *h, const T *norm, const T *weight, float *inner, DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    __shared__ float scratch[B * WARPS];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, stride = padded<V>(p.d);
    const uint32_t own_row = blockIdx.x * WARPS + warp;
    let_next_begin();
    if (own_row < p.ffn) {
        ask_for(weight + (size_t)own_row * p.d, p.d);
        ask_for(weight + (size_t)(p.ffn + own_row) * p.d, p.d);
    }
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        if (first > 0) __syncthreads();
        stage_normed<T, V, B>(xs, h, norm, first, p, scratch);
        for (uint32_t i = own_row; i < p.ffn; i += gridDim.x * WARPS) {
            const T *gate = weight + (size_t)i * p.d;
            const T *const rows[2] = {gate, gate + (size_t)p.ffn * p.d};
            float sums[2][B], own[2];
            dots<T, V, 2, B>(rows, xs, stride, p.d, sums);
            mine<2, B>(sums, own);
            if (lane < B && first + lane < p.rows)
                inner[(size_t)(first + lane) * p.ffn + i] = activate(own[0], p) * own[1];
        }
    }
}

// h += W inner
template <typename T, int V, int B>
__device__ __forceinline__ void down(const float *inner, const T *weight, float *h, DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, stride = padded<V>(p.ffn);
    const uint32_t warps = blockDim.x / 32, own_row = blockIdx.x * warps + warp;
    let_next_begin();
    if (own_row < p.d) ask_for(weight + (size_t)own_row * p.ffn, p.ffn);
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        if (first > 0) __syncthreads();
        stage<V, B>(xs, inner, p.ffn, first, p);
        for (uint32_t i = own_row; i < p.d; i += gridDim.x * warps) {
            const T *const rows[1] = {weight + (size_t)i * p.ffn};
            float sums[1][B], own[1];
            dots<T, V, 1, B>(rows, xs, stride, p.ffn, sums);
            mine<1, B>(sums, own);
            if (lane < B && first + lane < p.rows) h[(size_t)(first + lane) * p.d + i] += own[0];
        }
    }
}
