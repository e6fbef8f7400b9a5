// One token of each of a few rows through a decoder, over a cache: a kernel for each part of a block, so that a graph of
// them can be replayed for every token. What changes from token to token (positions, tokens) is in device memory.
//
//     embed                       h = E[token]
//     qkv          of each block  q, cache = rope(W rms_norm(h))
//     attention                   a part of the cache's positions a thread block
//     output                      h += W attention, of the parts together
//     gate_up                     inner = act(G rms_norm(h)) * U rms_norm(h)
//     down                        h += W inner
//     head                        logits = E rms_norm(h), and each thread block's largest
//     next                        the largest of all becomes the row's token, its position goes on
//
// Products are as fast as the weights come from memory: a warp takes whole rows of them, 16 bytes a lane at a time, several
// such loads before the first is used; the vectors lie in shared memory in f32. With B = 4 the weights are read once for
// four rows. All sums are in f32 and in an order that depends on the sizes alone; nothing is added atomically.

#pragma once

#include "common.cuh"

enum Kind { GATE_ENTROPY, GELU_SOFTPLUS, SILU, GELU_TANH, GELU, RELU, RELU_SQUARED };

struct DecodeParams {
    uint32_t rows;  // sequences
    uint32_t d;     // of the residual stream
    uint32_t query, kv, dim;
    uint32_t ffn, vocab;
    uint32_t capacity;  // positions of a row in the cache
    uint32_t splits;    // thread blocks that share the positions of a head
    uint32_t blocks;    // of the head's kernel
    uint32_t kind;      // of the activation
    float a, b;         // its numbers: 1 / temperature and strength, or gamma
    float eps;          // of the norms
};
static_assert(sizeof(DecodeParams) == 56, "the Rust side has the same layout");

// From compute capability 9.0 on the kernels of a step overlap: each lets the next one begin as soon as it runs itself, which
// asks for its weights and then waits until what it reads of the kernels before has been written. (Elsewhere the next
// kernel begins when this one has ended.)
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asks for n elements to come into the L2 cache, by a whole warp.
template <typename T> __device__ __forceinline__ void ask_for(const T *from, uint32_t n) {
#if __CUDA_ARCH__ >= 900
    const char *bytes = reinterpret_cast<const char *>(from);
    for (size_t i = threadIdx.x % 32 * 128; i < n * sizeof(T); i += 32 * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + i));
#endif
}

constexpr uint32_t WARPS = 8;      // of a thread block of a product
constexpr uint32_t POSITIONS = 128;  // threads of the attention, and positions that it takes at once
constexpr uint32_t QUERIES = 4;    // query heads that it takes at once
constexpr float LARGEST = 3.402823466e38f;

// Where element i of a vector lies in shared memory. A lane reads 8 elements of half types at once, as two float4: those
// are put so that the lanes of a warp read from addresses that follow each other.
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

