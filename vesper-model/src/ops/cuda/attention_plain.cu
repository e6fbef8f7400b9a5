// Causal attention without tensor cores: for f32, which they would round, and for head sizes that the others do not
// take. The same blocked arithmetic, and the same interfaces, as attention.cu and attention_backward.cu, but without
// their rotation.
//
// Tiles of 32 queries x 32 keys, 256 threads: thread (x, y) of 16 x 16 has the queries 2y, 2y+1 and the keys x, x+16
// of the scores. Head sizes up to D (64 or 128), padded with zeros.

#include "attention.cuh"

constexpr int N = 32;
constexpr int THREADS = 256;

// N rows of D numbers, four more than that apart, so that neighbouring rows lie in other banks.
template <int D> struct Tile {
    float row[N][D + 4];
};

// N x N scores.
struct Scores {
    float row[N][N + 1];
};

template <typename T, int D>
__device__ void load_rows(Tile<D> &tile, const T *from, int row0, int t, size_t stride, int dim) {
    for (int i = threadIdx.x; i < N * D; i += THREADS) {
        const int row = i / D, column = i % D;
        const bool valid = row0 + row < t && column < dim;
        tile.row[row][column] = valid ? to_float(from[(size_t)(row0 + row) * stride + column]) : 0;
    }
}

// c[i][j] = row ra + i of a times row rb + 16 j of b
template <int D> __device__ void dots(float c[2][2], const Tile<D> &a, const Tile<D> &b, int ra, int rb) {
    c[0][0] = c[0][1] = c[1][0] = c[1][1] = 0;
#pragma unroll 4
    for (int k = 0; k < D; k += 4) {
        float4 x[2], y[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x[i] = *reinterpret_cast<const float4 *>(&a.row[ra + i][k]);
            y[i] = *reinterpret_cast<const float4 *>(&b.row[rb + 16 * i][k]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                c[i][j] += x[i].x * y[j].x + x[i].y * y[j].y + x[i].z * y[j].z + x[i].w * y[j].w;
    }
}

// Two rows by D / 16 columns a thread: the columns 4 x + 64 n.
template <int D> struct Rows {
    float v[2][D / 64][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < D / 64; n++) v[i][n][0] = v[i][n][1] = v[i][n][2] = v[i][n][3] = 0;
    }

    // Row i += weight[i] * row of the tile
    __device__ void add(const float weight[2], const Tile<D> &tile, int row, int x) {
#pragma unroll
        for (int n = 0; n < D / 64; n++) {
            const float4 y = *reinterpret_cast<const float4 *>(&tile.row[row][4 * x + 64 * n]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                v[i][n][0] += weight[i] * y.x;
                v[i][n][1] += weight[i] * y.y;
                v[i][n][2] += weight[i] * y.z;
                v[i][n][3] += weight[i] * y.w;
            }
        }
    }

    template <typename T>
    __device__ void write(T *to, const float factor[2], int row0, int t, size_t stride, int dim, int x) {
        for (int i = 0; i < 2; i++)
            for (int n = 0; n < D / 64; n++)
                for (int c = 0; c < 4; c++) {
                    const int column = 4 * x + 64 * n + c;
                    if (row0 + i < t && column < dim)
                        to[(size_t)(row0 + i) * stride + column] = from_float<T>(v[i][n][c] * factor[i]);
                }
    }
};

template <typename T, int D> __device__ void forward(const T *qkv, T *out, float *lse, AttentionParams p) {
    extern __shared__ float4 shared[];
    Tile<D> &sq = reinterpret_cast<Tile<D> *>(shared)[0], &sk = reinterpret_cast<Tile<D> *>(shared)[1];
    Tile<D> &sv = reinterpret_cast<Tile<D> *>(shared)[2];
    Scores &sp = *reinterpret_cast<Scores *>(&reinterpret_cast<Tile<D> *>(shared)[3]);
    const int t = p.t, dim = p.dim, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const Place at = place_of(blockIdx.x, p.query);
    const size_t width = (size_t)(p.query + 2 * p.kv) * dim;
    const int kv = at.head / (p.query / p.kv);
    const T *const base = qkv + at.batch * t * width;
    const int q0 = (gridDim.y - 1 - blockIdx.y) * N, last = min(q0 + N, t) - 1;
    const float scale = p.scale * LOG2_E;
    load_rows<T, D>(sq, base + at.head * dim, q0, t, width, dim);
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    Rows<D> o;
    o.clear();
    for (int k0 = 0; k0 <= last; k0 += N) {
        __syncthreads();
        load_rows<T, D>(sk, base + (p.query + kv) * dim, k0, t, width, dim);
        load_rows<T, D>(sv, base + (p.query + p.kv + kv) * dim, k0, t, width, dim);
        __syncthreads();
        float s[2][2];
        dots<D>(s, sq, sk, 2 * y, x);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = q0 + 2 * y + i;
            float high = top[i];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (k0 + x + 16 * j > row) s[i][j] = -INFINITY;
                high = fmaxf(high, s[i][j]);
            }
            for (int offset = 8; offset > 0; offset /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, offset));
            const float factor = exp2f((top[i] - high) * scale);
            top[i] = high;
            sum[i] *= factor;
#pragma unroll
            for (int n = 0; n < D / 64; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) o.v[i][n][c] *= factor;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float weight = exp2f((s[i][j] - high) * scale);
                sum[i] += weight;
                sp.row[2 * y + i][x + 16 * j] = weight;
            }
        }
        __syncwarp();  // a row of scores is written and read by one half of a warp
        for (int k = 0; k < N; k++) {
            const float weight[2] = {sp.row[2 * y][k], sp.row[2 * y + 1][k]};
            o.add(weight, sv, k, x);
        }
    }
    float inverse[2];
    for (int i = 0; i < 2; i++) {
        float total = sum[i];
        for (int offset = 8; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
        inverse[i] = 1.0f / total;
        const int row = q0 + 2 * y + i;
        if (x == 0 && row < t) lse[(at.batch * p.query + at.head) * t + row] = top[i] * scale + log2f(total);
    }
    T *const to = out + at.batch * t * p.query * dim + at.head * dim;
    o.write(to, inverse, q0 + 2 * y, t, (size_t)p.query * dim, dim, x);
}

