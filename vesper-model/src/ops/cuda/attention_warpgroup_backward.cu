// The gradient of causal attention by products of warpgroups, for compute capability 9.0; see attention_backward.cu,
// whose division of the work it is: one writer and one order of additions for every result.
//
// One warp fetches tiles, also those of the block's next piece of work; see attention_warpgroup.cuh.

#include "attention_backward.cuh"
#include "pipeline.cuh"

// What a piece of work owns (two tiles of OWN rows) and the pairs of tiles of STEP rows that it goes through.
template <typename T, int D, int OWN, int STEP, int STAGES> struct BackwardTiles {
    T own[2][2][OWN * D], one[STAGES][STEP * D], two[STAGES][STEP * D];
    float lse[STAGES][STEP], delta[STAGES][STEP];  // of queries
    Barrier own_full[2], own_empty[2], full[STAGES], empty[STAGES];
};

struct BackwardInputs {
    const float *lse, *delta;  // (batch, query, t)
    const float *cos, *sin;    // (positions, D / 2), or null
};

template <typename Tiles, int STAGES> __device__ __forceinline__ void init(Tiles &tiles, int warps, int arrivals) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(&tiles.own_full[i], 1);
            barrier_init(&tiles.own_empty[i], warps);
        }
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&tiles.full[i], arrivals);
            barrier_init(&tiles.empty[i], warps);
        }
        barriers_fence();
    }
    __syncthreads();
}

template <typename T, int D, int BK, int BQ, int STAGES>
__device__ __forceinline__ void fetch_queries(BackwardTiles<T, D, BK, BQ, STAGES> &tiles, const TensorMap *qkv,
                                              const TensorMap *dout, const BackwardInputs &in,
                                              const AttentionParams &p, uint32_t heads) {
    const int lane = threadIdx.x % 32, shared_by = p.query / p.kv, t = p.t;
    Ring<2> own;
    Ring<STAGES> ring;
    for (Pieces pieces(heads, (t + BK - 1) / BK); pieces.next(); own.next()) {
        const int kv = pieces.head % p.kv, batch = pieces.head / p.kv, k0 = pieces.tile * BK;
        const int first = k0 / BQ, blocks = (t + BQ - 1) / BQ - first;  // tiles of queries of a query head
        barrier_wait(&tiles.own_empty[own.stage], own.parity ^ 1);
        Barrier *const full = &tiles.own_full[own.stage];
        if (lane == 0) {
            barrier_expect(full, 2 * BK * D * sizeof(T));
            fetch_panels<T, D, BK>(tiles.own[own.stage][0], qkv, full, p.query + kv, k0, batch);
            fetch_panels<T, D, BK>(tiles.own[own.stage][1], qkv, full, p.query + p.kv + kv, k0, batch);
        }
        for (int j = 0; j < blocks * shared_by; j++, ring.next()) {
            const uint32_t s = ring.stage;
            const int head = kv * shared_by + j / blocks, q0 = (first + j % blocks) * BQ;
            barrier_wait(&tiles.empty[s], ring.parity ^ 1);
            if (lane == 0) {
                barrier_expect(&tiles.full[s], 2 * BQ * D * sizeof(T));
                fetch_panels<T, D, BQ>(tiles.one[s], qkv, &tiles.full[s], head, q0, batch);
                fetch_panels<T, D, BQ>(tiles.two[s], dout, &tiles.full[s], head, q0, batch);
            }
            for (int row = lane; row < BQ; row += 32) {
                const size_t from = ((size_t)batch * p.query + head) * t + q0 + row;
                // Rows past the end get the weight 2^-infinity.
                tiles.lse[s][row] = q0 + row < t ? in.lse[from] : INFINITY;
                tiles.delta[s][row] = q0 + row < t ? in.delta[from] : 0;
            }
            barrier_arrive(&tiles.full[s]);  // every lane
        }
    }
}

