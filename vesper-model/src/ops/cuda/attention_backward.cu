// The gradient of causal attention, from the saved log-sum-exp of each row; the scores are computed again.
//
// One kernel gives the gradients of k and v, whose blocks own rows of keys, and one that of q, whose blocks own rows of
// queries: every result has one writer and one order of additions (no atomics), so the same bits each time.

#include "attention_backward.cuh"

// delta[batch, head, i] = sum over the head's columns of dout out. D / 8 lanes a row of a head.
template <typename T, int D>
__device__ void row_dots(const T *out, const T *dout, float *delta, uint64_t n, AttentionParams p) {
    constexpr int LANES = D / 8;
    const uint64_t i = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;  // (batch, t, head)
    const uint32_t column = threadIdx.x % LANES * 8;
    float sum = 0;
    if (i < n && column < p.dim) {
        const Vec<T, 8> a = load<T, 8>(out + i * p.dim + column), b = load<T, 8>(dout + i * p.dim + column);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += to_float(a.v[k]) * to_float(b.v[k]);
    }
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (i < n && column == 0) {
        const uint64_t row = i / p.query, head = i % p.query, batch = row / p.t;
        delta[(batch * p.query + head) * p.t + row % p.t] = sum;
    }
}

// Gradients of k and v. Warps own MT * 16 rows of keys each; scores are transposed (keys x queries), so that the
// products over queries take them from registers.
//     dv = p^T dout     dk = scale (p (dout v^T - delta))^T q
// cos, sin: where not null, dk is rotated back.
template <typename T, int D, int MT, int WARPS, int BQ>
__device__ void backward_kv(const T *qkv, const T *dout, const float *lse, const float *delta, const float *cos,
                            const float *sin, T *dqkv, AttentionParams p) {
    constexpr int BK = 16 * MT * WARPS, THREADS = 32 * WARPS;
    extern __shared__ uint4 shared[];
    T *const sk = reinterpret_cast<T *>(shared), *const sv = sk + BK * D, *const sq = sv + BK * D;
    T *const sd = sq + 2 * BQ * D;
    float *const sl = reinterpret_cast<float *>(sd + 2 * BQ * D), *const se = sl + 2 * BQ;
    const int t = p.t, dim = p.dim, group = p.query / p.kv;
    const Place at = place_of(blockIdx.x, p.kv);
    const size_t width = (size_t)(p.query + 2 * p.kv) * dim, wide = (size_t)p.query * dim;
    const T *const base = qkv + at.batch * t * width;
    const T *const dbase = dout + at.batch * t * wide;
    const int k0 = blockIdx.y * BK;  // the first keys are seen by the most queries: they start first
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int mine = warp * 16 * MT;
    const int first = k0 / BQ, blocks = (t + BQ - 1) / BQ - first, steps = blocks * group;

    load_tile<T, D, BK, THREADS>(sk, base + (p.query + at.head) * dim, k0, t, width, dim);
    load_tile<T, D, BK, THREADS>(sv, base + (p.query + p.kv + at.head) * dim, k0, t, width, dim);

    // Starts to load step i: the tile of queries first + i % blocks of head i / blocks of the group.
    auto start = [&](int i) {
        const int head = at.head * group + i / blocks, q0 = (first + i % blocks) * BQ, stage = i & 1;
        load_tile<T, D, BQ, THREADS>(sq + stage * BQ * D, base + head * dim, q0, t, width, dim);
        load_tile<T, D, BQ, THREADS>(sd + stage * BQ * D, dbase + head * dim, q0, t, wide, dim);
        if (threadIdx.x < BQ) {
            const int row = q0 + threadIdx.x;
            const size_t from = (at.batch * p.query + head) * t + row;
            // Rows past the end get the weight 2^-infinity.
            sl[stage * BQ + threadIdx.x] = row < t ? lse[from] : INFINITY;
            se[stage * BQ + threadIdx.x] = row < t ? delta[from] : 0;
        }
        copy_commit();
    };
    start(0);

    float dk[MT][D / 8][4], dv[MT][D / 8][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) dk[m][n][c] = dv[m][n][c] = 0;
    const float scale = p.scale * LOG2_E;

    for (int i = 0; i < steps; i++) {
        if (i + 1 < steps) {
            start(i + 1);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        const int q0 = (first + i % blocks) * BQ, stage = i & 1;
        const T *const qt = sq + stage * BQ * D, *const dt = sd + stage * BQ * D;
        const float *const lt = sl + stage * BQ, *const et = se + stage * BQ;
        if (q0 + BQ - 1 >= k0 + mine) {  // the last query of the tile sees my first key
            float s[MT][BQ / 8][4], ds[MT][BQ / 8][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < BQ / 8; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++) s[m][n][c] = ds[m][n][c] = 0;
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) {
                uint32_t ka[MT][4], va[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    load_a<T, D>(ka[m], sk, mine + 16 * m, kk);
                    load_a<T, D>(va[m], sv, mine + 16 * m, kk);
                }
#pragma unroll
                for (int n = 0; n < BQ / 16; n++) {
                    uint32_t b[4];
                    load_bt<T, D>(b, qt, n, kk);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply_add<T>(s[m][2 * n], ka[m], b);
                        multiply_add<T>(s[m][2 * n + 1], ka[m], b + 2);
                    }
                    load_bt<T, D>(b, dt, n, kk);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply_add<T>(ds[m][2 * n], va[m], b);
                        multiply_add<T>(ds[m][2 * n + 1], va[m], b + 2);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < BQ / 8; n++) {
                const float2 l = *reinterpret_cast<const float2 *>(lt + 8 * n + 2 * t4);
                const float2 e = *reinterpret_cast<const float2 *>(et + 8 * n + 2 * t4);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const int key = k0 + mine + 16 * m + g;
                    const bool edge = k0 + mine + 16 * m + 15 > q0;  // some key comes after some query
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const int column = 8 * n + 2 * t4 + (c & 1);
                        float weight = power_of_two(s[m][n][c] * scale - (c & 1 ? l.y : l.x));
                        if (edge && key + (c / 2) * 8 > q0 + column) weight = 0;
                        s[m][n][c] = weight;
                        ds[m][n][c] = weight * (ds[m][n][c] - (c & 1 ? e.y : e.x));
                    }
                }
            }
#pragma unroll
            for (int kk = 0; kk < BQ / 16; kk++) {
                uint32_t pa[MT][4], da[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    as_a<T>(pa[m], s[m][2 * kk], s[m][2 * kk + 1]);
                    as_a<T>(da[m], ds[m][2 * kk], ds[m][2 * kk + 1]);
                }
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    uint32_t b[4];
                    load_b<T, D>(b, dt, kk, n);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply_add<T>(dv[m][2 * n], pa[m], b);
                        multiply_add<T>(dv[m][2 * n + 1], pa[m], b + 2);
                    }
                    load_b<T, D>(b, qt, kk, n);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply_add<T>(dk[m][2 * n], da[m], b);
                        multiply_add<T>(dk[m][2 * n + 1], da[m], b + 2);
                    }
                }
            }
        }
        __syncthreads();
    }

    T *const to = dqkv + at.batch * t * width;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int row = mine + 16 * m;
        if (cos) rotate_back<D>(dk[m], cos, sin, k0 + row, t);
        put_rows<T, D>(sk, row, dk[m], p.scale, p.scale);
        put_rows<T, D>(sv, row, dv[m], 1.0f, 1.0f);
        store_rows<T, D>(to + (p.query + at.head) * dim, sk, row, k0 + row, t, width, dim);
        store_rows<T, D>(to + (p.query + p.kv + at.head) * dim, sv, row, k0 + row, t, width, dim);
    }
}

