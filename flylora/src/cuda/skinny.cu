// Products with a matrix M of few ranks r, which is f32 and lies with any strides: element (j, c) of rank j and column c
// is m[j stride_j + c stride_c]. x and y are (rows, columns) in row-major order, h is (rows, r) in f32.
//
//     project   h[i][j]  = sum over c of x[i][c] M[j][c]            (0 where a mask says so)
//     expand    y[i][c]  = ratio[c] (base[i][c] + scale sum over j of h[i][j] M[j][c])    (1 where there is no ratio)
//     dot       q[c]     = sum over i of a[i][c] b[i][c]            as partial sums, and `reduce` with one rank
//     outer     dM[j][c] = scale sum over i of h[i][j] x[i][c]      as partial sums, and `reduce`, which adds them up
//
// Each reads x (or base) once: with so few ranks that is what takes the time. Sums are in f32 and in an order that does
// not depend on the run.

#include "params.cuh"

// Elements that a thread takes of a row, where it keeps R numbers for each in registers.
template <typename T, int R> constexpr int KEPT = R >= 64 ? 2 : R >= 32 || sizeof(T) == 4 ? 4 : 8;

// Rows of x that a warp projects at a time, for which it keeps R sums in each lane.
template <int R> constexpr int ROWS = R <= 32 ? 4 : 2;

constexpr int WARPS = 8;

template <typename T, int R>
__device__ __forceinline__ void project(const T *x, const float *m, const uint32_t *mask, float *h,
                                        const SkinnyParams &p) {
    constexpr int V = sizeof(T) == 2 && R <= 8 ? 8 : 4, COLUMNS = 32 * V, TM = ROWS<R>, N = TM * R;
    __shared__ alignas(16) float factor[R][COLUMNS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint64_t row0 = ((uint64_t)blockIdx.x * WARPS + warp) * TM;
    float sums[N];
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] = 0.0f;
    Vec<T, V> next[TM];
    auto fetch = [&](uint32_t c) {
#pragma unroll
        for (int i = 0; i < TM; i++)
            next[i] = row0 + i < p.rows ? read<T, V>(x + (row0 + i) * p.columns, c, p.columns, p.wide)
                                        : read<T, V>(x, 0, 0, false);
    };
    fetch(lane * V);
    for (uint32_t c0 = 0; c0 < p.columns; c0 += COLUMNS) {
        __syncthreads();
        for (int e = threadIdx.x; e < R * COLUMNS; e += WARPS * 32) {
            // By ranks first where those lie side by side.
            const int j = p.stride_j == 1 ? e % R : e / COLUMNS, c = p.stride_j == 1 ? e / R : e % COLUMNS;
            const bool there = j < p.r && c0 + c < p.columns;
            factor[j][c] = there ? m[j * p.stride_j + (c0 + c) * p.stride_c] : 0.0f;
        }
        __syncthreads();
        Vec<T, V> now[TM];
#pragma unroll
        for (int i = 0; i < TM; i++) now[i] = next[i];
        if (c0 + COLUMNS < p.columns) fetch(c0 + COLUMNS + lane * V);
#pragma unroll
        for (int q = 0; q < V; q += 4) {
            float here[TM][4];
#pragma unroll
            for (int i = 0; i < TM; i++)
#pragma unroll
                for (int v = 0; v < 4; v++) here[i][v] = to_float(now[i].v[q + v]);
#pragma unroll
            for (int j = 0; j < R; j++) {
                const float4 f = *reinterpret_cast<const float4 *>(&factor[j][lane * V + q]);
#pragma unroll
                for (int i = 0; i < TM; i++) {
                    float s = sums[i * R + j];
                    s = fmaf(here[i][0], f.x, s);
                    s = fmaf(here[i][1], f.y, s);
                    s = fmaf(here[i][2], f.z, s);
                    sums[i * R + j] = fmaf(here[i][3], f.w, s);
                }
            }
        }
    }
    fold<N / 2, 16>(sums, lane);
#pragma unroll
    for (int i = 0; i < N / 32; i++) {
        const int value = lane * (N / 32) + i, j = value % R;
        const uint64_t row = row0 + value / R;
        if (row < p.rows && j < p.r) {
            const uint32_t words = (p.r + 31) / 32;
            const bool used = !mask || (mask[row * words + j / 32] >> (j % 32) & 1);
            h[row * p.r + j] = used ? sums[i] * p.scale : 0.0f;
        }
    }
}

