// A frozen layer with its low-rank change as one product, on Hopper; x, W, bias and y bf16, the rest f32:
//
//     h = x P^T                                 (rows, r), or given; 0 for ranks that a row makes no use of
//     y = ratio (x W^T + h Q^T) + bias          (rows, n)
//
// P, Q and h go in as sums of two numbers of bf16 each, so that they keep 16 bits; all sums are in f32, in an order that
// does not depend on the run, and y is rounded once. For that `factors` writes
//
//     F = [P high; P low]                       (2 R, k)
//     E = [Q high, Q high, Q low]               (n, 3 R, filled up to a multiple of 64)
//
// and h Q^T is [h high, h low, h high] E^T: a few more terms of the sum over k.
//
// A block takes 128 rows and 256 columns of y at a time. One thread asks the copy engine for the parts of x, W and F that
// come next; two groups of 128 threads multiply, each for 64 rows.

#include "hopper.cuh"

struct LayerParams {
    uint64_t rows;
    uint32_t n, k;
    uint32_t r;
    uint32_t span;       // parts of 256 columns that a block takes one after the other, with one h
    uint32_t given;      // whether h is there already
    uint32_t chosen;     // how many ranks each row makes use of, 0: all, or those of the mask where there is one
    uint32_t magnitude;  // whether the highest |h| + balance are chosen, or the highest h + balance
    uint32_t unused;
};
static_assert(sizeof(LayerParams) == 40, "the Rust side has the same layout");

struct FactorParams {
    uint64_t p_rank, p_column, q_rank, q_column;  // strides of P and Q
    uint32_t n, k;
    uint32_t r, rounded;  // ranks, and R
    uint32_t wide;        // columns of E
    float scale;          // of Q
    uint32_t given;       // whether there is no P
    uint32_t unused;
};
static_assert(sizeof(FactorParams) == 64, "the Rust side has the same layout");

#ifdef HOPPER

constexpr int DEPTH = 64, ROWS = 128, COLUMNS = 256;
constexpr uint32_t X_BYTES = ROWS * DEPTH * 2, W_BYTES = COLUMNS * DEPTH * 2, BOX_BYTES = 64 * 64 * 2;

// Up to here a thread has registers for the sums of h too; above it h must be given.
constexpr int MOST_OWN = 32;

// Memory: for alignment; the stages, each of x, W and F; 16 rows and 64 columns of y for each warp that multiplies.
template <int R> struct Sizes {
    static constexpr int STAGES = R <= 16 ? 4 : 3, MORE = (3 * R + DEPTH - 1) / DEPTH;
    static constexpr uint32_t F_BYTES = R <= MOST_OWN ? 2 * R * DEPTH * 2 : 0, STAGE = X_BYTES + W_BYTES + F_BYTES;
};

template <bool B> struct Choice {
    static constexpr bool VALUE = B;
};