// The gradient of q: dq = scale (p (dout v^T - delta)) k. Warps own MT * 16 rows of queries each. cos, sin: where not
// null, dq is rotated back.
template <typename T, int D, int MT, int WARPS, int BN>
__device__ void backward_q(const T *qkv, const T *dout, const float *lse, const float *delta, const float *cos,
                           const float *sin, T *dqkv, AttentionParams p) {
    constexpr int BM = 16 * MT * WARPS, THREADS = 32 * WARPS;
    extern __shared__ uint4 shared[];
    T *const sq = reinterpret_cast<T *>(shared), *const sd = sq + BM * D, *const sk = sd + BM * D;
    T *const sv = sk + 2 * BN * D;
    const int t = p.t, dim = p.dim;
    const Place at = place_of(blockIdx.x, p.query);
    const size_t width = (size_t)(p.query + 2 * p.kv) * dim, wide = (size_t)p.query * dim;
    const int kv = at.head / (p.query / p.kv);
    const T *const base = qkv + at.batch * t * width;
    const T *const k = base + (p.query + kv) * dim, *const v = base + (p.query + p.kv + kv) * dim;
    const int q0 = (gridDim.y - 1 - blockIdx.y) * BM;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int mine = warp * 16 * MT;
    const int blocks = (min(q0 + BM, t) + BN - 1) / BN;

    load_tile<T, D, BM, THREADS>(sq, base + at.head * dim, q0, t, width, dim);
    load_tile<T, D, BM, THREADS>(sd, dout + at.batch * t * wide + at.head * dim, q0, t, wide, dim);
    load_tile<T, D, BN, THREADS>(sk, k, 0, t, width, dim);
    load_tile<T, D, BN, THREADS>(sv, v, 0, t, width, dim);
    copy_commit();

    // Queries and gradients stay in registers where there are enough of them.
    constexpr bool KEPT = MT * D + BN <= 192;
    uint32_t qa[MT][KEPT ? D / 16 : 1][4], da[MT][KEPT ? D / 16 : 1][4];
    float dq[MT][D / 8][4], l[MT][2], e[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < D / 8; n++) dq[m][n][0] = dq[m][n][1] = dq[m][n][2] = dq[m][n][3] = 0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = q0 + mine + 16 * m + g + 8 * h;
            const size_t from = (at.batch * p.query + at.head) * t + row;
            l[m][h] = row < t ? lse[from] : INFINITY;
            e[m][h] = row < t ? delta[from] : 0;
        }
    }
    const float scale = p.scale * LOG2_E;

    for (int j = 0; j < blocks; j++) {
        if (j + 1 < blocks) {
            const int next = (j + 1) & 1;
            load_tile<T, D, BN, THREADS>(sk + next * BN * D, k, (j + 1) * BN, t, width, dim);
            load_tile<T, D, BN, THREADS>(sv + next * BN * D, v, (j + 1) * BN, t, width, dim);
            copy_commit();
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        if (KEPT && j == 0) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int kk = 0; kk < D / 16; kk++) {
                    load_a<T, D>(qa[m][kk], sq, mine + 16 * m, kk);
                    load_a<T, D>(da[m][kk], sd, mine + 16 * m, kk);
                }
        }
        const T *const kt = sk + (j & 1) * BN * D, *const vt = sv + (j & 1) * BN * D;
        const int k0 = j * BN;
        if (k0 <= q0 + mine + 16 * MT - 1) {
            float s[MT][BN / 8][4], ds[MT][BN / 8][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++) s[m][n][c] = ds[m][n][c] = 0;
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++) {
                const int own = KEPT ? kk : 0;
                if (!KEPT) {
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        load_a<T, D>(qa[m][0], sq, mine + 16 * m, kk);
                        load_a<T, D>(da[m][0], sd, mine + 16 * m, kk);
                    }
                }