// Rows of h that a block has in shared memory at a time.
constexpr int STAGED = 32;

template <int R>
__device__ __forceinline__ void stage(float (*staged)[R], const float *h, uint64_t row, uint64_t end, uint32_t r) {
    __syncthreads();
    for (int e = threadIdx.x; e < STAGED * R; e += blockDim.x) {
        const int i = e / R, j = e % R;
        staged[i][j] = row + i < end && j < r ? h[(row + i) * r + j] : 0.0f;
    }
    __syncthreads();
}

template <typename T, int R>
__device__ __forceinline__ void expand(const float *h, const float *m, const float *ratio, T *y,
                                       const SkinnyParams &p) {
    constexpr int V = KEPT<T, R>, AHEAD = 4;
    const T *base = p.adds ? y : nullptr;
    __shared__ alignas(16) float staged[STAGED][R];
    const uint32_t c = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    float kept[R][V];
#pragma unroll
    for (int j = 0; j < R; j++)
#pragma unroll
        for (int v = 0; v < V; v++)
            kept[j][v] = j < p.r && c + v < p.columns ? m[j * p.stride_j + (c + v) * p.stride_c] * p.scale : 0.0f;
    float times[V];
#pragma unroll
    for (int v = 0; v < V; v++) times[v] = ratio && c + v < p.columns ? ratio[c + v] : 1.0f;
    const uint64_t start = (uint64_t)blockIdx.y * p.band, end = min(start + p.band, p.rows);
    for (uint64_t row0 = start; row0 < end; row0 += STAGED) {
        stage<R>(staged, h, row0, end, p.r);
        for (int i0 = 0; i0 < STAGED && row0 + i0 < end; i0 += AHEAD) {
            Vec<T, V> from[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const uint64_t row = row0 + i0 + i;
                const bool there = base && row < end;
                from[i] = there ? read<T, V>(base + row * p.columns, c, p.columns, p.wide)
                                : read<T, V>((const T *)y, 0, 0, false);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                float sum[V];
#pragma unroll
                for (int v = 0; v < V; v++) sum[v] = 0.0f;
#pragma unroll
                for (int j = 0; j < R; j += 4) {
                    const float4 f = *reinterpret_cast<const float4 *>(&staged[i0 + i][j]);
#pragma unroll
                    for (int v = 0; v < V; v++) {
                        sum[v] = fmaf(f.x, kept[j][v], sum[v]);
                        sum[v] = fmaf(f.y, kept[j + 1][v], sum[v]);
                        sum[v] = fmaf(f.z, kept[j + 2][v], sum[v]);
                        sum[v] = fmaf(f.w, kept[j + 3][v], sum[v]);
                    }
                }
                const uint64_t row = row0 + i0 + i;
                if (row < end) {
                    Vec<T, V> to;
#pragma unroll
                    for (int v = 0; v < V; v++) to.v[v] = from_float<T>((to_float(from[i].v[v]) + sum[v]) * times[v]);
                    write<T, V>(y + row * p.columns, c, p.columns, p.wide, to);
                }
            }
        }
    }
}

