// FlyLoRA's low products: y = A x for a sparse A, and which k of the r values each row makes use of.
//
// A block takes 128 rows of x. It goes over the columns in chunks of 64: a chunk of x lies turned in shared memory, so
// that a lane reads four rows of one column at once, and each warp adds up the nonzeros of its ranks for all rows. Then
// each rank's score is counted against the others of its row.

#include "common.cuh"

struct FlyParams {
    uint64_t rows;
    uint32_t columns;
    uint32_t r, k;
    uint32_t magnitude;  // whether scores are |y| + balance, or y + balance
    uint32_t wide;       // whether rows of x can be read by vectors
    uint32_t unused;
};
static_assert(sizeof(FlyParams) == 32, "the Rust side has the same layout");

struct Entry {
    uint32_t column;  // in its chunk
    float value;
};

constexpr int TILE = 128, CHUNK = 64, THREADS = 256, WARPS = THREADS / 32;

// Where the four rows from 4 i on of a column stand. Turned by the column's vector, so that lanes that write side by side
// columns and lanes that read side by side rows both touch every bank.
template <int V> __device__ __forceinline__ int place(int column, int i) { return column * (TILE / 4) + (i ^ (column / V & 7)); }

// A key that orders as the floats do; NaN comes last.
__device__ __forceinline__ uint32_t key(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// PER: ranks of a warp, WARPS * PER >= r. entries lie by chunks, then by ranks; starts[chunk r + rank] is the first.
template <typename T, int PER>
__device__ __forceinline__ void low(const T *x, const Entry *entries, const uint32_t *starts, const float *balance,
                                    float *y, uint32_t *mask, uint32_t *counts, const FlyParams &p) {
    constexpr int V = 16 / sizeof(T), VECTORS = CHUNK / V, LOADS = TILE * VECTORS / THREADS;
    extern __shared__ float4 shared[];
    float *turned = reinterpret_cast<float *>(shared);
    // The results lie where x was.
    const uint32_t held = max((uint32_t)(TILE * CHUNK), TILE * (p.r + 1));
    Entry *staged = reinterpret_cast<Entry *>(turned + (held + 3) / 4 * 4);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint64_t row0 = (uint64_t)blockIdx.x * TILE;

    // Of each load a warp takes 8 vectors of 4 rows.
    int at_row[LOADS], at_column[LOADS];
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
        const int task = l * WARPS + warp;
        at_row[l] = task / (VECTORS / 8) * 4 + lane / 8;
        at_column[l] = (task % (VECTORS / 8) * 8 + lane % 8) * V;
    }
    Vec<T, V> next[LOADS];
    auto fetch = [&](uint32_t c0) {
#pragma unroll
        for (int l = 0; l < LOADS; l++) {
            const uint64_t row = row0 + at_row[l];
            next[l] = row < p.rows ? read<T, V>(x + row * p.columns, c0 + at_column[l], p.columns, p.wide)
                                   : read<T, V>(x, 0, 0, false);
        }
    };
    float sums[PER][4];
#pragma unroll
    for (int j = 0; j < PER; j++)
#pragma unroll
        for (int q = 0; q < 4; q++) sums[j][q] = 0.0f;

    fetch(0);
    for (uint32_t chunk = 0; chunk * CHUNK < p.columns; chunk++) {
        __syncthreads();
#pragma unroll
        for (int l = 0; l < LOADS; l++)
#pragma unroll
            for (int v = 0; v < V; v++)
                turned[place<V>(at_column[l] + v, at_row[l] / 4) * 4 + at_row[l] % 4] = to_float(next[l].v[v]);
        const uint32_t first = starts[chunk * p.r], last = starts[(chunk + 1) * p.r];
        for (uint32_t e = first + threadIdx.x; e < last; e += THREADS) staged[e - first] = entries[e];
        __syncthreads();
        if ((chunk + 1) * CHUNK < p.columns) fetch((chunk + 1) * CHUNK);
#pragma unroll
        for (int j = 0; j < PER; j++) {
            const uint32_t rank = j * WARPS + warp;
            if (rank < p.r) {
                const uint32_t begin = starts[chunk * p.r + rank] - first, end = starts[chunk * p.r + rank + 1] - first;
#pragma unroll 4
                for (uint32_t e = begin; e < end; e++) {
                    const Entry entry = staged[e];
                    const float4 four = shared[place<V>(entry.column, lane)];
                    sums[j][0] = fmaf(entry.value, four.x, sums[j][0]);
                    sums[j][1] = fmaf(entry.value, four.y, sums[j][1]);
                    sums[j][2] = fmaf(entry.value, four.z, sums[j][2]);
                    sums[j][3] = fmaf(entry.value, four.w, sums[j][3]);
                }
            }
        }
    }
    __syncthreads();
    const uint32_t pitch = p.r + 1;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        const uint32_t rank = j * WARPS + warp;
        if (rank < p.r)
#pragma unroll
            for (int q = 0; q < 4; q++) turned[(lane * 4 + q) * pitch + rank] = sums[j][q];
    }
    __syncthreads();

    constexpr int WORDS = (WARPS * PER + 31) / 32;
    const uint32_t words = (p.r + 31) / 32;
    float added[WORDS];
    uint32_t used[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        added[w] = w * 32 + lane < p.r ? balance[w * 32 + lane] : 0.0f;
        used[w] = 0;
    }
    for (int i = warp; i < TILE && row0 + i < p.rows; i += WARPS) {
        float value[WORDS];
        uint32_t score[WORDS], above[WORDS];
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            const uint32_t rank = w * 32 + lane;
            value[w] = rank < p.r ? turned[i * pitch + rank] : 0.0f;
            score[w] = key((p.magnitude ? fabsf(value[w]) : value[w]) + added[w]);
            above[w] = 0;
        }
        // How many of the row come before it; of equal scores the first.
#pragma unroll
        for (int o = 0; o < WORDS; o++)
            for (int other = 0; other < 32 && o * 32 + other < p.r; other++) {
                const uint32_t theirs = __shfl_sync(0xffffffffu, score[o], other);
#pragma unroll
                for (int w = 0; w < WORDS; w++)
                    above[w] += theirs > score[w] || (theirs == score[w] && o * 32 + other < w * 32 + lane);
            }
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            const uint32_t rank = w * 32 + lane;
            const bool chosen = rank < p.r && above[w] < p.k;
            used[w] += chosen;
            if (rank < p.r) y[(row0 + i) * p.r + rank] = chosen ? value[w] : 0.0f;
            const uint32_t bits = __ballot_sync(0xffffffffu, chosen);
            if (lane == 0 && w < words) mask[(row0 + i) * words + w] = bits;
        }
    }
    // Whole numbers: the same sum in any order.
#pragma unroll
    for (int w = 0; w < WORDS; w++)
        if (used[w] > 0) atomicAdd(&counts[w * 32 + lane], used[w]);
}

#define KERNELS(T, PER)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, PER == 4 ? 2 : 1)                                            \
        low_##T##_##PER(const T *x, const Entry *entries, const uint32_t *starts, const float *balance, float *y,      \
                        uint32_t *mask, uint32_t *counts, FlyParams p) {                                               \
        low<T, PER>(x, entries, starts, balance, y, mask, counts, p);                                                  \
    }
#define ALL(T)                                                                                                         \
    KERNELS(T, 4)                                                                                                      \
    KERNELS(T, 8)

ALL(f32)
ALL(bf16)
ALL(f16)