// Gradients of k and v. Warpgroups own 64 rows of keys each; scores are transposed (keys x queries).
//     dv = p^T dout     dk = scale (p (dout v^T - delta))^T q
template <typename T, int D, int BK, int BQ, int STAGES>
__device__ __forceinline__ void backward_kv(BackwardTiles<T, D, BK, BQ, STAGES> &tiles, const BackwardInputs &in,
                                            T *dqkv, const AttentionParams &p, uint32_t heads) {
    const int t = p.t, dim = p.dim, shared_by = p.query / p.kv;
    const size_t width = (size_t)(p.query + 2 * p.kv) * dim;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int group = warp / 4 * 64, mine = warp * 16;  // the first rows of my warpgroup and of my warp in the tile
    const float scale = p.scale * LOG2_E;
    float dk[D / 8][4], dv[D / 8][4], s[BQ / 8][4], ds[BQ / 8][4];
    uint32_t w[BQ / 16][4];
    clear(s);
    clear(ds);
    Ring<2> own;
    Ring<STAGES> ring;

    for (Pieces pieces(heads, (t + BK - 1) / BK); pieces.next(); own.next()) {
        const int k0 = pieces.tile * BK, first = k0 / BQ, blocks = (t + BQ - 1) / BQ - first;
        T *const sk = tiles.own[own.stage][0], *const sv = tiles.own[own.stage][1];
        const int steps = blocks * shared_by, key = k0 + mine + g;  // and key + 8
        clear(dk);
        clear(dv);
        barrier_wait(&tiles.own_full[own.stage], own.parity);
        for (int j = 0; j < steps; j++) {
            const int q0 = (first + j % blocks) * BQ, stage = ring.stage;
            const T *const qt = tiles.one[stage], *const dt = tiles.two[stage];
            barrier_wait(&tiles.full[stage], ring.parity);
            products_fence();
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
                multiply<0>(s, along<T, BK>(sk, group, kk), along<T, BQ>(qt, 0, kk), kk > 0, T());
            products_commit();
            products_wait<0>();
            settle(s);
            settle(w);
            if (j > 0) release(&tiles.empty[ring.before()]);  // the products of the step before have ended
            const bool edge = k0 + mine + 15 > q0;  // some key comes after some query
#pragma unroll
            for (int n = 0; n < BQ / 8; n++) {
                const float2 l = *reinterpret_cast<const float2 *>(&tiles.lse[stage][8 * n + 2 * t4]);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    s[n][c] = power_of_two(s[n][c] * scale - (c & 1 ? l.y : l.x));
                    if (edge && key + (c / 2) * 8 > q0 + 8 * n + 2 * t4 + (c & 1)) s[n][c] = 0;
                }
            }
#pragma unroll
            for (int kk = 0; kk < BQ / 16; kk++) as_a<T>(w[kk], s[2 * kk], s[2 * kk + 1]);
            products_fence();
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
                multiply<0>(ds, along<T, BK>(sv, group, kk), along<T, BQ>(dt, 0, kk), kk > 0, T());
            products_commit();
#pragma unroll
            for (int kk = 0; kk < BQ / 16; kk++) multiply<1>(dv, w[kk], across<T, BQ>(dt, kk), 1, T());
            products_commit();
            products_wait<1>();
            settle(ds);
#pragma unroll
            for (int n = 0; n < BQ / 8; n++) {
                const float2 e = *reinterpret_cast<const float2 *>(&tiles.delta[stage][8 * n + 2 * t4]);
#pragma unroll
                for (int c = 0; c < 4; c++) ds[n][c] = s[n][c] * (ds[n][c] - (c & 1 ? e.y : e.x));
            }
            products_wait<0>();
            settle(dv);
            settle(w);
#pragma unroll
            for (int kk = 0; kk < BQ / 16; kk++) as_a<T>(w[kk], ds[2 * kk], ds[2 * kk + 1]);
            products_fence();
#pragma unroll
            for (int kk = 0; kk < BQ / 16; kk++) multiply<1>(dk, w[kk], across<T, BQ>(qt, kk), 1, T());
            products_commit();
            ring.next();
        }
        products_wait<0>();
        settle(dk);
        settle(dv);
        settle(w);
        release(&tiles.empty[ring.before()]);

        meet(warp / 4);  // no product of the warpgroup reads its keys and values any more
        const uint32_t batch = pieces.head / p.kv, kv = pieces.head % p.kv;
        T *const to = dqkv + (size_t)batch * t * width;
        if (in.cos) rotate_back<D>(dk, in.cos, in.sin, k0 + mine, t);
        put_panels<T, D, BK>(sk, mine, dk, p.scale, p.scale);
        put_panels<T, D, BK>(sv, mine, dv, 1.0f, 1.0f);
        store_panels<T, D, BK>(to + (p.query + kv) * dim, sk, mine, k0 + mine, t, width, dim);
        store_panels<T, D, BK>(to + (p.query + p.kv + kv) * dim, sv, mine, k0 + mine, t, width, dim);
        shared_fence();
        release(&tiles.own_empty[own.stage]);
    }
}