// partial: (parts, r, columns)
template <typename T, int R>
__device__ __forceinline__ void outer(const T *x, const float *h, float *partial, const SkinnyParams &p) {
    constexpr int V = KEPT<T, R>, AHEAD = R >= 32 ? 4 : 8;
    __shared__ alignas(16) float staged[STAGED][R];
    const uint32_t c = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    float sums[R][V];
#pragma unroll
    for (int j = 0; j < R; j++)
#pragma unroll
        for (int v = 0; v < V; v++) sums[j][v] = 0.0f;
    const uint64_t start = (uint64_t)blockIdx.y * p.band, end = min(start + p.band, p.rows);
    for (uint64_t row0 = start; row0 < end; row0 += STAGED) {
        stage<R>(staged, h, row0, end, p.r);
        for (int i0 = 0; i0 < STAGED && row0 + i0 < end; i0 += AHEAD) {
            Vec<T, V> from[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const uint64_t row = row0 + i0 + i;
                from[i] = row < end ? read<T, V>(x + row * p.columns, c, p.columns, p.wide)
                                    : read<T, V>(x, 0, 0, false);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                float here[V];
#pragma unroll
                for (int v = 0; v < V; v++) here[v] = to_float(from[i].v[v]);
#pragma unroll
                for (int j = 0; j < R; j += 4) {
                    const float4 f = *reinterpret_cast<const float4 *>(&staged[i0 + i][j]);
#pragma unroll
                    for (int v = 0; v < V; v++) {
                        sums[j][v] = fmaf(f.x, here[v], sums[j][v]);
                        sums[j + 1][v] = fmaf(f.y, here[v], sums[j + 1][v]);
                        sums[j + 2][v] = fmaf(f.z, here[v], sums[j + 2][v]);
                        sums[j + 3][v] = fmaf(f.w, here[v], sums[j + 3][v]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < R; j++)
        if (j < p.r) {
            float *to = partial + ((uint64_t)blockIdx.y * p.r + j) * p.columns;
#pragma unroll
            for (int v = 0; v < V; v++)
                if (c + v < p.columns) to[c + v] = sums[j][v];
        }
}

// partial: (parts, columns)
template <typename T>
__device__ __forceinline__ void dot(const T *a, const T *b, float *partial, const SkinnyParams &p) {
    constexpr int V = 16 / sizeof(T), AHEAD = 4;
    const uint32_t c = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    const uint64_t start = (uint64_t)blockIdx.y * p.band, end = min(start + p.band, p.rows);
    float sums[V];
#pragma unroll
    for (int v = 0; v < V; v++) sums[v] = 0.0f;
    for (uint64_t row0 = start; row0 < end; row0 += AHEAD) {
        Vec<T, V> one[AHEAD], other[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const uint64_t row = row0 + i;
            one[i] = row < end ? read<T, V>(a + row * p.columns, c, p.columns, p.wide) : read<T, V>(a, 0, 0, false);
            other[i] = row < end ? read<T, V>(b + row * p.columns, c, p.columns, p.wide) : read<T, V>(b, 0, 0, false);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int v = 0; v < V; v++) sums[v] = fmaf(to_float(one[i].v[v]), to_float(other[i].v[v]), sums[v]);
    }
#pragma unroll
    for (int v = 0; v < V; v++)
        if (c + v < p.columns) partial[(uint64_t)blockIdx.y * p.columns + c + v] = sums[v];
}

// The norms of the rows of W + scale M^T A, for squares of those of W, W (rows, columns), A (r, columns) and M (rows, r):
// |w + d|^2 = |w|^2 + d . (2 w + d). A block takes a row.
template <typename T>
__device__ __forceinline__ void norms(const T *w, const float *a, const float *m, const float *squares, float *out,
                                      const SkinnyParams &p) {
    __shared__ float own[64], shares[8];
    const uint64_t row = blockIdx.x;
    if (threadIdx.x < p.r) own[threadIdx.x] = m[row * p.r + threadIdx.x] * p.scale;
    __syncthreads();
    float sum = 0.0f;
    for (uint32_t c = threadIdx.x; c < p.columns; c += blockDim.x) {
        float d = 0.0f;
        for (uint32_t j = 0; j < p.r; j++) d = fmaf(own[j], a[(uint64_t)j * p.columns + c], d);
        sum = fmaf(d, 2.0f * to_float(w[row * p.columns + c]) + d, sum);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        float square = squares[row];
        for (uint32_t warp = 0; warp < blockDim.x / 32; warp++) square += shares[warp];
        // Rounding may take a square below 0 where the change cancels the weight.
        out[row] = sqrtf(fmaxf(square, 1.17549435e-38f));
    }
}

// W + scale M^T A, for W (rows, columns), A (r, columns) and M (rows, r). A block takes 64 rows and columns, a thread four.
extern "C" __global__ void __launch_bounds__(256)
    effective(const float *w, const float *a, const float *m, float *out, SkinnyParams p) {
    constexpr int MOST_RANKS = 64, SIDE = 64;
    __shared__ alignas(16) float of_a[MOST_RANKS][SIDE], of_m[MOST_RANKS][SIDE + 4];
    const uint32_t c0 = blockIdx.x * SIDE, c = c0 + threadIdx.x % 16 * 4;
    const uint64_t row0 = (uint64_t)blockIdx.y * SIDE, row = row0 + threadIdx.x / 16 * 4;
    Vec<float, 4> from[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        from[i] = row + i < p.rows ? read<float, 4>(w + (row + i) * p.columns, c, p.columns, p.wide)
                                   : read<float, 4>(w, 0, 0, false);
    for (uint32_t e = threadIdx.x; e < p.r * SIDE; e += blockDim.x) {
        const uint32_t j = e / SIDE, i = e % SIDE;
        of_a[j][i] = c0 + i < p.columns ? a[(uint64_t)j * p.columns + c0 + i] : 0.0f;
        const uint32_t side = e / p.r, rank = e % p.r;
        of_m[rank][side] = row0 + side < p.rows ? m[(row0 + side) * p.r + rank] * p.scale : 0.0f;
    }
    __syncthreads();
    float sums[4][4] = {};
    for (uint32_t j = 0; j < p.r; j++) {
        const float4 f = *reinterpret_cast<const float4 *>(&of_a[j][threadIdx.x % 16 * 4]);
        const float4 k = *reinterpret_cast<const float4 *>(&of_m[j][threadIdx.x / 16 * 4]);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int v = 0; v < 4; v++) sums[i][v] = fmaf((&k.x)[i], (&f.x)[v], sums[i][v]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (row + i >= p.rows) break;
#pragma unroll
        for (int v = 0; v < 4; v++) from[i].v[v] += sums[i][v];
        write<float, 4>(out + (row + i) * p.columns, c, p.columns, p.wide, from[i]);
    }
}

// Blocks of 32 values by 16 shares of the parts.
extern "C" __global__ void __launch_bounds__(512) reduce(const float *partial, float *out, SkinnyParams p) {
    __shared__ float shares[16][33];
    const uint64_t n = (uint64_t)p.r * p.columns, e = (uint64_t)blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (e < n) {
#pragma unroll 8
        for (uint32_t part = threadIdx.y; part < p.parts; part += 16) sum += partial[part * n + e];
    }
    shares[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && e < n) {
        sum = 0.0f;
#pragma unroll
        for (int s = 0; s < 16; s++) sum += shares[s][threadIdx.x];
        out[e / p.columns * p.stride_j + e % p.columns * p.stride_c] = sum * p.scale;
    }
}

#define KERNELS(T, R)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, R <= 16 ? 2 : 1)                                                 \
        project_##T##_##R(const T *x, const float *m, const uint32_t *mask, float *h, SkinnyParams p) {                \
        project<T, R>(x, m, mask, h, p);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        expand_##T##_##R(const float *h, const float *m, const float *ratio, T *y, SkinnyParams p) {                   \
        expand<T, R>(h, m, ratio, y, p);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        outer_##T##_##R(const T *x, const float *h, float *partial, SkinnyParams p) {                                  \
        outer<T, R>(x, h, partial, p);                                                                                 \
    }
#define ALL(T)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        norms_##T(const T *w, const float *a, const float *m, const float *squares, float *out, SkinnyParams p) {      \
        norms<T>(w, a, m, squares, out, p);                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        dot_##T(const T *a, const T *b, float *partial, SkinnyParams p) {                                              \
        dot<T>(a, b, partial, p);                                                                                      \
    }                                                                                                                  \
    KERNELS(T, 8)                                                                                                      \
    KERNELS(T, 16)                                                                                                     \
    KERNELS(T, 32)                                                                                                     \
    KERNELS(T, 64)

ALL(f32)
ALL(bf16)
ALL(f16)
