// The products of skinny.cu in f32 on tensor cores; see tf32.cuh for their factors.
//
// The order of the terms of a sum, of the ranks and of the columns of a result, is free: it is chosen such that every lane
// reads and writes 16 bytes that lie side by side, straight from and to the device's memory.

#include "params.cuh"
#include "tf32.cuh"

constexpr int WARPS = 8;

// Columns that a warp takes at a time, and how many steps of x are in shared memory. There the vectors of four of a row are
// exchanged, such that lanes that read at the same time touch different banks.
constexpr int STEP = 32, AHEAD = 4;

// A number as its two parts.
struct Parts {
    uint32_t high, low;
};

__device__ __forceinline__ Parts parts(float x) {
    Parts p;
    halves(x, p.high, p.low);
    return p;
}

// c += a b, the small parts first.
__device__ __forceinline__ void multiply_add(float (&c)[4], const Parts (&a)[4], Parts b0, Parts b1) {
    const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    const uint32_t low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
    multiply_add_tf32(c, high, b0.low, b1.low);
    multiply_add_tf32(c, low, b0.high, b1.high);
    multiply_add_tf32(c, high, b0.high, b1.high);
}

// Four numbers from column c of a row, where there is one.
__device__ __forceinline__ float4 four(const float *row, uint32_t c, uint32_t n, bool wide) {
    if (!row) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const Vec<float, 4> v = read<float, 4>(row, c, n, wide);
    return make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
}

// Starts to copy four numbers from column c of a row into shared memory, zeros where there is none.
__device__ __forceinline__ void copy_four(float4 *to, const float *row, uint32_t c, uint32_t n, bool there, bool wide) {
    if (wide) {
        copy_async(to, row + (there ? c : 0), there);
    } else {
        const Vec<float, 4> v = read<float, 4>(row, c, there ? n : 0, false);
        *to = make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
    }
}

// h[i][j] = scale sum over c of x[i][c] M[j][c], 0 where a mask says so. A warp takes 16 rows, and 32 columns at a time, of
// which a lane has 4 t and 16 + 4 t on.
template <int R>
__device__ __forceinline__ void project(const float *x, const float *m, const uint32_t *mask, float *h,
                                        const SkinnyParams &p) {
    // Columns of M that are in shared memory at a time; a row there is such that 8 lanes touch every bank.
    constexpr int CHUNK = R <= 32 ? 64 : 32, STRIDE = 2 * CHUNK + 4, OWN = R * CHUNK / (32 * WARPS);
    __shared__ alignas(16) float staged[R][STRIDE];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const uint64_t row0 = ((uint64_t)blockIdx.x * WARPS + warp) * 16;
    // A warp copies the values of its own rows, some steps ahead.
    extern __shared__ float4 memory[];
    float4(*tiles)[16][STEP / 4] = reinterpret_cast<float4(*)[16][STEP / 4]>(memory) + warp * AHEAD;
    auto fetch = [&](uint32_t step) {
        const uint32_t c = step * STEP + lane % 8 * 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = 4 * i + lane / 8;
            const bool there = row0 + row < p.rows && c < p.columns;
            copy_four(&tiles[step % AHEAD][row][lane % 8 ^ row % 2 * 4], x + (there ? (row0 + row) * p.columns : 0), c,
                      p.columns, there, p.wide);
        }
        copy_commit();
    };
    float of_m[OWN];
    // By ranks first where those lie side by side.
    auto place = [&](int i) {
        const int e = threadIdx.x + i * WARPS * 32;
        return p.stride_j == 1 ? make_int2(e % R, e / R) : make_int2(e / CHUNK, e % CHUNK);
    };
    auto fetch_m = [&](uint32_t c0) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int2 at = place(i);
            const bool there = at.x < p.r && c0 + at.y < p.columns;
            of_m[i] = there ? m[at.x * p.stride_j + (c0 + at.y) * p.stride_c] : 0.0f;
        }
    };
    float sums[R / 8][4];