// out[r][b] = w[r] . xs[b], n elements each, in every lane of the warp.
template <typename T, int V, int R, int B>
__device__ __forceinline__ void dots(const T *const (&w)[R], const float *xs, uint32_t stride, uint32_t n,
                                     float (&out)[R][B]) {
    constexpr int LOADS = V == 1 ? 4 : R >= 4 ? 2 : 8 / R;  // of each row, before the first is used
    const uint32_t lane = threadIdx.x % 32, vectors = n / V;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int b = 0; b < B; b++) out[r][b] = 0.0f;
    for (uint32_t first = 0; first < vectors; first += 32 * LOADS) {
        Vec<T, V> loaded[LOADS][R];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const uint32_t at = first + 32 * i + lane;
            if (at < vectors) {
#pragma unroll
                for (int r = 0; r < R; r++) loaded[i][r] = load<T, V>(w[r] + (size_t)at * V);
            }
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const uint32_t at = first + 32 * i + lane;
            if (at < vectors) {
#pragma unroll
                for (int b = 0; b < B; b++) {
                    float x[V];
                    read<V>(xs + b * stride, (first + 32 * i) * V, x);
#pragma unroll
                    for (int r = 0; r < R; r++)
#pragma unroll
                        for (int j = 0; j < V; j++)
                            out[r][b] = __fmaf_rn(to_float(loaded[i][r].v[j]), x[j], out[r][b]);
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

// The sum over the thread block, in every thread.
__device__ __forceinline__ float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    __syncthreads();  // whoever still reads what was there
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (uint32_t i = 0; i < blockDim.x / 32; i++) sum += scratch[i];
    return sum;
}

// The maximum, likewise.
__device__ __forceinline__ float block_max(float x, float *scratch) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float most = scratch[0];
    for (uint32_t i = 1; i < blockDim.x / 32; i++) most = fmaxf(most, scratch[i]);
    return most;
}

// Puts rms_norm(h) of the rows from `first` on into shared memory. Rows that are not there are the last one again.
template <typename T, int V, int B>
__device__ __forceinline__ void stage_normed(float *xs, const float *h, const T *weight, uint32_t first,
                                             const DecodeParams &p, float *scratch) {
    const uint32_t stride = padded<V>(p.d);
    for (int b = 0; b < B; b++) {
        const float *x = h + (size_t)min(first + b, p.rows - 1) * p.d;
        float squares = 0.0f;
        for (uint32_t i = threadIdx.x; i < p.d; i += blockDim.x) squares = __fmaf_rn(x[i], x[i], squares);
        squares = block_sum(squares, scratch);
        const float scale = 1.0f / sqrtf(squares / p.d + p.eps);
        for (uint32_t i = threadIdx.x; i < p.d; i += blockDim.x)
            xs[b * stride + slot<V>(i)] = x[i] * scale * to_float(weight[i]);
    }
    __syncthreads();
}

// h[row] = table[token[row]]: one thread block a row.
template <typename T> __device__ __forceinline__ void embed(const T *table, const uint32_t *token, float *h, DecodeParams p) {
    const uint32_t row = blockIdx.x;
    let_next_begin();
    wait_for_previous();
    const T *from = table + (size_t)min(token[row], p.vocab - 1) * p.d;
    for (uint32_t i = threadIdx.x; i < p.d; i += blockDim.x) h[(size_t)row * p.d + i] = to_float(from[i]);
}

// cache: (2, rows, kv, capacity, dim), keys and values. q: (rows, query, dim). A warp takes the two elements of a head that
// are rotated together.
template <typename T, int V, int B>
__device__ __forceinline__ void qkv(const float *h, const T *norm, const T *weight, const float *cos, const float *sin,
                                    const uint32_t *position, float *q, T *cache, DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    __shared__ float scratch[32];
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

// A part of the positions of a key and value head, for all of its query heads: thread blocks (splits, kv, rows).
// part: (rows, query, splits, dim), not yet divided by its sum; weight: (rows, query, splits), the largest score and the
// sum of exponentials, the latter 0 of a part without positions, which writes nothing else.
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
template <typename T, int V, int B>
__device__ __forceinline__ void output(const float *part, const float2 *weight, const T *w, float *h, DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const uint32_t width = p.query * p.dim, stride = padded<V>(width), own_row = blockIdx.x * warps + warp;
    float *const factors = xs + B * stride;  // (query, splits)
    let_next_begin();
    if (own_row < p.d) ask_for(w + (size_t)own_row * width, width);
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        for (int b = 0; b < B; b++) {
            const uint32_t row = min(first + b, p.rows - 1);
            const size_t parts = (size_t)row * p.query * p.splits;
            __syncthreads();  // the vectors and factors before are still read
            // A lane a part (at most 32): its share of the head's sum of exponentials, 0 where it has no positions.
            for (uint32_t head = warp; head < p.query; head += warps) {
                const bool is = lane < p.splits;
                const float2 own = is ? weight[parts + head * p.splits + lane] : make_float2(-INFINITY, 0.0f);
                float top = own.y > 0.0f ? own.x : -INFINITY;
                for (int offset = 16; offset > 0; offset /= 2)
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
                const float factor = own.y > 0.0f ? expf(own.x - top) : 0.0f;
                const float sum = warp_sum(factor * own.y);
                if (is) factors[head * p.splits + lane] = own.y == 0.0f ? 0.0f : factor / sum;
            }
            __syncthreads();
            for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
                const uint32_t head = i / p.dim;
                const float *const own = factors + head * p.splits;
                const float *const from = part + (parts + head * p.splits) * p.dim + i % p.dim;
                float all = 0.0f;
#pragma unroll 4
                for (uint32_t s = 0; s < p.splits; s++)
                    if (own[s] != 0.0f) all = __fmaf_rn(own[s], from[s * p.dim], all);  // else nothing was written there
                xs[b * stride + slot<V>(i)] = all;
            }
        }
        __syncthreads();
        for (uint32_t i = own_row; i < p.d; i += gridDim.x * warps) {
            const T *const rows[1] = {w + (size_t)i * width};
            float sums[1][B], own[1];
            dots<T, V, 1, B>(rows, xs, stride, width, sums);
            mine<1, B>(sums, own);
            if (lane < B && first + lane < p.rows) h[(size_t)(first + lane) * p.d + i] += own[0];
        }
    }
}

