// Causal attention without tensor cores: for f32, which they would round, and for head sizes that the others do not
// take. The same blocked arithmetic, and the same interfaces, as attention.cu and attention_backward.cu, but without
// their rotation.

#include "attention_plain.cuh"

template <typename T, int D>
__device__ __forceinline__ void packed(const T *qkv, T *out, float *lse, AttentionParams p) {
    const Place at = place_of(blockIdx.x, p.query);
    T *const to = out + at.batch * p.t * p.query * p.dim + at.head * p.dim;
    float *const logs = lse + ((size_t)at.batch * p.query + at.head) * p.t;
    forward<T, D>(packed_head(qkv, at, p), to, (size_t)p.query * p.dim, logs, p.dim, p.scale);
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
        packed<T, D>(qkv, out, lse, p);                                                                                \
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
