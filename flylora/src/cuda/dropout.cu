// Dropout whose random numbers are a function of an element's place, a key and the number of a pass: Philox4x32-10, as in
// dropout.rs. A thread takes four elements, which one call of the generator decides.

#include "common.cuh"

struct DropoutParams {
    uint64_t elements, key, pass;
    uint32_t least;  // the least number that lets an element stay
    float factor;
};
static_assert(sizeof(DropoutParams) == 32, "the Rust side has the same layout");

__device__ __forceinline__ uint4 philox(uint4 c, uint64_t key) {
    uint32_t k0 = key, k1 = key >> 32;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high_a = __umulhi(c.x, 0xd2511f53u), low_a = c.x * 0xd2511f53u;
        const uint32_t high_b = __umulhi(c.z, 0xcd9e8d57u), low_b = c.z * 0xcd9e8d57u;
        c = make_uint4(high_b ^ c.y ^ k0, low_b, high_a ^ c.w ^ k1, low_a);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c;
}

template <typename T> __device__ __forceinline__ void dropout(const T *x, T *y, const DropoutParams &p) {
    const uint64_t fours = (p.elements + 3) / 4, threads = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t four = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; four < fours; four += threads) {
        const uint4 drawn = philox(make_uint4(four, four >> 32, p.pass, p.pass >> 32), p.key);
        const uint32_t bits[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
        // Of a row that is four elements long, or what is left.
        const uint32_t n = min(p.elements - 4 * four, (uint64_t)4);
        Vec<T, 4> v = read<T, 4>(x + 4 * four, 0, n, true);
#pragma unroll
        for (int i = 0; i < 4; i++)
            v.v[i] = from_float<T>(bits[i] < p.least ? 0.0f : to_float(v.v[i]) * p.factor);
        write<T, 4>(y + 4 * four, 0, n, true, v);
    }
}

#define KERNEL(T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) dropout_##T(const T *x, T *y, DropoutParams p) {                 \
        dropout<T>(x, y, p);                                                                                           \
    }

KERNEL(f32)
KERNEL(bf16)
KERNEL(f16)
