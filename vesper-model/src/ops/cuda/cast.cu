// Weights in another precision: each element is read and written once.
//
//     out = in, rounded to nearest where T has fewer bits

#include "common.cuh"

constexpr uint32_t MANY = 64, UNROLL = 4;

// The weights of a launch. Each has thread blocks of its own, of UNROLL vectors a thread.
struct CastTable {
    const float *from[MANY];
    void *to[MANY];
    uint64_t elements[MANY];
    uint32_t first[MANY + 1];  // thread block of each, and after them their number
    uint32_t weights;
};
static_assert(sizeof(CastTable) == 1800, "the Rust side has the same layout");

// All pointers are aligned to 16 bytes. A thread reads 16 bytes at a time, several times before it writes.
template <typename T> __device__ __forceinline__ void cast(const CastTable &table) {
    constexpr int V = WIDE<float>;
    uint32_t low = 0, high = table.weights;  // the weight is in low .. high
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (table.first[middle] <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    const float *const in = table.from[low];
    T *const out = static_cast<T *>(table.to[low]);
    const uint64_t n = table.elements[low], vectors = n / V;
    const uint64_t start = (uint64_t)(blockIdx.x - table.first[low]) * blockDim.x * UNROLL + threadIdx.x;
    Vec<float, V> a[UNROLL];
#pragma unroll
    for (uint32_t j = 0; j < UNROLL; j++) {
        const uint64_t i = start + j * blockDim.x;
        if (i < vectors) a[j] = load<float, V>(in + i * V);
    }
#pragma unroll
    for (uint32_t j = 0; j < UNROLL; j++) {
        const uint64_t i = start + j * blockDim.x;
        if (i >= vectors) break;
        Vec<T, V> b;
#pragma unroll
        for (int k = 0; k < V; k++) b.v[k] = from_float<T>(a[j].v[k]);
        store<T, V>(out + i * V, b);
    }
    // Elements that fill no vector, by the first thread block of the weight.
    if (blockIdx.x == table.first[low] && threadIdx.x < n % V)
        out[vectors * V + threadIdx.x] = from_float<T>(in[vectors * V + threadIdx.x]);
}

extern "C" __global__ void cast_bf16(const __grid_constant__ CastTable table) { cast<bf16>(table); }
extern "C" __global__ void cast_f16(const __grid_constant__ CastTable table) { cast<f16>(table); }
