// From a token to the residual stream, and from there to the next token.
#pragma once

#include "decode_vectors.cuh"

// h[row] = table[token[row]]: one thread block a row.
template <typename F> __device__ __forceinline__ void embed(const uint8_t *table, const uint32_t *token, float *h,
                                                            DecodeParams p) {
    const uint32_t row = blockIdx.x;
    let_next_begin();
    wait_for_previous();
    const uint8_t *const from = table + min(token[row], p.vocab - 1) * F::bytes(p.d);
    for (uint32_t unit = threadIdx.x; unit < p.d / F::V; unit += blockDim.x) {
        const typename F::Unit loaded = F::load(from, unit);
        const float scale = F::scale(loaded), least = F::least(loaded);
        float own[F::V];
        F::values(loaded, own);
#pragma unroll
        for (int j = 0; j < F::V; j++)
            h[(size_t)row * p.d + unit * F::V + j] = F::SCALED ? scale * own[j] - least : own[j];
    }
}

constexpr uint32_t NOT_CHOSEN = UINT32_MAX;  // in place of a token, where the logits are none to choose from

struct Best {
    float value;
    uint32_t id;
};

// The larger one; of equal ones that of the smaller id. A NaN counts as infinity, so that none is overlooked.
__device__ __forceinline__ void keep_larger(Best &best, float value, uint32_t id) {
    value = value < INFINITY ? value : INFINITY;
    if (value > best.value || (value == best.value && id < best.id)) best = {value, id};
}

// logits: (rows, vocab); hidden: (rows, d), what they are made of; best: (rows, blocks).
template <typename F, int B>
__device__ __forceinline__ void head(const float *h, const float *norm, const uint8_t *weight, float *logits,
                                     float *hidden, Best *best, DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    __shared__ float scratch[B * WARPS];
    __shared__ Best found[WARPS][B];
    constexpr uint32_t R = 4;  // rows of the weight that a warp takes at once
    constexpr int V = F::V;
    const size_t bytes = F::bytes(p.d);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, stride = padded<V>(p.d);
    let_next_begin();
    for (uint32_t r = 0; r < R; r++) {
        const uint32_t id = (blockIdx.x * WARPS + warp) * R + r;
        if (id < p.vocab) ask_for(weight + id * bytes, bytes);
    }
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        if (first > 0) __syncthreads();
        stage_normed<V, B>(xs, h, norm, first, p, scratch);
        const uint32_t row = first + lane;
        const bool finishes = lane < B && row < p.rows;
        if (blockIdx.x == 0)
            for (uint32_t b = 0; b < B && first + b < p.rows; b++)
                for (uint32_t i = threadIdx.x; i < p.d; i += blockDim.x)
                    hidden[(size_t)(first + b) * p.d + i] = xs[b * stride + slot<V>(i)];
        Best largest = {-INFINITY, NOT_CHOSEN};
        for (uint32_t id = (blockIdx.x * WARPS + warp) * R; id < p.vocab; id += gridDim.x * WARPS * R) {
            const auto at = [&](uint32_t r) { return weight + min(id + r, p.vocab - 1) * bytes; };
            const uint8_t *const rows[R] = {at(0), at(1), at(2), at(3)};
            float sums[R][B], own[R];
            dots<F, R, B>(rows, xs, stride, p.d, sums);
            mine<R, B>(sums, own);
            if (!finishes) continue;
#pragma unroll
            for (uint32_t r = 0; r < R; r++) {
                if (id + r >= p.vocab) break;
                logits[(size_t)row * p.vocab + id + r] = own[r];
                keep_larger(largest, own[r], id + r);
            }
        }
        if (lane < B) found[warp][lane] = largest;
        __syncthreads();
        if (warp == 0 && finishes) {
            for (uint32_t w = 1; w < WARPS; w++) keep_larger(largest, found[w][lane].value, found[w][lane].id);
            best[(size_t)row * p.blocks + blockIdx.x] = largest;
        }
    }
}

// One thread block of 256 a row. log: (rows, capacity + 1), the token at each position. A row that can choose none, as
// a logit is NaN or infinity or all are minus infinity, stays where it is: further steps give the same logits.
__device__ __forceinline__ void next(const Best *best, const uint32_t *active, uint32_t *token, uint32_t *position,
                                     uint32_t *log, DecodeParams p) {
    __shared__ Best found[256];
    const uint32_t row = blockIdx.x, thread = threadIdx.x;
    let_next_begin();
    wait_for_previous();
    Best largest = {-INFINITY, NOT_CHOSEN};
    for (uint32_t i = thread; i < p.blocks; i += 256) {
        const Best other = best[(size_t)row * p.blocks + i];
        keep_larger(largest, other.value, other.id);
    }
    found[thread] = largest;
    for (uint32_t half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) keep_larger(found[thread], found[thread + half].value, found[thread + half].id);
    }
    if (thread != 0 || active[row] == 0) return;
    const uint32_t at = position[row];
    if (at >= p.capacity) return;
    const bool chosen = fabsf(found[0].value) < INFINITY;
    log[(size_t)row * (p.capacity + 1) + at + 1] = chosen ? found[0].id : NOT_CHOSEN;
    if (!chosen) return;
    token[row] = found[0].id;
    position[row] = at + 1;
}