// As era-act has it, for finite numbers and the infinities.
__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

__device__ __forceinline__ float gelu_tanh(float x) {
    const float inner = 1.5957691216057307f * x * __fmaf_rn(0.044715f, x * x, 1.0f);  // 2 sqrt(2 / pi) (..)
    return fmaxf(x, -LARGEST) * sigmoid(inner);
}

__device__ __forceinline__ float activate(float x, const DecodeParams &p) {
    switch (p.kind) {
        case GATE_ENTROPY: {
            const float z = fminf(fmaxf(x, -LARGEST), LARGEST) * p.a, size = fminf(fabsf(z), 104.0f);
            const float e = expf(-size), tail = e / (1.0f + e);
            const float gate = z < 0.0f ? tail : 1.0f / (1.0f + e);
            const float entropy = __fmaf_rn(size, tail, log1pf(e));
            return fmaxf(x, -LARGEST) * gate * __fmaf_rn(p.b, entropy, 1.0f);
        }
        case GELU_SOFTPLUS: return __fmaf_rn(p.a, softplus(x), gelu_tanh(x));
        case SILU: return fmaxf(x, -LARGEST) * sigmoid(x);
        case GELU_TANH: return gelu_tanh(x);
        case GELU: return fmaxf(x, -LARGEST) * (0.5f * erfcf(x * -0.7071067811865476f));
        case RELU: return fmaxf(x, 0.0f);
        default: {
            const float positive = fmaxf(x, 0.0f);
            return positive * positive;
        }
    }
}

// inner: (rows, ffn)
template <typename T, int V, int B>
__device__ __forceinline__ void gate_up(const float *h, const T *norm, const T *weight, float *inner, DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    __shared__ float scratch[32];
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
        for (int b = 0; b < B; b++) {
            const float *x = inner + (size_t)min(first + b, p.rows - 1) * p.ffn;
            for (uint32_t i = threadIdx.x; i < p.ffn; i += blockDim.x) xs[b * stride + slot<V>(i)] = x[i];
        }
        __syncthreads();
        for (uint32_t i = own_row; i < p.d; i += gridDim.x * warps) {
            const T *const rows[1] = {weight + (size_t)i * p.ffn};
            float sums[1][B], own[1];
            dots<T, V, 1, B>(rows, xs, stride, p.ffn, sums);
            mine<1, B>(sums, own);
            if (lane < B && first + lane < p.rows) h[(size_t)(first + lane) * p.d + i] += own[0];
        }
    }
}

struct Best {
    float value;
    uint32_t id;
};

// The larger one; of equal ones that of the smaller id. A NaN is never chosen.
__device__ __forceinline__ void keep(Best &best, float value, uint32_t id) {
    if (value > best.value || (value == best.value && id < best.id)) best = {value, id};
}

// logits: (rows, vocab); hidden: (rows, d), what they are made of; best: (rows, blocks).
template <typename T, int V, int B>
__device__ __forceinline__ void head(const float *h, const T *norm, const T *weight, float *logits, float *hidden, Best *best,
                                     DecodeParams p) {
    extern __shared__ __align__(16) float xs[];
    __shared__ float scratch[32];
    __shared__ Best found[WARPS][B];
    constexpr uint32_t R = 4;  // rows of the weight that a warp takes at once
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, stride = padded<V>(p.d);
    let_next_begin();
    for (uint32_t r = 0; r < R; r++) {
        const uint32_t id = (blockIdx.x * WARPS + warp) * R + r;
        if (id < p.vocab) ask_for(weight + (size_t)id * p.d, p.d);
    }
    wait_for_previous();
    for (uint32_t first = 0; first < p.rows; first += B) {
        if (first > 0) __syncthreads();
        stage_normed<T, V, B>(xs, h, norm, first, p, scratch);
        const uint32_t row = first + lane;
        const bool finishes = lane < B && row < p.rows;
        if (blockIdx.x == 0)
            for (uint32_t b = 0; b < B && first + b < p.rows; b++)
                for (uint32_t i = threadIdx.x; i < p.d; i += blockDim.x)
                    hidden[(size_t)(first + b) * p.d + i] = xs[b * stride + slot<V>(i)];
        Best largest = {-INFINITY, UINT32_MAX};
        for (uint32_t id = (blockIdx.x * WARPS + warp) * R; id < p.vocab; id += gridDim.x * WARPS * R) {
            const T *rows[R];
#pragma unroll
            for (uint32_t r = 0; r < R; r++) rows[r] = weight + (size_t)min(id + r, p.vocab - 1) * p.d;
            const T *const fixed[R] = {rows[0], rows[1], rows[2], rows[3]};
            float sums[R][B], own[R];
            dots<T, V, R, B>(fixed, xs, stride, p.d, sums);
            mine<R, B>(sums, own);
            if (!finishes) continue;
#pragma unroll
            for (uint32_t r = 0; r < R; r++) {
                if (id + r >= p.vocab) break;
                logits[(size_t)row * p.vocab + id + r] = own[r];
                keep(largest, own[r], id + r);
            }
        }
        if (lane < B) found[warp][lane] = largest;
        __syncthreads();
        if (warp == 0 && finishes) {
            for (uint32_t w = 1; w < WARPS; w++) keep(largest, found[w][lane].value, found[w][lane].id);
            best[(size_t)row * p.blocks + blockIdx.x] = largest;
        }
    }
}