template <typename T, int D, int BM, int BN, int STAGES>
__device__ __forceinline__ void fetch_keys(BackwardTiles<T, D, BM, BN, STAGES> &tiles, const TensorMap *qkv,
                                           const TensorMap *dout, const AttentionParams &p, uint32_t heads) {
    Ring<2> own;
    Ring<STAGES> ring;
    for (Pieces pieces(heads, (p.t + BM - 1) / BM); pieces.next(); own.next()) {
        const int head = pieces.head % p.query, batch = pieces.head / p.query, kv = head / (p.query / p.kv);
        const int q0 = pieces.tile * BM, blocks = (min(q0 + BM, (int)p.t) + BN - 1) / BN;
        barrier_wait(&tiles.own_empty[own.stage], own.parity ^ 1);
        Barrier *const own_full = &tiles.own_full[own.stage];
        barrier_expect(own_full, 2 * BM * D * sizeof(T));
        fetch_panels<T, D, BM>(tiles.own[own.stage][0], qkv, own_full, head, q0, batch);
        fetch_panels<T, D, BM>(tiles.own[own.stage][1], dout, own_full, head, q0, batch);
        for (int j = 0; j < blocks; j++, ring.next()) {
            const uint32_t s = ring.stage;
            barrier_wait(&tiles.empty[s], ring.parity ^ 1);
            barrier_expect(&tiles.full[s], 2 * BN * D * sizeof(T));
            fetch_panels<T, D, BN>(tiles.one[s], qkv, &tiles.full[s], p.query + kv, j * BN, batch);
            fetch_panels<T, D, BN>(tiles.two[s], qkv, &tiles.full[s], p.query + p.kv + kv, j * BN, batch);
        }
    }
}

// The gradient of q: dq = scale (p (dout v^T - delta)) k. Warpgroups own 64 rows of queries each.
template <typename T, int D, int BM, int BN, int STAGES>
__device__ __forceinline__ void backward_q(BackwardTiles<T, D, BM, BN, STAGES> &tiles, const BackwardInputs &in,
                                           T *dqkv, const AttentionParams &p, uint32_t heads) {
    const int t = p.t, dim = p.dim;
    const size_t width = (size_t)(p.query + 2 * p.kv) * dim;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int group = warp / 4 * 64, mine = warp * 16;
    const float scale = p.scale * LOG2_E;
    float dq[D / 8][4], s[BN / 8][4], ds[BN / 8][4], l[2], e[2];
    uint32_t da[BN / 16][4];
    clear(s);
    clear(ds);
    Ring<2> own;
    Ring<STAGES> ring;

    for (Pieces pieces(heads, (t + BM - 1) / BM); pieces.next(); own.next()) {
        T *const sq = tiles.own[own.stage][0], *const sd = tiles.own[own.stage][1];
        const int q0 = pieces.tile * BM, row = q0 + mine + g;  // and row + 8
        const int blocks = (min(q0 + BM, t) + BN - 1) / BN;
        clear(dq);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const size_t from = (size_t)pieces.head * t + row + 8 * h;
            l[h] = row + 8 * h < t ? in.lse[from] : INFINITY;
            e[h] = row + 8 * h < t ? in.delta[from] : 0;
        }
        barrier_wait(&tiles.own_full[own.stage], own.parity);
        for (int j = 0; j < blocks; j++) {
            const T *const kt = tiles.one[ring.stage], *const vt = tiles.two[ring.stage];
            const int k0 = j * BN;
            barrier_wait(&tiles.full[ring.stage], ring.parity);
            products_fence();
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
                multiply<0>(s, along<T, BM>(sq, group, kk), along<T, BN>(kt, 0, kk), kk > 0, T());
            products_commit();
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
                multiply<0>(ds, along<T, BM>(sd, group, kk), along<T, BN>(vt, 0, kk), kk > 0, T());
            products_commit();
            products_wait<1>();
            settle(s);
            settle(da);
            if (j > 0) release(&tiles.empty[ring.before()]);  // the products of the step before have ended
            const bool edge = k0 + BN - 1 > q0 + mine;
#pragma unroll
            for (int n = 0; n < BN / 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    s[n][c] = power_of_two(s[n][c] * scale - l[c / 2]);
                    if (edge && k0 + 8 * n + 2 * t4 + (c & 1) > row + (c / 2) * 8) s[n][c] = 0;
                }
            products_wait<0>();
            settle(ds);
#pragma unroll
            for (int n = 0; n < BN / 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) ds[n][c] = s[n][c] * (ds[n][c] - e[c / 2]);
#pragma unroll
            for (int kk = 0; kk < BN / 16; kk++) as_a<T>(da[kk], ds[2 * kk], ds[2 * kk + 1]);
            products_fence();
#pragma unroll
            for (int kk = 0; kk < BN / 16; kk++) multiply<1>(dq, da[kk], across<T, BN>(kt, kk), 1, T());
            products_commit();
            ring.next();
        }
        products_wait<0>();
        settle(dq);
        settle(da);
        release(&tiles.empty[ring.before()]);

        meet(warp / 4);  // no product of the warpgroup reads its queries any more
        const uint32_t batch = pieces.head / p.query, head = pieces.head % p.query;
        T *const to = dqkv + (size_t)batch * t * width + head * dim;
        if (in.cos) rotate_back<D>(dq, in.cos, in.sin, q0 + mine, t);
        put_panels<T, D, BM>(sq, mine, dq, p.scale, p.scale);
        store_panels<T, D, BM>(to, sq, mine, q0 + mine, t, width, dim);
        shared_fence();
        release(&tiles.own_empty[own.stage]);
    }
}

