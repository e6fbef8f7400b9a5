// The forward pass of attention by products of warpgroups, for compute capability 9.0, of the packed projection and
// of a cache; see attention_forward.cuh.
//
// As in FlashAttention-3 (Shah et al., arXiv 2407.08608): one warp fetches tiles, also those of the block's next
// piece of work, and the scores of the next tile are computed by the tensor cores while the softmax of this one is
// taken.

#pragma once

#include "pipeline.cuh"

// Tiles in shared memory, of queries, keys and values, and the barriers that say when one is full and when it is free.
template <typename T, int D, int GROUPS, int BN> struct ForwardTiles {
    static constexpr int BM = 64 * GROUPS, STAGES = 2;
    T q[2][BM * D], k[STAGES][BN * D], v[STAGES][BN * D];
    Barrier q_full[2], q_empty[2], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// Where the tiles come from. Keys and values of key head i of sequence b: the heads `.._head` + i of the entries
// `.._batch` + b.
struct Sources {
    const TensorMap *q, *kv;
    int key_head, value_head, key_batch, value_batch;
    int first;  // the position of query 0, which is how many keys are before its own
};

// How many tiles of keys the queries from q0 on see.
template <int BM, int BN> __device__ __forceinline__ int tiles_of_keys(int first, int q0, int t) {
    return (first + min(q0 + BM, t) + BN - 1) / BN;
}

// What one thread does for the block: fetches the tiles of all pieces of work. heads: of all sequences.
template <typename T, int D, int GROUPS, int BN>
__device__ __forceinline__ void fetch(ForwardTiles<T, D, GROUPS, BN> &tiles, const Sources &from,
                                      const AttentionParams &p, uint32_t heads) {
    constexpr int BM = 64 * GROUPS;
    Ring<2> own, ring;
    Pieces pieces(heads, (p.t + BM - 1) / BM);
    while (pieces.next()) {
        const int head = pieces.head % p.query, batch = pieces.head / p.query, kv = head / (p.query / p.kv);
        const int q0 = pieces.tile * BM, blocks = tiles_of_keys<BM, BN>(from.first, q0, p.t);
        barrier_wait(&tiles.q_empty[own.stage], own.parity ^ 1);
        barrier_expect(&tiles.q_full[own.stage], BM * D * sizeof(T));
        fetch_panels<T, D, BM>(tiles.q[own.stage], from.q, &tiles.q_full[own.stage], head, q0, batch);
        own.next();
        for (int j = 0; j < blocks; j++, ring.next()) {
            const uint32_t s = ring.stage;
            barrier_wait(&tiles.k_empty[s], ring.parity ^ 1);
            barrier_expect(&tiles.k_full[s], BN * D * sizeof(T));
            fetch_panels<T, D, BN>(tiles.k[s], from.kv, &tiles.k_full[s], from.key_head + kv, j * BN,
                                   from.key_batch + batch);
            barrier_wait(&tiles.v_empty[s], ring.parity ^ 1);
            barrier_expect(&tiles.v_full[s], BN * D * sizeof(T));
            fetch_panels<T, D, BN>(tiles.v[s], from.kv, &tiles.v_full[s], from.value_head + kv, j * BN,
                                   from.value_batch + batch);
        }
    }
}

// out: (batch, t, query dim); lse, where not null: (batch, query, t), the base-2 logarithm of the sum of exponentials
// of a row. Two warpgroups may take turns: one starts its products while the other takes its softmax, which pays for
// heads of 128.
template <typename T, int D, int GROUPS, int BN>
__device__ __forceinline__ void attend(ForwardTiles<T, D, GROUPS, BN> &tiles, T *out, float *lse,
                                       int first, const AttentionParams &p, uint32_t heads) {
    constexpr int BM = 64 * GROUPS;
    constexpr bool TURNS = D == 128 && GROUPS == 2;
    const int t = p.t, dim = p.dim;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t4 = lane % 4;
    const int group = warp / 4 * 64, mine = warp * 16;  // the first rows of my warpgroup and of my warp in the tile
    const float scale = p.scale * LOG2_E;
    float o[D / 8][4], s[BN / 8][4];
    uint32_t w[BN / 16][4];
    clear(s);
    Ring<2> own, keys, values;

    if (TURNS && warp / 4 == 1) turn_over(0);  // the first turn is the first warpgroup's
    for (Pieces pieces(heads, (t + BM - 1) / BM); pieces.next(); own.next()) {
        const int q0 = pieces.tile * BM, blocks = tiles_of_keys<BM, BN>(first, q0, t);
        T *const sq = tiles.q[own.stage];
        float top[2], sum[2], factor[2];
        top[0] = top[1] = -INFINITY;
        sum[0] = sum[1] = 0;
        clear(o);

        // Starts s = q k^T of the next tile of keys.
        auto scores = [&]() {
            barrier_wait(&tiles.k_full[keys.stage], keys.parity);
            products_fence();
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
                multiply<0>(s, along<T, BM>(sq, group, kk), along<T, BN>(tiles.k[keys.stage], 0, kk), kk > 0, T());
            products_commit();
        };
        // Starts o += w v of the next tile of values.
        auto weighted = [&]() {
            barrier_wait(&tiles.v_full[values.stage], values.parity);
            products_fence();
#pragma unroll
            for (int kk = 0; kk < BN / 16; kk++)
                multiply<1>(o, w[kk], across<T, BN>(tiles.v[values.stage], kk), 1, T());
            products_commit();
        };
        auto scores_end = [&]() {
            settle(s);
            release(&tiles.k_empty[keys.stage]);
            keys.next();
        };
        auto weighted_end = [&]() {
            settle(o);
            settle(w);
            release(&tiles.v_empty[values.stage]);
            values.next();
        };
        // s becomes the weights of tile j; sum, top and factor follow.
        auto softmax = [&](int j) {
            const int k0 = j * BN, row = first + q0 + mine + g;  // and row + 8: their positions
            if (k0 + BN - 1 > first + q0 + mine) {
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++)
                        if (k0 + 8 * n + 2 * t4 + (c & 1) > row + (c / 2) * 8) s[n][c] = -INFINITY;
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {  // the rows g and g + 8
                float high = top[h];
#pragma unroll
                for (int n = 0; n < BN / 8; n++) high = fmaxf(high, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
                high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
                high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
                // Every row sees key 0, so that `high` is finite from the first tile on.
                factor[h] = power_of_two((top[h] - high) * scale);
                top[h] = high;
                sum[h] *= factor[h];
                const float shift = high * scale;
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int c = 2 * h; c < 2 * h + 2; c++) {
                        s[n][c] = power_of_two(s[n][c] * scale - shift);
                        sum[h] += s[n][c];
                    }
            }
        };
        auto pack_weights = [&]() {
#pragma unroll
            for (int kk = 0; kk < BN / 16; kk++) as_a<T>(w[kk], s[2 * kk], s[2 * kk + 1]);
        };

        barrier_wait(&tiles.q_full[own.stage], own.parity);
        scores();
        products_wait<0>();
        scores_end();
        softmax(0);
        pack_weights();
        for (int j = 1; j < blocks; j++) {
            if (TURNS) turn_wait(warp / 4);
            scores();
            weighted();
            if (TURNS) turn_over(1 - warp / 4);
            products_wait<1>();
            scores_end();
            softmax(j);
            products_wait<0>();
            weighted_end();
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) o[n][c] *= factor[c / 2];
            pack_weights();
        }
        weighted();
        float inverse[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[h];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            inverse[h] = 1.0f / total;
            const int row = q0 + mine + g + 8 * h;
            if (lse && t4 == 0 && row < t) lse[(size_t)pieces.head * t + row] = top[h] * scale + log2f(total);
        }
        products_wait<0>();
        weighted_end();

        meet(warp / 4);  // no product of the warpgroup reads its queries any more
        put_panels<T, D, BM>(sq, mine, o, inverse[0], inverse[1]);
        const size_t batch = pieces.head / p.query, head = pieces.head % p.query;
        T *const to = out + (batch * t * p.query + head) * dim;
        store_panels<T, D, BM>(to, sq, mine, q0 + mine, t, (size_t)p.query * dim, dim);
        shared_fence();
        release(&tiles.q_empty[own.stage]);
    }
}

template <typename T, int D, int GROUPS, int BN>
__device__ __forceinline__ void forward(const Sources &from, T *out, float *lse, const AttentionParams &p,
                                        uint32_t heads) {
    extern __shared__ __align__(1024) unsigned char shared[];
    auto &tiles = *reinterpret_cast<ForwardTiles<T, D, GROUPS, BN> *>(shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(&tiles.q_full[i], 1);
            barrier_init(&tiles.q_empty[i], 4 * GROUPS);
            barrier_init(&tiles.k_full[i], 1);
            barrier_init(&tiles.k_empty[i], 4 * GROUPS);
            barrier_init(&tiles.v_full[i], 1);
            barrier_init(&tiles.v_empty[i], 4 * GROUPS);
        }
        barriers_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128 * GROUPS) {
        fewer_registers<40>();
        if (threadIdx.x == 128 * GROUPS) fetch(tiles, from, p, heads);
    } else {
        more_registers<232>();
        attend(tiles, out, lse, from.first, p, heads);
    }
}

template <int D> constexpr bool FITS = sizeof(ForwardTiles<bf16, D, 2, 128>) == 1536 * D + 96;
static_assert(FITS<64> && FITS<128>, "attention_warpgroup.rs asks for as much shared memory");