// One thread block of 256 a row. log: (rows, capacity + 1), the token at each position.
__device__ __forceinline__ void next(const Best *best, const uint32_t *active, uint32_t *token, uint32_t *position,
                                     uint32_t *log, DecodeParams p) {
    __shared__ Best found[256];
    const uint32_t row = blockIdx.x, thread = threadIdx.x;
    let_next_begin();
    wait_for_previous();
    Best largest = {-INFINITY, UINT32_MAX};
    for (uint32_t i = thread; i < p.blocks; i += 256) {
        const Best other = best[(size_t)row * p.blocks + i];
        keep(largest, other.value, other.id);
    }
    found[thread] = largest;
    for (uint32_t half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) keep(found[thread], found[thread + half].value, found[thread + half].id);
    }
    if (thread != 0 || active[row] == 0) return;
    const uint32_t id = found[0].id < p.vocab ? found[0].id : 0;  // 0 where all are NaN
    const uint32_t at = position[row];
    token[row] = id;
    if (at < p.capacity) {
        position[row] = at + 1;
        log[(size_t)row * (p.capacity + 1) + at + 1] = id;
    }
}

#define PRODUCTS(T, NAME, V, B)                                                                                        \
    extern "C" __global__ void decode_qkv_##T##_##NAME##_##B(                                                          \
        const float *h, const T *norm, const T *weight, const float *cos, const float *sin, const uint32_t *position,  \
        float *q, T *cache, DecodeParams p) {                                                                          \
        qkv<T, V, B>(h, norm, weight, cos, sin, position, q, cache, p);                                                \
    }                                                                                                                  \
    extern "C" __global__ void decode_output_##T##_##NAME##_##B(const float *part, const float2 *share,                \
                                                                const T *weight, float *h, DecodeParams p) {           \
        output<T, V, B>(part, share, weight, h, p);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void decode_gate_up_##T##_##NAME##_##B(const float *h, const T *norm, const T *weight,       \
                                                                 float *inner, DecodeParams p) {                       \
        gate_up<T, V, B>(h, norm, weight, inner, p);                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void decode_down_##T##_##NAME##_##B(const float *inner, const T *weight, float *h,           \
                                                              DecodeParams p) {                                        \
        down<T, V, B>(inner, weight, h, p);                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void decode_head_##T##_##NAME##_##B(const float *h, const T *norm, const T *weight,          \
                                                              float *logits, float *hidden, Best *best,                \
                                                              DecodeParams p) {                                        \
        head<T, V, B>(h, norm, weight, logits, hidden, best, p);                                                       \
    }

#define KERNELS(T, NAME, V)                                                                                            \
    PRODUCTS(T, NAME, V, 1)                                                                                            \
    PRODUCTS(T, NAME, V, 4)                                                                                            \
    extern "C" __global__ void decode_attention_##T##_##NAME(const float *q, const T *cache, const uint32_t *position, \
                                                             float *part, float2 *share, DecodeParams p) {             \
        attention<T, V>(q, cache, position, part, share, p);                                                           \
    }

#define TYPE(T)                                                                                                        \
    extern "C" __global__ void decode_embed_##T(const T *table, const uint32_t *token, float *h, DecodeParams p) {     \
        embed<T>(table, token, h, p);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void decode_next_##T(const Best *best, const uint32_t *active, uint32_t *token,              \
                                               uint32_t *position, uint32_t *log, DecodeParams p) {                    \
        next(best, active, token, position, log, p);                                                                   \
    }                                                                                                                  \
    KERNELS(T, wide, WIDE<T>)                                                                                          \
    KERNELS(T, single, 1)