#pragma unroll
    for (int j = 0; j < R / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[j][i] = 0.0f;
    fetch_m(0);
#pragma unroll
    for (int step = 0; step < AHEAD - 1; step++) fetch(step);
    for (uint32_t c0 = 0; c0 < p.columns; c0 += CHUNK) {
        __syncthreads();
        // Of two neighbouring columns the high parts, then the low ones.
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int2 at = place(i);
            const Parts both = parts(of_m[i]);
            float *to = &staged[at.x][at.y / 2 * 4 + at.y % 2];
            to[0] = __uint_as_float(both.high);
            to[2] = __uint_as_float(both.low);
        }
        __syncthreads();
        if (c0 + CHUNK < p.columns) fetch_m(c0 + CHUNK);
#pragma unroll
        for (int s = 0; s < CHUNK; s += STEP) {
            if (c0 + s >= p.columns) break;
            const uint32_t step = (c0 + s) / STEP;
            __syncwarp();
            fetch(step + AHEAD - 1);
            copy_wait<AHEAD - 1>();
            __syncwarp();
            const float4(*tile)[STEP / 4] = tiles[step % AHEAD];
            float few[R / 8][4] = {};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = (4 * half + t) ^ g % 2 * 4;
                const float4 up = tile[g][at], down = tile[g + 8][at];
#pragma unroll
                for (int v = 0; v < 4; v += 2) {
                    const Parts a[4] = {parts((&up.x)[v]), parts((&down.x)[v]), parts((&up.x)[v + 1]),
                                        parts((&down.x)[v + 1])};
#pragma unroll
                    for (int j = 0; j < R / 8; j++) {
                        const uint4 b =
                            *reinterpret_cast<const uint4 *>(&staged[8 * j + g][2 * (s + 16 * half + 4 * t + v)]);
                        multiply_add(few[j], a, {b.x, b.z}, {b.y, b.w});
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < R / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[j][i] += few[j][i];
        }
    }
    put_projected<R>(h, sums, mask, row0, lane, p);
}

// y[i][c] = ratio[c] (base[i][c] + scale sum over j of h[i][j] M[j][c]), without a ratio where there is none. A warp takes
// 32 columns of a band of rows, and 16 rows at a time. Of the ranks a lane has R / 4 t on.
template <int R>
__device__ __forceinline__ void expand(const float *h, const float *m, const float *ratio, float *y,
                                       const SkinnyParams &p) {
    constexpr int K = R / 8, OWN = R / 4;
    const float *base = p.adds ? y : nullptr;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t c0 = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 32;
    if (c0 >= p.columns) return;
    // Column g of product n is column 16 (n / 2) + 4 (g / 2) + 2 (n % 2) + g % 2 of the 32, so that the results of two
    // products lie side by side.
    auto of_product = [&](int n, int g) { return c0 + 16 * (n / 2) + 4 * (g / 2) + 2 * (n % 2) + g % 2; };
    float factor[K][4][2];
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t column = of_product(n, g), j = OWN * t + 2 * k + i;
                const bool there = j < p.r && column < p.columns;
                factor[k][n][i] = there ? m[j * p.stride_j + column * p.stride_c] * p.scale : 0.0f;
            }
    float times[2][4];
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
#pragma unroll
        for (int v = 0; v < 4; v++) {
            const uint32_t c = c0 + 16 * pair + 4 * t + v;
            times[pair][v] = ratio && c < p.columns ? ratio[c] : 1.0f;
        }
    const uint64_t start = (uint64_t)blockIdx.y * p.band, end = min(start + p.band, p.rows);
    const bool whole = p.r % 4 == 0;
    float ranks[2][OWN];
    auto fetch = [&](uint64_t row0) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint64_t row = row0 + g + 8 * half;
            const float *from = row < end ? h + row * p.r : nullptr;
            if constexpr (OWN % 4 == 0) {
#pragma unroll
                for (int j = 0; j < OWN; j += 4) {
                    const float4 v = four(from, OWN * t + j, p.r, whole);
                    ranks[half][j] = v.x, ranks[half][j + 1] = v.y, ranks[half][j + 2] = v.z, ranks[half][j + 3] = v.w;
                }
            } else {
#pragma unroll
                for (int j = 0; j < OWN; j++) ranks[half][j] = from && OWN * t + j < p.r ? from[OWN * t + j] : 0.0f;
            }
        }
    };
    fetch(start);
    for (uint64_t row0 = start; row0 < end; row0 += 16) {
        float4 from[2][2];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const uint64_t row = row0 + g + 8 * half;
                from[half][pair] = four(base && row < end ? base + row * p.columns : nullptr, c0 + 16 * pair + 4 * t,
                                        p.columns, p.wide);
            }
        Parts a[K][4];
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) a[k][i] = parts(ranks[i % 2][2 * k + i / 2]);
        if (row0 + 16 < end) fetch(row0 + 16);
        float sums[4][4] = {};
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int n = 0; n < 4; n++) multiply_add(sums[n], a[k], parts(factor[k][n][0]), parts(factor[k][n][1]));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint64_t row = row0 + g + 8 * half;
            if (row >= end) continue;
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {
                const uint32_t c = c0 + 16 * pair + 4 * t;
                Vec<float, 4> to;
#pragma unroll
                for (int v = 0; v < 4; v++)
                    to.v[v] = ((&from[half][pair].x)[v] + sums[2 * pair + v / 2][2 * half + v % 2]) * times[pair][v];
                write<float, 4>(y + row * p.columns, c, p.columns, p.wide, to);
            }
        }
    }
}

// N numbers, 1, 2 or a multiple of 4, read by as much as 16 bytes at once.
template <int N> struct Some {
    static constexpr int AT_ONCE = N < 4 ? N : 4;
    float v[N];

    __device__ __forceinline__ void read(int i, const float4 *from, int offset) {
        const Vec<float, AT_ONCE> x = *reinterpret_cast<const Vec<float, AT_ONCE> *>(&from->x + offset);
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) v[i + j] = x.v[j];
    }
};

