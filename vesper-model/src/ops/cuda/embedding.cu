// Rows of a table, and the gradient of the table: for each row of the table, the sum of the gradients of the places
// that read it.
//
// The places are sorted by their id (a stable radix sort, eight bits a pass), so that every row of the result has one
// writer, which adds in f32 and in the order of the places: no atomics on floats, so the same bits each time.

#include "common.cuh"

constexpr int CHUNK = 1024;  // places that one block sorts
constexpr int DIGITS = 256;
constexpr int ROWS = 8;      // rows of the table, and warps, of one block of the backward
constexpr uint32_t LONG = 64;  // more places than this are shared by all warps of the block

struct EmbeddingParams {
    uint64_t n;      // ids
    uint32_t vocab;  // rows of the table
    uint32_t d;      // columns
};
static_assert(sizeof(EmbeddingParams) == 16, "the Rust side has the same layout");

template <typename T, typename S, int V> __device__ __forceinline__ Vec<T, V> convert(const Vec<S, V> &x) {
    Vec<T, V> y;
#pragma unroll
    for (int k = 0; k < V; k++) y.v[k] = from_float<T>(to_float(x.v[k]));
    return y;
}

// S: the table, T: the rows. One thread a vector. An id outside the table gives a row of NaN: the host cannot know without waiting.
template <typename S, typename T, int V>
__device__ void gather(const S *table, const uint32_t *ids, T *rows, EmbeddingParams p) {
    const uint32_t vectors = p.d / V;
    const uint64_t total = p.n * vectors;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total;
         i += (uint64_t)gridDim.x * blockDim.x) {
        const uint64_t row = i / vectors;
        const uint32_t column = (uint32_t)(i - row * vectors) * V, id = ids[row];
        Vec<T, V> x;
        if (id < p.vocab) {
            x = convert<T>(load<S, V>(table + (size_t)id * p.d + column));
        } else {
#pragma unroll
            for (int k = 0; k < V; k++) x.v[k] = from_float<T>(__int_as_float(0x7fc00000));
        }
        store<T, V>(rows + row * p.d + column, x);
    }
}

// counts[digit][chunk] = how many keys of the chunk have the digit. A key over `limit`, the size of the vocabulary,
// counts as `limit`, which is no row.
extern "C" __global__ void __launch_bounds__(CHUNK)
    embedding_count(const uint32_t *keys, uint32_t *counts, uint32_t n, uint32_t limit, uint32_t shift) {
    __shared__ uint32_t histogram[DIGITS];
    if (threadIdx.x < DIGITS) histogram[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t i = blockIdx.x * CHUNK + threadIdx.x;
    if (i < n) atomicAdd(&histogram[(min(keys[i], limit) >> shift) % DIGITS], 1u);
    __syncthreads();
    if (threadIdx.x < DIGITS) counts[threadIdx.x * gridDim.x + blockIdx.x] = histogram[threadIdx.x];
}

// Exclusive prefix sums in place, by one block.
extern "C" __global__ void __launch_bounds__(CHUNK) embedding_scan(uint32_t *counts, uint32_t n) {
    __shared__ uint32_t sums[2][CHUNK];
    const uint32_t share = (n + CHUNK - 1) / CHUNK;
    const uint32_t start = min(threadIdx.x * share, n), end = min(start + share, n);
    uint32_t sum = 0;
    for (uint32_t i = start; i < end; i++) sum += counts[i];
    int now = 0;
    sums[0][threadIdx.x] = sum;
    __syncthreads();
    for (int offset = 1; offset < CHUNK; offset *= 2) {
        const uint32_t before = threadIdx.x >= offset ? sums[now][threadIdx.x - offset] : 0;
        sums[1 - now][threadIdx.x] = sums[now][threadIdx.x] + before;
        now = 1 - now;
        __syncthreads();
    }
    uint32_t at = sums[now][threadIdx.x] - sum;
    for (uint32_t i = start; i < end; i++) {
        const uint32_t count = counts[i];
        counts[i] = at;
        at += count;
    }
}

// Moves each key, and the place that it belongs to, to where its digit belongs; equal digits keep their order.
// places: null in the first pass, where each key stands at its own place.
extern "C" __global__ void __launch_bounds__(CHUNK)
    embedding_scatter(const uint32_t *keys, const uint32_t *places, const uint32_t *starts, uint32_t *keys_out,
                      uint32_t *places_out, uint32_t n, uint32_t limit, uint32_t shift) {
    __shared__ uint32_t digits[CHUNK];
    const uint32_t i = blockIdx.x * CHUNK + threadIdx.x;
    const uint32_t key = i < n ? min(keys[i], limit) : 0;
    const uint32_t digit = i < n ? (key >> shift) % DIGITS : DIGITS;
    digits[threadIdx.x] = digit;
    __syncthreads();
    if (i >= n) return;
    uint32_t rank = 0;
    for (int j = 0; j < threadIdx.x; j++) rank += digits[j] == digit;
    const uint32_t to = starts[digit * gridDim.x + blockIdx.x] + rank;
    keys_out[to] = key;
    places_out[to] = places ? places[i] : i;
}

// first[v] = how many keys are below v, for v = 0 .. vocab
extern "C" __global__ void embedding_bounds(const uint32_t *keys, uint32_t *first, EmbeddingParams p) {
    const uint32_t v = blockIdx.x * blockDim.x + threadIdx.x;
    if (v > p.vocab) return;
    uint32_t low = 0, high = (uint32_t)p.n;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (keys[middle] < v)
            low = middle + 1;
        else
            high = middle;
    }
    first[v] = low;
}