#pragma unroll
                for (int n = 0; n < BN / 16; n++) {
                    uint32_t b[4];
                    load_bt<T, D>(b, kt, n, kk);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply_add<T>(s[m][2 * n], qa[m][own], b);
                        multiply_add<T>(s[m][2 * n + 1], qa[m][own], b + 2);
                    }
                    load_bt<T, D>(b, vt, n, kk);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply_add<T>(ds[m][2 * n], da[m][own], b);
                        multiply_add<T>(ds[m][2 * n + 1], da[m][own], b + 2);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const int row = q0 + mine + 16 * m + g;
                const bool edge = k0 + BN - 1 > q0 + mine + 16 * m;
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        float weight = power_of_two(s[m][n][c] * scale - l[m][c / 2]);
                        if (edge && k0 + 8 * n + 2 * t4 + (c & 1) > row + (c / 2) * 8) weight = 0;
                        ds[m][n][c] = weight * (ds[m][n][c] - e[m][c / 2]);
                    }
            }
#pragma unroll
            for (int kk = 0; kk < BN / 16; kk++) {
                uint32_t a[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++) as_a<T>(a[m], ds[m][2 * kk], ds[m][2 * kk + 1]);
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    uint32_t b[4];
                    load_b<T, D>(b, kt, kk, n);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        multiply_add<T>(dq[m][2 * n], a[m], b);
                        multiply_add<T>(dq[m][2 * n + 1], a[m], b + 2);
                    }
                }
            }
        }
        __syncthreads();
    }

    T *const to = dqkv + at.batch * t * width + at.head * dim;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        if (cos) rotate_back<D>(dq[m], cos, sin, q0 + mine + 16 * m, t);
        put_rows<T, D>(sq, mine + 16 * m, dq[m], p.scale, p.scale);
        store_rows<T, D>(to, sq, mine + 16 * m, q0 + mine + 16 * m, t, width, dim);
    }
}

// The tiles are those of `KERNELS` in attention.rs, shared memory in bytes:
//   backward_kv 2 D (2 BK + 4 BQ) + 16 BQ
//   backward_q  2 D (2 BM + 4 BN)
#define KERNELS(T, D, MTK, BQ, LIMIT, MTQ, BN)                                                                         \
    extern "C" __global__ void __launch_bounds__(128, LIMIT) attention_backward_kv_##T##_##D(                          \
        const T *qkv, const T *dout, const float *lse, const float *delta, const float *cos, const float *sin,         \
        T *dqkv, AttentionParams p) {                                                                                  \
        backward_kv<T, D, MTK, 4, BQ>(qkv, dout, lse, delta, cos, sin, dqkv, p);                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) attention_backward_q_##T##_##D(                                  \
        const T *qkv, const T *dout, const float *lse, const float *delta, const float *cos, const float *sin,         \
        T *dqkv, AttentionParams p) {                                                                                  \
        backward_q<T, D, MTQ, 4, BN>(qkv, dout, lse, delta, cos, sin, dqkv, p);                                        \
    }                                                                                                                  \
    extern "C" __global__ void attention_row_dots_##T##_##D(const T *out, const T *dout, float *delta, uint64_t n,     \
                                                            AttentionParams p) {                                       \
        row_dots<T, D>(out, dout, delta, n, p);                                                                        \
    }

KERNELS(bf16, 64, 1, 64, 3, 2, 64)
KERNELS(bf16, 128, 1, 64, 1, 2, 32)
KERNELS(f16, 64, 1, 64, 3, 2, 64)
KERNELS(f16, 128, 1, 64, 1, 2, 32)