// TURNED: whether W lies by columns, (k, n), not by rows, (n, k).
template <int R, int TURNED>
__device__ __forceinline__ void layer(const TensorMap &x, const TensorMap &w, const TensorMap &f, const TensorMap &e,
                                      const bf16 *bias, const float *ratio, const float *balance, uint32_t *mask,
                                      uint32_t *counts, float *h, bf16 *y, const LayerParams &p) {
    using S = Sizes<R>;
    constexpr int STAGES = S::STAGES, EIGHTS = R / 8;
    extern __shared__ uint8_t memory[];
    __shared__ alignas(8) uint64_t barriers[2 * STAGES];
    const uint32_t to_align = (1024 - shared_address(memory) % 1024) % 1024;
    const uint32_t stages = shared_address(memory) + to_align;
    const uint32_t full = shared_address(barriers), empty = full + 8 * STAGES;
    const uint32_t across = (p.n + COLUMNS - 1) / COLUMNS, steps = (p.k + DEPTH - 1) / DEPTH;
    const uint32_t down = (uint32_t)((p.rows + ROWS - 1) / ROWS), spans = (across + p.span - 1) / p.span;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, 8);  // warps that multiply
        }
        barriers_done();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<24>();
        if (threadIdx.x > 0) return;
        uint32_t count = 0;
        // Waits until a stage is free, and lets its barrier wait for the bytes.
        auto next = [&](uint32_t bytes) {
            const uint32_t s = count % STAGES;
            if (count >= STAGES) barrier_wait(empty + 8 * s, (count / STAGES - 1) % 2);
            barrier_expect(full + 8 * s, bytes);
            count++;
            return s;
        };
        for (uint32_t unit = blockIdx.x; unit < down * spans; unit += gridDim.x) {
            const int row = unit / spans * ROWS;
            const uint32_t begin = unit % spans * p.span, end = min(begin + p.span, across);
            for (uint32_t part = begin; part < end; part++) {
                const int column = part * COLUMNS;
                const bool with_low = part == begin && !p.given;
                for (uint32_t step = 0; step < steps; step++) {
                    const uint32_t s = next(with_low ? S::STAGE : X_BYTES + W_BYTES);
                    const uint32_t to = stages + s * S::STAGE, barrier = full + 8 * s;
                    const int depth = step * DEPTH;
                    load_box(to, x, barrier, depth, row);
                    if (TURNED) {
#pragma unroll
                        for (int b = 0; b < COLUMNS / 64; b++)
                            load_box(to + X_BYTES + b * BOX_BYTES, w, barrier, column + b * 64, depth);
                    } else {
                        load_box(to + X_BYTES, w, barrier, depth, column);
                    }
                    if (with_low) load_box(to + X_BYTES + W_BYTES, f, barrier, depth, 0);
                }
                for (int step = 0; step < S::MORE; step++) {
                    const uint32_t s = next(W_BYTES);
                    load_box(stages + s * S::STAGE + X_BYTES, e, full + 8 * s, step * DEPTH, column);
                }
            }
        }
    } else {
        take_registers<240>();
        const uint32_t group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
        const uint32_t g = lane / 4, t = lane % 4;
        uint4 *box = reinterpret_cast<uint4 *>(memory + to_align + STAGES * S::STAGE) + warp * 128;
        uint32_t count = 0;  // of the stages so far
        float sums[COLUMNS / 2];
        // h by eight ranks, its halves for rows g and g + 8.
        uint32_t high[EIGHTS][2], rest[EIGHTS][2];
        auto ready = [&] {
            barrier_wait(full + 8 * (count % STAGES), count / STAGES % 2);
            products_begin();
            return stages + count % STAGES * S::STAGE;
        };
        auto release = [&](uint32_t stage) {
            if (lane == 0) barrier_arrive(empty + 8 * (stage % STAGES));
        };
        // Behind the products of a stage: when those of the one before are done, that one is free.
        auto proceed = [&](bool another) {
            products_commit();
            products_wait<1>();
            if (another) release(count - 1);
            count++;
        };
        auto multiply = [&](float (&low)[R], auto with_low) {
            hold(sums);
            if constexpr (decltype(with_low)::VALUE) hold(low);
            for (uint32_t step = 0; step < steps; step++) {
                const uint32_t from = ready();
                const uint64_t of_x = operand<0>(from + group * (X_BYTES / 2));
                const uint64_t of_w = operand<TURNED>(from + X_BYTES), of_f = operand<0>(from + X_BYTES + W_BYTES);
#pragma unroll
                for (int i = 0; i < DEPTH / 16; i++) {
                    const bool adds = step > 0 || i > 0;
                    product<TURNED>(sums, of_x + i * SIXTEEN<0>, of_w + i * SIXTEEN<TURNED>, adds);
                    if constexpr (decltype(with_low)::VALUE)
                        product<0>(low, of_x + i * SIXTEEN<0>, of_f + i * SIXTEEN<0>, adds);
                }
                proceed(step > 0);
            }
        };
        auto multiply_low = [&](bool done) {
#pragma unroll
            for (int step = 0; step < S::MORE; step++) {
                const uint64_t of_e = operand<0>(ready() + X_BYTES);
#pragma unroll
                for (int i = 0; i < DEPTH / 16; i++) {
                    const int at = step * (DEPTH / 8) + 2 * i;
                    uint32_t a[4];
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const int j = at + q / 2;
                        a[q] = j >= 3 * EIGHTS                 ? 0
                               : j >= EIGHTS && j < 2 * EIGHTS ? rest[j % EIGHTS][q % 2]
                                                               : high[j % EIGHTS][q % 2];
                    }
                    if (at < 3 * EIGHTS) product<0>(sums, a, of_e + i * SIXTEEN<0>, true);
                }
                proceed(step > 0 || !done);
            }
        };
        auto finish = [&] {
            products_wait<0>();
            hold(sums);
            release(count - 1);
        };
        for (uint32_t unit = blockIdx.x; unit < down * spans; unit += gridDim.x) {
            const uint64_t row0 = (uint64_t)(unit / spans) * ROWS + warp * 16;
            const uint32_t begin = unit % spans * p.span, end = min(begin + p.span, across);
            // Number i of a lane's share of h.
            auto place = [&](int i, bool &there) {
                const uint64_t row = row0 + g + i % 4 / 2 * 8;
                const uint32_t j = i / 4 * 8 + 2 * t + i % 2;
                there = row < p.rows && j < p.r;
                return h + row * p.r + j;
            };
            // The bits of the ranks that row g + 8 half makes use of, the same in the four lanes that have it.
            auto highest = [&](const float (&whole)[R / 2], int half) {
                uint32_t keys[R / 4], bits = 0;
#pragma unroll
                for (int m = 0; m < R / 4; m++) {
                    const uint32_t j = m / 2 * 8 + 2 * t + m % 2;
                    const float v = whole[4 * (m / 2) + 2 * half + m % 2];
                    keys[m] = j < p.r ? key((p.magnitude ? fabsf(v) : v) + balance[j]) : 0;
                }
                for (uint32_t i = 0; i < p.chosen; i++) {
                    // Of equal scores the first.
                    uint32_t best = 0, at = 0;
#pragma unroll
                    for (int m = 0; m < R / 4; m++) {
                        const uint32_t j = m / 2 * 8 + 2 * t + m % 2;
                        if (keys[m] > best && !(bits >> j & 1)) best = keys[m], at = j;
                    }
#pragma unroll
                    for (int lanes = 1; lanes < 4; lanes *= 2) {
                        const uint32_t theirs = __shfl_xor_sync(0xffffffffu, best, lanes);
                        const uint32_t there = __shfl_xor_sync(0xffffffffu, at, lanes);
                        if (theirs > best || (theirs == best && there < at)) best = theirs, at = there;
                    }
                    bits |= 1u << at;
                }
                return bits;
            };
            // Which ranks rows make use of; the others become 0.
            auto choose = [&](float (&whole)[R / 2], bool first) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint64_t row = row0 + g + 8 * half;
                    uint32_t bits = 0;
                    if (p.chosen > 0) bits = highest(whole, half);
                    else if (row < p.rows) bits = mask[row];
                    if (p.chosen > 0 && first) {
                        if (row >= p.rows) bits = 0;
                        else if (t == 0) mask[row] = bits;
                        uint32_t count = 0;
#pragma unroll
                        for (int i = 0; i < 8; i++) count += __shfl_sync(0xffffffffu, bits, 4 * i) >> lane & 1;
                        if (count > 0) atomicAdd(&counts[lane], count);  // whole numbers: the same sum in any order
                    }
#pragma unroll
                    for (int m = 0; m < R / 4; m++)
                        if (!(bits >> (m / 2 * 8 + 2 * t + m % 2) & 1)) whole[4 * (m / 2) + 2 * half + m % 2] = 0.0f;
                }
            };
            auto keep = [&](const float (&whole)[R / 2]) {
#pragma unroll
                for (int j = 0; j < EIGHTS; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const Split both = split(whole[4 * j + 2 * i], whole[4 * j + 2 * i + 1]);
                        high[j][i] = both.high;
                        rest[j][i] = both.low;
                    }
            };
            if (p.given) {
                float whole[R / 2];
#pragma unroll
                for (int i = 0; i < R / 2; i++) {
                    bool there;
                    const float *from = place(i, there);
                    whole[i] = there ? *from : 0.0f;
                }
                keep(whole);
            }
            for (uint32_t part = begin; part < end; part++) {
                const uint32_t column = part * COLUMNS;
                const bool own = R <= MOST_OWN && part == begin && !p.given;
                if constexpr (R <= MOST_OWN) {
                    if (own) {
                        float low[R], whole[R / 2];
                        multiply(low, Choice<true>());
                        finish();
                        hold(low);
#pragma unroll
                        for (int i = 0; i < R / 2; i++) whole[i] = low[i] + low[i + R / 2];  // with both halves of P
                        if (mask) choose(whole, begin == 0);
#pragma unroll
                        for (int i = 0; i < R / 2; i++) {
                            bool there;
                            float *to = place(i, there);
                            if (there && begin == 0) *to = whole[i];
                        }
                        keep(whole);
                    }
                }
                if (!own) {
                    float none[R];
                    multiply(none, Choice<false>());
                }
                multiply_low(own);
                finish();
                // By way of memory of the warp's own, from which it writes rows of 128 bytes.
#pragma unroll
                for (int b = 0; b < COLUMNS / 64; b++) {
                    __syncwarp();
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        uint32_t out[4];
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const int j = b * 8 + q * 2 + i;
                            const uint32_t c = column + 8 * j + 2 * t;
                            float *v = sums + 4 * j;
                            if ((ratio || bias) && c < p.n) {  // n is even
                                const float2 times = ratio ? make_float2(ratio[c], ratio[c + 1]) : make_float2(1, 1);
                                const float2 plus = bias ? make_float2(to_float(bias[c]), to_float(bias[c + 1]))
                                                         : make_float2(0, 0);
#pragma unroll
                                for (int half = 0; half < 4; half += 2) {
                                    v[half] = fmaf(v[half], times.x, plus.x);
                                    v[half + 1] = fmaf(v[half + 1], times.y, plus.y);
                                }
                            }
#pragma unroll
                            for (int half = 0; half < 2; half++)
                                out[2 * i + half] =
                                    pack(from_float<bf16>(v[2 * half]), from_float<bf16>(v[2 * half + 1]));
                        }
                        // Rows g and g + 8 of eight columns, then of the next eight.
                        const uint32_t row = lane % 16, place = (2 * q + lane / 16) ^ (row % 8);
                        store_matrices(shared_address(box + row * 8 + place), out);
                    }
                    __syncwarp();