// The vectors of one lane: GROUP of them, 32 vectors apart.
constexpr int GROUP = 3;

template <typename T, int V> struct Sum {
    float v[GROUP][V];

    __device__ void clear() {
#pragma unroll
        for (int j = 0; j < GROUP; j++)
#pragma unroll
            for (int k = 0; k < V; k++) v[j][k] = 0;
    }

    // Adds the rows of the places start .. end, in order.
    __device__ void add(const T *drows, const uint32_t *places, uint32_t start, uint32_t end, uint32_t column,
                        uint32_t d) {
#pragma unroll 2
        for (uint32_t i = start; i < end; i++) {
            const T *const row = drows + (size_t)places[i] * d;
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                const uint32_t c = column + j * 32 * V;
                if (c < d) {
                    const Vec<T, V> x = load<T, V>(row + c);
#pragma unroll
                    for (int k = 0; k < V; k++) v[j][k] += to_float(x.v[k]);
                }
            }
        }
    }

    // The row, or with `before` the sum of both: each is rounded before it is added, as where they are added later.
    template <typename S>
    __device__ void write(S *table, const S *before, size_t start, uint32_t column, uint32_t d) const {
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            const uint32_t c = column + j * 32 * V;
            if (c < d) {
                Vec<S, V> out;
#pragma unroll
                for (int k = 0; k < V; k++) out.v[k] = from_float<S>(v[j][k]);
                if (before) {
                    const Vec<S, V> other = load<S, V>(before + start + c);
#pragma unroll
                    for (int k = 0; k < V; k++) out.v[k] = from_float<S>(to_float(other.v[k]) + to_float(out.v[k]));
                }
                store<S, V>(table + start + c, out);
            }
        }
    }
};

// Block (x, y): ROWS rows of the table, one a warp, and GROUP * 32 V columns. before: null, or what is added to.
template <typename S, typename T, int V>
__device__ void backward(const T *drows, const uint32_t *places, const uint32_t *first, const S *before, S *dtable,
                         EmbeddingParams p) {
    __shared__ uint32_t bounds[ROWS + 1];
    __shared__ float parts[ROWS][GROUP * 32 * V];
    const uint32_t v0 = blockIdx.x * ROWS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t column = (blockIdx.y * GROUP * 32 + lane) * V;
    if (threadIdx.x <= ROWS) bounds[threadIdx.x] = first[min(v0 + threadIdx.x, p.vocab)];
    __syncthreads();
    const uint32_t start = bounds[warp], end = bounds[warp + 1];
    Sum<T, V> sum;
    if (v0 + warp < p.vocab && end - start <= LONG) {
        sum.clear();
        sum.add(drows, places, start, end, column, p.d);
        sum.write(dtable, before, (size_t)(v0 + warp) * p.d, column, p.d);
    }
    for (int row = 0; row < ROWS && v0 + row < p.vocab; row++) {
        const uint32_t start = bounds[row], length = bounds[row + 1] - start;
        if (length <= LONG) continue;  // the same in every thread
        const uint32_t share = (length + ROWS - 1) / ROWS;
        const uint32_t from = min(warp * share, length), to = min(from + share, length);
        sum.clear();
        sum.add(drows, places, start + from, start + to, column, p.d);
#pragma unroll
        for (int j = 0; j < GROUP; j++)
#pragma unroll
            for (int k = 0; k < V; k++) parts[warp][(j * V + k) * 32 + lane] = sum.v[j][k];
        __syncthreads();
        if (warp == 0) {
#pragma unroll
            for (int j = 0; j < GROUP; j++)
#pragma unroll
                for (int k = 0; k < V; k++) {
                    float total = 0;
                    for (int part = 0; part < ROWS; part++) total += parts[part][(j * V + k) * 32 + lane];
                    sum.v[j][k] = total;
                }
            sum.write(dtable, before, (size_t)(v0 + row) * p.d, column, p.d);
        }
        __syncthreads();
    }
}

// S: the table, T: the rows.
#define KERNELS(S, T, NAME, V)                                                                                         \
    extern "C" __global__ void embedding_forward_##S##_##T##_##NAME(const S *table, const uint32_t *ids, T *rows,      \
                                                                    EmbeddingParams p) {                               \
        gather<S, T, V>(table, ids, rows, p);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * ROWS) embedding_backward_##S##_##T##_##NAME(                     \
        const T *drows, const uint32_t *places, const uint32_t *first, const S *before, S *dtable,                     \
        EmbeddingParams p) {                                                                                           \
        backward<S, T, V>(drows, places, first, before, dtable, p);                                                    \
    }

KERNELS(f32, f32, wide, WIDE<f32>)
KERNELS(f32, f32, single, 1)
KERNELS(bf16, bf16, wide, WIDE<bf16>)
KERNELS(bf16, bf16, single, 1)
KERNELS(f16, f16, wide, WIDE<f16>)
KERNELS(f16, f16, single, 1)
KERNELS(f32, bf16, wide, WIDE<f32>)
KERNELS(f32, bf16, single, 1)
KERNELS(f32, f16, wide, WIDE<f32>)
KERNELS(f32, f16, single, 1)