// The weights of two queries and two keys, and the gradients of their scores without the scale.
struct Weights {
    float p[2][2], ds[2][2];
};

// q, k, v, d: tiles of the queries from q0, the keys from k0, their values, and the gradients of the output.
template <int D>
__device__ Weights weights(const Tile<D> &q, const Tile<D> &k, const Tile<D> &v, const Tile<D> &d, int q0, int k0, int t,
                           const float *lse, const float *delta, float scale) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    Weights w;
    dots<D>(w.p, q, k, 2 * y, x);
    dots<D>(w.ds, d, v, 2 * y, x);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = q0 + 2 * y + i;
        const float l = row < t ? lse[row] : INFINITY, e = row < t ? delta[row] : 0;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            w.p[i][j] = k0 + x + 16 * j > row ? 0 : exp2f(w.p[i][j] * scale - l);
            w.ds[i][j] = w.p[i][j] * (w.ds[i][j] - e);
        }
    }
    return w;
}

template <typename T, int D>
__device__ void backward_kv(const T *qkv, const T *dout, const float *lse, const float *delta, T *dqkv,
                            AttentionParams p) {
    extern __shared__ float4 shared[];
    Tile<D> &sk = reinterpret_cast<Tile<D> *>(shared)[0], &sv = reinterpret_cast<Tile<D> *>(shared)[1];
    Tile<D> &sq = reinterpret_cast<Tile<D> *>(shared)[2], &sd = reinterpret_cast<Tile<D> *>(shared)[3];
    Scores *const scores = reinterpret_cast<Scores *>(&reinterpret_cast<Tile<D> *>(shared)[4]);
    Scores &sp = scores[0], &ss = scores[1];
    const int t = p.t, dim = p.dim, x = threadIdx.x % 16, y = threadIdx.x / 16, group = p.query / p.kv;
    const Place at = place_of(blockIdx.x, p.kv);
    const size_t width = (size_t)(p.query + 2 * p.kv) * dim, wide = (size_t)p.query * dim;
    const T *const base = qkv + at.batch * t * width;
    const int k0 = blockIdx.y * N;
    load_rows<T, D>(sk, base + (p.query + at.head) * dim, k0, t, width, dim);
    load_rows<T, D>(sv, base + (p.query + p.kv + at.head) * dim, k0, t, width, dim);
    Rows<D> dk, dv;
    dk.clear();
    dv.clear();
    for (int head = at.head * group; head < (at.head + 1) * group; head++) {
        const size_t row = (at.batch * p.query + head) * t;
        for (int q0 = k0; q0 < t; q0 += N) {
            __syncthreads();
            load_rows<T, D>(sq, base + head * dim, q0, t, width, dim);
            load_rows<T, D>(sd, dout + at.batch * t * wide + head * dim, q0, t, wide, dim);
            __syncthreads();
            const Weights w =
                weights<D>(sq, sk, sv, sd, q0, k0, t, lse + row, delta + row, p.scale * LOG2_E);
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    sp.row[2 * y + i][x + 16 * j] = w.p[i][j];
                    ss.row[2 * y + i][x + 16 * j] = w.ds[i][j];
                }
            __syncthreads();
            // From here on a thread has the keys 2y, 2y+1.
            for (int q = 0; q < N; q++) {
                const float pw[2] = {sp.row[q][2 * y], sp.row[q][2 * y + 1]};
                const float dw[2] = {ss.row[q][2 * y], ss.row[q][2 * y + 1]};
                dv.add(pw, sd, q, x);
                dk.add(dw, sq, q, x);
            }
        }
    }
    T *const to = dqkv + at.batch * t * width;
    const float scaled[2] = {p.scale, p.scale}, plain[2] = {1, 1};
    dk.write(to + (p.query + at.head) * dim, scaled, k0 + 2 * y, t, width, dim, x);
    dv.write(to + (p.query + p.kv + at.head) * dim, plain, k0 + 2 * y, t, width, dim, x);
}