#pragma unroll
                    for (int q = 0; q < 4; q++) {
                        const uint32_t i = 4 * q + lane / 8, c = column + b * 64 + lane % 8 * 8;
                        const uint4 out = box[i * 8 + (lane % 8 ^ i % 8)];
                        const bool there = row0 + i < p.rows && c < p.n;
                        if (there) __stcs(reinterpret_cast<uint4 *>(y + (row0 + i) * p.n + c), out);  // x or dy is read again
                    }
                }
            }
        }
    }
}

// F of P, and E of scale Q. A thread has one rank, and one column of each.
extern "C" __global__ void __launch_bounds__(128)
    factors(const float *from_p, const float *from_q, bf16 *f, bf16 *e, FactorParams p) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, j = blockIdx.y, R = p.rounded;
    auto high = [](float v) { return __float2bfloat16_rn(v); };
    auto low = [](float v) { return __float2bfloat16_rn(v - __bfloat162float(__float2bfloat16_rn(v))); };
    if (i < p.k && j < R && !p.given) {
        const float v = j < p.r ? from_p[j * p.p_rank + i * p.p_column] : 0.0f;
        f[(uint64_t)j * p.k + i] = high(v);
        f[(uint64_t)(R + j) * p.k + i] = low(v);
    }
    if (i < p.n) {
        bf16 *to = e + (uint64_t)i * p.wide;
        if (j < R) {
            const float v = j < p.r ? p.scale * from_q[j * p.q_rank + i * p.q_column] : 0.0f;
            to[j] = to[R + j] = high(v);
            to[2 * R + j] = low(v);
        } else if (2 * R + j < p.wide) {
            to[2 * R + j] = high(0.0f);
        }
    }
}

#define LAYER(R, NAME, TURNED)                                                                                         \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                               \
        layer_##NAME##_##R(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,                   \
                           const __grid_constant__ TensorMap f, const __grid_constant__ TensorMap e, const bf16 *bias, \
                           const float *ratio, const float *balance, uint32_t *mask, uint32_t *counts, float *h,       \
                           bf16 *y, LayerParams p) {                                                                   \
        layer<R, TURNED>(x, w, f, e, bias, ratio, balance, mask, counts, h, y, p);                                     \
    }
#define BOTH(R)                                                                                                        \
    LAYER(R, rows, 0)                                                                                                  \
    LAYER(R, columns, 1)

BOTH(8)
BOTH(16)
BOTH(32)
BOTH(64)

#endif
