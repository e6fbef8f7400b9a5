// The other products of a block.
#pragma once

#include "decode_activation.cuh"
#include "decode_vectors.cuh"

// Puts a number into the cache, in the cache's type.
__device__ __forceinline__ void write_cached(void *cache, size_t at, float x, const DecodeParams &p) {
    switch (p.numbers) {
        case 0: static_cast<float *>(cache)[at] = x; break;
        case 1: static_cast<bf16 *>(cache)[at] = from_float<bf16>(x); break;
        default: static_cast<f16 *>(cache)[at] = from_float<f16>(x);
    }
}

// The rows of W from `from` on, `pairs` times two: whole heads. cache: (2, rows, kv, capacity, dim), keys and values.
// q: (rows, query, dim). A warp takes the two elements of a head that are rotated together.
template <typename F, int B>
__device__ __forceinline__ void qkv(const float *h, const float *norm, const uint8_t *weight, uint32_t from,
                                    uint32_t pairs, const float *cos, const float *sin, const uint32_t *position,
                                    float *q, void *cache, DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    __shared__ float scratch[B * WARPS];
    constexpr int V = F::V;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t half = p.dim / 2, own_pair = blockIdx.x * WARPS + warp, stride = padded<V>(p.d);
    const size_t bytes = F::bytes(p.d);
    const auto low = [&](uint32_t pair) { return weight + (pair / half * p.dim + pair % half) * bytes; };
    let_next_begin();
    if (own_pair < pairs) {
        ask_for(low(own_pair), bytes);
        ask_for(low(own_pair) + half * bytes, bytes);
    }
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        if (first > 0) __syncthreads();  // the vectors before are still read
        stage_normed<V, B>(xs, h, norm, first, p, scratch);
        for (uint32_t pair = own_pair; pair < pairs; pair += gridDim.x * WARPS) {
            const uint32_t head = from / p.dim + pair / half, i = pair % half;
            const uint8_t *const rows[2] = {low(pair), low(pair) + half * bytes};
            float sums[2][B], own[2];
            dots<F, 2, B>(rows, xs, stride, p.d, sums);
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
                const size_t to =
                    ((((size_t)values * p.rows + row) * p.kv + own_head) * p.capacity + at) * p.dim + i;
                write_cached(cache, to, x, p);
                write_cached(cache, to + half, y, p);
            }
        }
    }
}

// inner: (rows, ffn)
template <typename F, int B>
__device__ __forceinline__ void gate_up(const float *h, const float *norm, const uint8_t *weight, float *inner,
                                        DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    __shared__ float scratch[B * WARPS];
    constexpr int V = F::V;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, stride = padded<V>(p.d);
    const uint32_t own_row = blockIdx.x * WARPS + warp;
    const size_t bytes = F::bytes(p.d);
    let_next_begin();
    if (own_row < p.ffn) {
        ask_for(weight + own_row * bytes, bytes);
        ask_for(weight + (p.ffn + own_row) * bytes, bytes);
    }
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        if (first > 0) __syncthreads();
        stage_normed<V, B>(xs, h, norm, first, p, scratch);
        for (uint32_t i = own_row; i < p.ffn; i += gridDim.x * WARPS) {
            const uint8_t *const rows[2] = {weight + i * bytes, weight + (p.ffn + i) * bytes};
            float sums[2][B], own[2];
            dots<F, 2, B>(rows, xs, stride, p.d, sums);
            mine<2, B>(sums, own);
            if (lane < B && first + lane < p.rows)
                inner[(size_t)(first + lane) * p.ffn + i] = activate(own[0], p) * own[1];
        }
    }
}

// h += W inner
template <typename F, int B>
__device__ __forceinline__ void down(const float *inner, const uint8_t *weight, float *h, DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, stride = padded<F::V>(p.ffn);
    const uint32_t warps = blockDim.x / 32, own_row = blockIdx.x * warps + warp;
    const size_t bytes = F::bytes(p.ffn);
    let_next_begin();
    if (own_row < p.d) ask_for(weight + own_row * bytes, bytes);
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        if (first > 0) __syncthreads();
        stage<F::V, B>(xs, inner, p.ffn, first, p);
        for (uint32_t i = own_row; i < p.d; i += gridDim.x * warps) {
            const uint8_t *const rows[1] = {weight + i * bytes};
            float sums[1][B], own[1];
            dots<F, 1, B>(rows, xs, stride, p.ffn, sums);
            mine<1, B>(sums, own);
            if (lane < B && first + lane < p.rows) h[(size_t)(first + lane) * p.d + i] += own[0];
        }
    }
}