template <typename T, int D>
__device__ void backward_q(const T *qkv, const T *dout, const float *lse, const float *delta, T *dqkv,
                           AttentionParams p) {
    extern __shared__ float4 shared[];
    Tile<D> &sk = reinterpret_cast<Tile<D> *>(shared)[0], &sv = reinterpret_cast<Tile<D> *>(shared)[1];
    Tile<D> &sq = reinterpret_cast<Tile<D> *>(shared)[2], &sd = reinterpret_cast<Tile<D> *>(shared)[3];
    Scores &ss = *reinterpret_cast<Scores *>(&reinterpret_cast<Tile<D> *>(shared)[4]);
    const int t = p.t, dim = p.dim, x = threadIdx.x % 16, y = threadIdx.x / 16;
    const Place at = place_of(blockIdx.x, p.query);
    const size_t width = (size_t)(p.query + 2 * p.kv) * dim, wide = (size_t)p.query * dim;
    const size_t row = (at.batch * p.query + at.head) * t;
    const int kv = at.head / (p.query / p.kv);
    const T *const base = qkv + at.batch * t * width;
    const int q0 = (gridDim.y - 1 - blockIdx.y) * N, last = min(q0 + N, t) - 1;
    load_rows<T, D>(sq, base + at.head * dim, q0, t, width, dim);
    load_rows<T, D>(sd, dout + at.batch * t * wide + at.head * dim, q0, t, wide, dim);
    Rows<D> dq;
    dq.clear();
    for (int k0 = 0; k0 <= last; k0 += N) {
        __syncthreads();
        load_rows<T, D>(sk, base + (p.query + kv) * dim, k0, t, width, dim);
        load_rows<T, D>(sv, base + (p.query + p.kv + kv) * dim, k0, t, width, dim);
        __syncthreads();
        const Weights w = weights<D>(sq, sk, sv, sd, q0, k0, t, lse + row, delta + row, p.scale * LOG2_E);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) ss.row[2 * y + i][x + 16 * j] = w.ds[i][j];
        __syncwarp();
        for (int k = 0; k < N; k++) {
            const float weight[2] = {ss.row[2 * y][k], ss.row[2 * y + 1][k]};
            dq.add(weight, sk, k, x);
        }
        __syncwarp();
    }
    const float scaled[2] = {p.scale, p.scale};
    dq.write(dqkv + at.batch * t * width + at.head * dim, scaled, q0 + 2 * y, t, width, dim, x);
}

// See attention_backward.cu. One warp a row of a head.
template <typename T> __device__ void row_dots(const T *out, const T *dout, float *delta, uint64_t n, AttentionParams p) {
    const uint64_t i = (uint64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;  // (batch, t, head)
    if (i >= n) return;
    const T *const a = out + i * p.dim, *const b = dout + i * p.dim;
    float sum = 0;
    for (uint32_t c = threadIdx.x % 32; c < p.dim; c += 32) sum += to_float(a[c]) * to_float(b[c]);
    sum = warp_sum(sum);
    const uint64_t row = i / p.query, head = i % p.query, batch = row / p.t;
    if (threadIdx.x % 32 == 0) delta[(batch * p.query + head) * p.t + row % p.t] = sum;
}

// Shared memory in bytes, of tiles of 128 (D + 4) and scores of 4224: three tiles and one of scores in the forward,
// four and two in the gradients of k and v, four and one in that of q.
#define KERNELS(T, D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        attention_plain_forward_##T##_##D(const T *qkv, T *out, float *lse, AttentionParams p) {                       \
        forward<T, D>(qkv, out, lse, p);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_plain_backward_kv_##T##_##D(                       \
        const T *qkv, const T *dout, const float *lse, const float *delta, const float *, const float *, T *dqkv,      \
        AttentionParams p) {                                                                                           \
        backward_kv<T, D>(qkv, dout, lse, delta, dqkv, p);                                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_plain_backward_q_##T##_##D(                        \
        const T *qkv, const T *dout, const float *lse, const float *delta, const float *, const float *, T *dqkv,      \
        AttentionParams p) {                                                                                           \
        backward_q<T, D>(qkv, dout, lse, delta, dqkv, p);                                                              \
    }                                                                                                                  \
    extern "C" __global__ void attention_plain_row_dots_##T##_##D(const T *out, const T *dout, float *delta,           \
                                                                  uint64_t n, AttentionParams p) {                     \
        row_dots<T>(out, dout, delta, n, p);                                                                           \
    }

KERNELS(f32, 64)
KERNELS(f32, 128)
KERNELS(bf16, 64)
KERNELS(bf16, 128)
KERNELS(f16, 64)
KERNELS(f16, 128)
