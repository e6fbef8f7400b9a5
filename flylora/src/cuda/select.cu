// Which n of some values are the largest, without a copy to the host: a radix selection. Values have keys of 64 bits, by
// size first and among equal ones in a scattered order, so that no two are equal; each of six passes finds the next 11
// bits (10 at the end of each half) of the n-th largest key, and `mark` marks what is not below it. Sums are of whole
// numbers, so that the order of the blocks does not matter.

#include "common.cuh"

constexpr int DIGITS = 2048, THREADS = 256;

struct SelectState {
    uint32_t prefix[2];  // what is known of the key: of the size, of the place
    uint32_t left;       // how many of those that begin like it are wanted
    uint32_t done;       // blocks that have counted in this pass
    uint32_t counts[DIGITS];
};

// Ordered as the numbers are, -0 below 0, and NaN above all.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// As in `largest` of the Rust side, where the smaller number goes first.
__device__ __forceinline__ uint32_t scattered(uint32_t i) { return ~(i * 0x9e3779b1u); }

// `pass` 0 to 2 are those of the size, 3 to 5 those of the place; the state is all 0 at first.
extern "C" __global__ void __launch_bounds__(THREADS) count(const float *values, uint32_t n, uint32_t wanted,
                                                            uint32_t pass, SelectState *state) {
    __shared__ uint32_t counts[DIGITS];
    __shared__ uint32_t above[THREADS];
    __shared__ bool last;
    for (int d = threadIdx.x; d < DIGITS; d += THREADS) counts[d] = 0;
    const uint32_t part = pass % 3, shift = part == 0 ? 21 : part == 1 ? 10 : 0, digits = part == 2 ? 1024 : 2048;
    const uint32_t known = part == 0 ? 0u : part == 1 ? 0xffe00000u : 0xfffffc00u;  // bits of this half that are
    const uint32_t size = state->prefix[0], place = state->prefix[1];
    __syncthreads();
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) {
        const uint32_t key = ordered(values[i]);
        if (pass < 3) {
            if ((key & known) == (size & known)) atomicAdd(&counts[key >> shift & (digits - 1)], 1u);
        } else if (key == size) {
            const uint32_t other = scattered(i);
            if ((other & known) == (place & known)) atomicAdd(&counts[other >> shift & (digits - 1)], 1u);
        }
    }
    __syncthreads();
    for (int d = threadIdx.x; d < DIGITS; d += THREADS)
        if (counts[d]) atomicAdd(&state->counts[d], counts[d]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&state->done, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    // The last block has all counts: it finds the digit. Each thread has some digits, thread 0 the largest ones.
    __threadfence();
    constexpr int OWN = DIGITS / THREADS;
    const int first = DIGITS - OWN * (threadIdx.x + 1);
    volatile uint32_t *all = state->counts;
    uint32_t own = 0;
    for (int d = first; d < first + OWN; d++) own += all[d];
    above[threadIdx.x] = own;
    for (int step = 1; step < THREADS; step *= 2) {
        __syncthreads();
        const uint32_t more = threadIdx.x >= step ? above[threadIdx.x - step] : 0;
        __syncthreads();
        above[threadIdx.x] += more;
    }
    const uint32_t left = pass == 0 ? wanted : state->left;
    uint32_t before = above[threadIdx.x] - own;  // how many have a larger digit
    __syncthreads();
    if (before < left && left <= before + own)
        for (int d = first + OWN - 1; d >= first; d--) {
            const uint32_t here = all[d];
            if (left <= before + here) {
                state->prefix[pass / 3] |= (uint32_t)d << shift;
                state->left = left - before;
                break;
            }
            before += here;
        }
    __syncthreads();
    for (int d = threadIdx.x; d < DIGITS; d += THREADS) state->counts[d] = 0;
    if (threadIdx.x == 0) state->done = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) mark(const float *values, float *mask, uint32_t n,
                                                           const SelectState *state) {
    const uint32_t size = state->prefix[0], place = state->prefix[1];
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) {
        const uint32_t key = ordered(values[i]);
        mask[i] = key > size || (key == size && scattered(i) >= place) ? 1.0f : 0.0f;
    }
}
