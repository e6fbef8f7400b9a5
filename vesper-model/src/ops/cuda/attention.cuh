// Tiles in shared memory and what the attention kernels do with them.
//
// Tiles of head size D (64 or 128) hold any head size up to D that is a multiple of 8, padded with zeros.
#pragma once

#include "mma.cuh"

struct AttentionParams {
    uint32_t t;
    uint32_t query, kv;  // heads
    uint32_t dim;        // of a head
    float scale;         // of the scores
};
static_assert(sizeof(AttentionParams) == 20, "the Rust side has the same layout");

constexpr float LOG2_E = 1.4426950408889634f;

// A tile of rows of D 16-bit numbers in shared memory. The 16-byte pieces of a row are permuted by the row, so that
// eight rows of one column of pieces lie in different banks.
template <int D> __device__ __forceinline__ int place(int row, int piece) { return row * D + ((piece ^ (row & 7)) << 3); }

// Starts to copy ROWS rows from `row0` on, zeros past row t and past column dim.
template <typename T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(T *tile, const T *from, int row0, int t, size_t stride, int dim) {
    constexpr int PIECES = D / 8;
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        const bool valid = row0 + row < t && piece * 8 < dim;
        copy_async(tile + place<D>(row, piece), valid ? from + (size_t)(row0 + row) * stride + piece * 8 : from, valid);
    }
}

// The operand a of 16 rows from `row0` at the columns 16 k ..
template <typename T, int D> __device__ __forceinline__ void load_a(uint32_t a[4], const T *tile, int row0, int k) {
    const int lane = threadIdx.x % 32;
    load_matrices(a, tile + place<D>(row0 + lane % 16, 2 * k + lane / 16));
}

// The operands b of two neighbouring columns of results whose b is the transpose of the tile: tile rows are columns of
// b. Rows 16 n .. of the tile, its columns 16 k ..; b[0..2] for the first 8 rows, b[2..4] for the next 8.
template <typename T, int D> __device__ __forceinline__ void load_bt(uint32_t b[4], const T *tile, int n, int k) {
    const int lane = threadIdx.x % 32;
    load_matrices(b, tile + place<D>(16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}

// The operands b of two neighbouring columns of results where b is the tile itself: its rows 16 k .., its columns
// 16 n ..; b[0..2] for the first 8 columns, b[2..4] for the next 8.
template <typename T, int D> __device__ __forceinline__ void load_b(uint32_t b[4], const T *tile, int k, int n) {
    const int lane = threadIdx.x % 32;
    load_transposed(b, tile + place<D>(16 * k + lane % 16, 2 * n + lane / 16));
}

// Two neighbouring 16 x 8 results as an operand a.
template <typename T> __device__ __forceinline__ void as_a(uint32_t a[4], const float left[4], const float right[4]) {
    a[0] = pack<T>(left[0], left[1]);
    a[1] = pack<T>(left[2], left[3]);
    a[2] = pack<T>(right[0], right[1]);
    a[3] = pack<T>(right[2], right[3]);
}

// Writes 16 rows of results into the tile, from `row0`; only the calling warp may use these rows.
template <typename T, int D>
__device__ __forceinline__ void put_rows(T *tile, int row0, const float c[D / 8][4], float low, float high) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        *reinterpret_cast<uint32_t *>(tile + place<D>(row0 + g, n) + 2 * t) = pack<T>(c[n][0] * low, c[n][1] * low);
        *reinterpret_cast<uint32_t *>(tile + place<D>(row0 + g + 8, n) + 2 * t) =
            pack<T>(c[n][2] * high, c[n][3] * high);
    }
}

// Copies 16 rows of the tile, those that the calling warp wrote, to rows `first` .. of the result.
template <typename T, int D>
__device__ __forceinline__ void store_rows(T *to, const T *tile, int row0, int first, int t, size_t stride, int dim) {
    constexpr int PIECES = D / 8;
    __syncwarp();
#pragma unroll
    for (int i = threadIdx.x % 32; i < 16 * PIECES; i += 32) {
        const int row = i / PIECES, piece = i % PIECES;
        if (first + row < t && piece * 8 < dim)
            *reinterpret_cast<uint4 *>(to + (size_t)(first + row) * stride + piece * 8) =
                *reinterpret_cast<const uint4 *>(tile + place<D>(row0 + row, piece));
    }
}

// Where the heads of one block begin. Block x: batch and query head (forward, dq) or key head (dk and dv).
struct Place {
    size_t batch;
    uint32_t head;
};

__device__ __forceinline__ Place place_of(uint32_t block, uint32_t heads) {
    return {block / heads, block % heads};
}

// The rows of one query head and of the key head that it shares.
template <typename T> struct HeadRows {
    const T *q, *k, *v;
    size_t q_stride, stride;  // of queries; of keys and values
    int t;                    // queries
    int first;                // the position of query 0, which is how many keys are before its own
};

// Those of a packed projection.
template <typename T>
__device__ __forceinline__ HeadRows<T> packed_head(const T *qkv, const Place &at, const AttentionParams &p) {
    const size_t width = (size_t)(p.query + 2 * p.kv) * p.dim;
    const uint32_t kv = at.head / (p.query / p.kv);
    const T *const base = qkv + at.batch * p.t * width;
    return {base + at.head * p.dim,
            base + (p.query + kv) * p.dim,
            base + (p.query + p.kv + kv) * p.dim,
            width,
            width,
            (int)p.t,
            0};
}

struct CachedParams {
    AttentionParams attention;      // t: new tokens
    uint32_t first;                 // the position of the first of them
    uint32_t row, rows, capacity;   // of the cache
};
static_assert(sizeof(CachedParams) == 36, "the Rust side has the same layout");

// Where a head's positions begin in a cache (2, rows, kv, capacity, dim).
__device__ __forceinline__ size_t cached_at(const CachedParams &p, uint32_t values, uint32_t kv) {
    return (((size_t)values * p.rows + p.row) * p.attention.kv + kv) * p.capacity * p.attention.dim;
}

// The rows of a head whose queries are (t, query dim), and whose keys and values are in a cache.
template <typename T>
__device__ __forceinline__ HeadRows<T> cached_head(const T *q, const T *cache, uint32_t head, const CachedParams &p) {
    const AttentionParams &a = p.attention;
    const uint32_t kv = head / (a.query / a.kv);
    return {q + head * a.dim,
            cache + cached_at(p, 0, kv),
            cache + cached_at(p, 1, kv),
            (size_t)a.query * a.dim,
            a.dim,
            (int)a.t,
            (int)p.first};
}