template <typename T, int D, int GROUPS, int BQ, int STAGES>
__device__ __forceinline__ void run_kv(const TensorMap *qkv, const TensorMap *dout, const BackwardInputs &in, T *dqkv,
                                       const AttentionParams &p, uint32_t heads) {
    typedef BackwardTiles<T, D, 64 * GROUPS, BQ, STAGES> Tiles;
    extern __shared__ __align__(1024) unsigned char shared[];
    Tiles &tiles = *reinterpret_cast<Tiles *>(shared);
    init<Tiles, STAGES>(tiles, 4 * GROUPS, 33);
    if (threadIdx.x >= 128 * GROUPS) {
        fewer_registers<24>();
        if (threadIdx.x < 128 * GROUPS + 32) fetch_queries(tiles, qkv, dout, in, p, heads);
    } else {
        more_registers<240>();
        backward_kv(tiles, in, dqkv, p, heads);
    }
}

template <typename T, int D, int GROUPS, int BN, int STAGES>
__device__ __forceinline__ void run_q(const TensorMap *qkv, const TensorMap *dout, const BackwardInputs &in, T *dqkv,
                                      const AttentionParams &p, uint32_t heads) {
    typedef BackwardTiles<T, D, 64 * GROUPS, BN, STAGES> Tiles;
    extern __shared__ __align__(1024) unsigned char shared[];
    Tiles &tiles = *reinterpret_cast<Tiles *>(shared);
    init<Tiles, STAGES>(tiles, 4 * GROUPS, 1);
    if (threadIdx.x >= 128 * GROUPS) {
        fewer_registers<40>();
        if (threadIdx.x == 128 * GROUPS) fetch_keys(tiles, qkv, dout, p, heads);
    } else {
        more_registers<232>();
        backward_q(tiles, in, dqkv, p, heads);
    }
}

#define KERNEL(WHAT, T, D, STEP, STAGES)                                                                               \
    extern "C" __global__ void __launch_bounds__(384, 1) attention_warpgroup_backward_##WHAT##_##T##_##D(              \
        const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap dout, const float *lse,               \
        const float *delta, const float *cos, const float *sin, T *dqkv, AttentionParams p, uint32_t heads) {          \
        run_##WHAT<T, D, 2, STEP, STAGES>(&qkv, &dout, {lse, delta, cos, sin}, dqkv, p, heads);                        \
    }

KERNEL(kv, bf16, 64, 64, 4)
KERNEL(kv, bf16, 128, 64, 3)
KERNEL(kv, f16, 64, 64, 4)
KERNEL(kv, f16, 128, 64, 3)
KERNEL(q, bf16, 64, 128, 2)
KERNEL(q, bf16, 128, 64, 3)
KERNEL(q, f16, 64, 128, 2)
KERNEL(q, f16, 128, 64, 3)

template <int D, int STEP, int STAGES>
constexpr bool FITS = sizeof(BackwardTiles<bf16, D, 128, STEP, STAGES>) ==
                      2 * D * (512 + 2 * STEP * STAGES) + 8 * STEP * STAGES + 16 * STAGES + 32;
static_assert(FITS<64, 64, 4> && FITS<64, 128, 2> && FITS<128, 64, 3>,
              "attention_warpgroup.rs asks for as much shared memory");
