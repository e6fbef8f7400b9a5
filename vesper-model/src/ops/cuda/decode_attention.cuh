// Attention of one token over the cache: parts of the positions, and the output layer that puts them together.
#pragma once

#include "decode_vectors.cuh"

// A part of the positions of a key and value head, for all of its query heads: thread blocks (splits, kv, rows).
// part: (rows, query, splits, dim), not yet divided by its sum; weight: (rows, query, splits), the largest score and
// the sum of exponentials, the latter 0 of a part without positions, which writes nothing else.
template <typename T, int V>
__device__ __forceinline__ void attention(const float *q, const T *cache, const uint32_t *position, float *part,
                                          float2 *weight, DecodeParams p) {
    extern __shared__ __align__(16) float queries[];  // (QUERIES, dim)
    __shared__ float weights[QUERIES][POSITIONS];
    __shared__ float sums[POSITIONS * V];
    __shared__ float scratch[32];
    const uint32_t split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, thread = threadIdx.x;
    let_next_begin();
    wait_for_previous();
    // A row that rests stands behind the end: one position, for nobody to read.
    const uint32_t at = position[row], length = at < p.capacity ? at + 1 : 1, each = (length + p.splits - 1) / p.splits;
    const uint32_t start = min(split * each, length), end = min(start + each, length);
    const uint32_t group = p.query / p.kv, vectors = p.dim / V;
    const uint32_t lots = POSITIONS / vectors, lot = thread / vectors, column = (thread % vectors) * V;
    const size_t plane = (size_t)p.capacity * p.dim;
    const T *keys = cache + ((size_t)row * p.kv + head) * plane;
    const T *values = cache + (((size_t)p.rows + row) * p.kv + head) * plane;
    const float scale = 1.0f / sqrtf((float)p.dim);
    for (uint32_t taken = 0; taken < group; taken += QUERIES) {
        const uint32_t count = min(QUERIES, group - taken);
        const size_t first = (size_t)row * p.query + head * group + taken;  // query head of the whole
        __syncthreads();  // the queries before are still read
        for (uint32_t i = thread; i < QUERIES * p.dim; i += POSITIONS)
            queries[i] = i < count * p.dim ? q[first * p.dim + i] * scale : 0.0f;
        __syncthreads();
        float top[QUERIES], sum[QUERIES], out[QUERIES][V];
#pragma unroll
        for (int g = 0; g < QUERIES; g++) {
            top[g] = -INFINITY;
            sum[g] = 0.0f;
#pragma unroll
            for (int j = 0; j < V; j++) out[g][j] = 0.0f;
        }
        for (uint32_t tile = start; tile < end; tile += POSITIONS) {
            const uint32_t here = min(POSITIONS, end - tile);
            float score[QUERIES] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (thread < here) {
                const T *key = keys + (size_t)(tile + thread) * p.dim;
#pragma unroll 8
                for (uint32_t v = 0; v < vectors; v++) {
                    const Vec<T, V> k = load<T, V>(key + v * V);
#pragma unroll
                    for (int j = 0; j < V; j++)
#pragma unroll
                        for (int g = 0; g < QUERIES; g++)
                            score[g] = __fmaf_rn(to_float(k.v[j]), queries[g * p.dim + v * V + j], score[g]);
                }
            }
#pragma unroll
            for (int g = 0; g < QUERIES; g++) {
                if (g >= count) break;
                const float most = fmaxf(top[g], block_max(thread < here ? score[g] : -INFINITY, scratch));
                const float share = thread < here ? expf(score[g] - most) : 0.0f;
                const float before = expf(top[g] - most);
                weights[g][thread] = share;
                sum[g] = sum[g] * before + block_sum(share, scratch);
                top[g] = most;
#pragma unroll
                for (int j = 0; j < V; j++) out[g][j] *= before;
            }
            __syncthreads();
            if (lot < lots) {
#pragma unroll 4
                for (uint32_t i = lot; i < here; i += lots) {
                    const Vec<T, V> value = load<T, V>(values + (size_t)(tile + i) * p.dim + column);
#pragma unroll
                    for (int g = 0; g < QUERIES; g++) {
                        if (g >= count) break;
                        const float share = weights[g][i];
#pragma unroll
                        for (int j = 0; j < V; j++) out[g][j] = __fmaf_rn(share, to_float(value.v[j]), out[g][j]);
                    }
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int g = 0; g < QUERIES; g++) {
            if (g >= count) break;
            const size_t to = (first + g) * p.splits + split;
            if (thread == 0) weight[to] = make_float2(top[g], sum[g]);
            if (start >= end) continue;  // the same for all threads
#pragma unroll
            for (int j = 0; j < V; j++) sums[thread * V + j] = out[g][j];
            __syncthreads();
            for (uint32_t i = thread; i < p.dim; i += POSITIONS) {
                float all = 0.0f;
                for (uint32_t l = 0; l < lots; l++) all += sums[l * p.dim + i];
                part[to * p.dim + i] = all;
            }
            __syncthreads();
        }
    }
}

// h += W attention, where the parts of the attention are put together first.
template <typename F, int B>
__device__ __forceinline__ void output(const float *part, const float2 *weight, const uint8_t *w, float *h,
                                       DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    constexpr int V = F::V;
    const uint32_t width = p.query * p.dim, stride = padded<V>(width), own_row = blockIdx.x * warps + warp;
    float *const factors = xs + B * stride;  // (B, query, splits)
    constexpr int S = TOGETHER<V>;
    const size_t bytes = F::bytes(width);
    let_next_begin();
    if (own_row < p.d) ask_for(w + own_row * bytes, bytes);
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        if (first > 0) __syncthreads();  // the vectors before are still read
        const auto row = [&](uint32_t b) { return min(first + b, p.rows - 1); };
        // A lane a part (at most 32): its share of the head's sum of exponentials, 0 where it has no positions.
        for (uint32_t i = warp; i < B * p.query; i += warps) {
            const bool is = lane < p.splits;
            const size_t from = ((size_t)row(i / p.query) * p.query + i % p.query) * p.splits + lane;
            const float2 own = is ? weight[from] : make_float2(-INFINITY, 0.0f);
            float top = own.y > 0.0f ? own.x : -INFINITY;
            for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
            const float factor = own.y > 0.0f ? expf(own.x - top) : 0.0f;
            const float sum = warp_sum(factor * own.y);
            if (is) factors[i * p.splits + lane] = own.y == 0.0f ? 0.0f : factor / sum;
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x * S; i < width; i += blockDim.x * S) {
            const uint32_t head = i / p.dim;
            Vec<float, S> all[B];
#pragma unroll
            for (int b = 0; b < B; b++)
#pragma unroll
                for (int j = 0; j < S; j++) all[b].v[j] = 0.0f;
#pragma unroll(B == 1 ? 4 : 1)
            for (uint32_t s = 0; s < p.splits; s++) {
#pragma unroll
                for (int b = 0; b < B; b++) {
                    const float own = factors[(b * p.query + head) * p.splits + s];
                    if (own == 0.0f) continue;  // nothing was written there
                    const size_t from = ((size_t)row(b) * p.query + head) * p.splits + s;
                    const Vec<float, S> x = load<float, S>(part + from * p.dim + i % p.dim);
#pragma unroll
                    for (int j = 0; j < S; j++) all[b].v[j] = __fmaf_rn(own, x.v[j], all[b].v[j]);
                }
            }
#pragma unroll
            for (int b = 0; b < B; b++) store<float, S>(xs + b * stride + slot<V>(i), all[b]);
        }
        __syncthreads();
        for (uint32_t i = own_row; i < p.d; i += gridDim.x * warps) {
            const uint8_t *const rows[1] = {w + i * bytes};
            float sums[1][B], own[1];
            dots<F, 1, B>(rows, xs, stride, width, sums);
            mine<1, B>(sums, own);
            if (lane < B && first + lane < p.rows) h[(size_t)(first + lane) * p.d + i] += own[0];
        }
    }
}