// partial: (parts, r, columns). A warp takes 32 columns of a band of rows, and 8 rows at a time; a lane has rows t and
// t + 4, columns from 4 g on, and ranks from R / 8 g on. 16 rows of x and h are a stage in shared memory.
template <int R>
__device__ __forceinline__ void outer(const float *x, const float *h, float *partial, const SkinnyParams &p) {
    constexpr int OWN = R / 8, M = (OWN + 1) / 2, ROWS = 16, STAGES = 4;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const uint32_t c0 = (blockIdx.x * (blockDim.x / 32) + warp) * 32;
    const uint64_t start = (uint64_t)blockIdx.y * p.band, end = min(start + p.band, p.rows);
    const bool whole = p.r % 4 == 0;
    // First h for all warps, then x for each.
    extern __shared__ float4 memory[];
    float4(*ranks)[ROWS][R / 4] = reinterpret_cast<float4(*)[ROWS][R / 4]>(memory);
    float4(*tiles)[ROWS][STEP / 4] =
        reinterpret_cast<float4(*)[ROWS][STEP / 4]>(memory + STAGES * ROWS * R / 4) + warp * STAGES;
    // Where vectors of row 4 i + t are exchanged with others.
    auto turned = [](int t) { return R == 64 ? t % 2 + t / 2 * 4 : R == 32 ? 2 * t : R == 16 ? t / 2 * 2 : 0; };
    auto fetch = [&](uint64_t row0, int stage) {
        for (int e = threadIdx.x; e < ROWS * R / 4; e += blockDim.x) {
            const int i = e / (R / 4), vector = e % (R / 4);
            const bool there = row0 + i < end && vector * 4 < p.r;
            copy_four(&ranks[stage][i][vector ^ turned(i % 4)], h + (there ? (row0 + i) * p.r : 0), vector * 4, p.r, there,
                      whole);
        }
        const uint32_t c = c0 + lane % 8 * 4;
#pragma unroll
        for (int i = 0; i < ROWS / 4; i++) {
            const uint64_t row = row0 + 4 * i + lane / 8;
            const bool there = row < end && c < p.columns;
            copy_four(&tiles[stage][4 * i + lane / 8][lane % 8 ^ lane / 8 * 2], x + (there ? row * p.columns : 0), c,
                      p.columns, there, p.wide);
        }
        copy_commit();
    };
    float sums[M][4][4] = {};
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) fetch(start + stage * ROWS, stage);
    int stage = 0;
    for (uint64_t row0 = start; row0 < end; row0 += ROWS, stage = (stage + 1) % STAGES) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        fetch(row0 + (STAGES - 1) * ROWS, (stage + STAGES - 1) % STAGES);
        float few[M][4][4] = {};
#pragma unroll
        for (int i = 0; i < ROWS; i += 8) {
            Parts of_x[4][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float4 v = tiles[stage][i + t + 4 * half][g ^ 2 * t];
#pragma unroll
                for (int n = 0; n < 4; n++) of_x[n][half] = parts((&v.x)[n]);
            }
            Some<OWN> own[2];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < OWN; j += Some<OWN>::AT_ONCE) {
                    const int rank = OWN * g + j;
                    own[half].read(j, &ranks[stage][i + t + 4 * half][rank / 4 ^ turned(t)], rank % 4);
                }
#pragma unroll
            for (int k = 0; k < M; k++) {
                Parts a[4];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    a[2 * half] = parts(own[half].v[2 * k]);
                    a[2 * half + 1] = parts(OWN > 1 ? own[half].v[2 * k + 1] : 0.0f);
                }
#pragma unroll
                for (int n = 0; n < 4; n++) multiply_add(few[k][n], a, of_x[n][0], of_x[n][1]);
            }
        }
#pragma unroll
        for (int k = 0; k < M; k++)
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[k][n][i] += few[k][n][i];
    }
    copy_wait<0>();
    if (c0 >= p.columns) return;
    // Of product n a lane has columns 4 (2 t) + n and 4 (2 t + 1) + n.
#pragma unroll
    for (int k = 0; k < M; k++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t rank = OWN * g + 2 * k + i;
            if (2 * k + i >= OWN || rank >= p.r) continue;
            float *to = partial + ((uint64_t)blockIdx.y * p.r + rank) * p.columns;
#pragma unroll
            for (int side = 0; side < 2; side++) {
                Vec<float, 4> out;
#pragma unroll
                for (int n = 0; n < 4; n++) out.v[n] = sums[k][n][2 * i + side];
                write<float, 4>(to, c0 + 4 * (2 * t + side), p.columns, p.wide, out);
            }
        }
}

#define KERNELS(R)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                               \
        project_f32_##R(const float *x, const float *m, const uint32_t *mask, float *h, SkinnyParams p) {              \
        project<R>(x, m, mask, h, p);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, R <= 32 ? 2 : 1)                                                 \
        expand_f32_##R(const float *h, const float *m, const float *ratio, float *y, SkinnyParams p) {                 \
        expand<R>(h, m, ratio, y, p);                                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                               \
        outer_f32_##R(const float *x, const float *h, float *partial, SkinnyParams p) {                                \
        outer<R>(x, h, partial, p);                                                                                    \
    }

KERNELS(8)
KERNELS(16)
KERNELS(32)
KERNELS(64)
