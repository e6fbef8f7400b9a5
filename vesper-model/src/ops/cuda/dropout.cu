// Dropout by Philox 4x32-10: element i has word i % 4 of block i / 4, as on the CPU. One thread a block of four words.
//
//     y[i] = x[i] scale where word >= threshold, 0 elsewhere

#include "common.cuh"

struct DropoutParams {
    uint64_t n;
    uint64_t threshold;  // to 2^32
    uint64_t seed;
    uint64_t offset;
    float scale;
    uint32_t unused;
};
static_assert(sizeof(DropoutParams) == 40, "the Rust side has the same layout");

__device__ __forceinline__ uint4 philox(uint64_t block, uint64_t offset, uint64_t seed) {
    uint4 c = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)offset, (uint32_t)(offset >> 32)};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high_a = __umulhi(0xD2511F53u, c.x), low_a = 0xD2511F53u * c.x;
        const uint32_t high_b = __umulhi(0xCD9E8D57u, c.z), low_b = 0xCD9E8D57u * c.z;
        c = {high_b ^ c.y ^ k0, low_b, high_a ^ c.w ^ k1, low_a};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

template <typename T> __device__ void dropout(const T *x, T *y, DropoutParams p) {
    const uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t block = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; block * 4 < p.n; block += step) {
        const uint4 words = philox(block, p.offset, p.seed);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
        if (block * 4 + 4 <= p.n) {
            const Vec<T, 4> a = load<T, 4>(x + block * 4);
            Vec<T, 4> out;
#pragma unroll
            for (int k = 0; k < 4; k++)
                out.v[k] = from_float<T>(word[k] >= p.threshold ? to_float(a.v[k]) * p.scale : 0.0f);
            store<T, 4>(y + block * 4, out);
        } else {
            for (int k = 0; block * 4 + k < p.n; k++)
                y[block * 4 + k] =
                    from_float<T>(word[k] >= p.threshold ? to_float(x[block * 4 + k]) * p.scale : 0.0f);
        }
    }
}

#define KERNEL(T)                                                                                                      \
    extern "C" __global__ void dropout_##T(const T *x, T *y, DropoutParams p) { dropout<T>(x, y, p); }

KERNEL(f32)
KERNEL(bf16)
KERNEL(f16)
