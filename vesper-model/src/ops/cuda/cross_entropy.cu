// Softmax cross-entropy over rows of logits, with the gradient in their place.
//
//     loss = ln sum exp z - z[target]     entropy = ln sum exp z - sum p z     dz = (p - onehot(target)) * scale
//
// With other terms: q = (1 - smoothing) onehot(target) + smoothing / vocab, lse = ln sum exp z,
//
//     loss = -sum q ln p + z_loss lse^2     dz = (p - q + 2 z_loss lse p) * scale
//
// One block a row: a first pass finds the maximum, the sum of exponentials and the weighted sum together, rescaling
// when the maximum moves; a second one, from the cache, writes the gradient.

#include "common.cuh"

constexpr int THREADS = 512;
constexpr int AHEAD = 2;  // vectors that a thread reads at a time
constexpr float LOWEST = -FLT_MAX;  // a maximum before there is one, from which minus infinity can be told

struct CrossEntropyParams {
    uint32_t vocab;
    uint32_t stride;  // between rows, a multiple of 8
    uint32_t ignore;
    uint32_t gradient;  // whether to write it
    float scale;        // of the gradient
};
static_assert(sizeof(CrossEntropyParams) == 20, "the Rust side has the same layout");

struct CrossEntropyTerms {
    float z_loss;
    float smoothing;
};
static_assert(sizeof(CrossEntropyTerms) == 8, "the Rust side has the same layout");

// Powers of a base: e, or for halves 2, for which there is an instruction. UNIT: ln of the base. Of logits above 1e9, which
// bf16 can hold, top is so far from a multiple of the logit that the powers of 2 overflow, and the loss is not finite.
template <typename T> struct Base {
    static constexpr bool TWO = sizeof(T) == 2;
    static constexpr float UNIT = TWO ? 0.693147181f : 1.0f;

    // The logit that gives the same number with this base.
    static __device__ __forceinline__ float of(float x) { return TWO ? x * 1.44269504f : x; }
    // of(x) - top
    static __device__ __forceinline__ float shifted(float x, float top) { return TWO ? fmaf(x, 1.44269504f, -top) : x - top; }
    static __device__ __forceinline__ float power(float x) {
        if constexpr (TWO) {
            float y;
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
            return y;
        } else {
            return expf(x);
        }
    }
};

// top: the maximum so far, in units of the base; sum: of powers of x - top; weighted: of each times x - top
struct Online {
    float top, sum, weighted;
};

template <typename T> __device__ __forceinline__ void move_top(Online &x, float top) {
    if (x.sum > 0) {
        // Bounded, so that a multiple of it is a number, which the power makes 0.
        const float shift = fmaxf(x.top - top, -1e30f), factor = Base<T>::power(shift);
        x.weighted = (x.weighted + x.sum * shift) * factor;
        x.sum *= factor;
    }
    x.top = top;
}

template <typename T> __device__ __forceinline__ Online merge(Online a, Online b) {
    const float top = fmaxf(a.top, b.top);
    move_top<T>(a, top);
    move_top<T>(b, top);
    return {top, a.sum + b.sum, a.weighted + b.weighted};
}

template <typename T, bool TERMS>
__device__ void rows(T *z, const uint32_t *targets, float *losses, float *entropies, CrossEntropyParams p,
                     CrossEntropyTerms terms) {
    constexpr int V = WIDE<T>;
    using B = Base<T>;
    __shared__ Online parts[THREADS / 32];
    __shared__ Online whole;
    __shared__ float totals[THREADS / 32];
    float total = 0;  // of the logits, less that of the target
    const uint32_t row = blockIdx.x, target = targets[row];
    T *const zr = z + (size_t)row * p.stride;
    if (target == p.ignore) {
        if (p.gradient)
            for (uint32_t i = threadIdx.x; i < p.vocab; i += THREADS) zr[i] = from_float<T>(0);
        if (threadIdx.x == 0) losses[row] = entropies[row] = 0;
        return;
    }
    const float at_target = target < p.vocab ? to_float(zr[target]) : NAN;
    Online mine = {LOWEST, 0, 0};
    const uint32_t vectors = (p.vocab + V - 1) / V;  // the last one may go on behind the row, but not behind its stride
    for (uint32_t i0 = threadIdx.x; i0 < vectors; i0 += THREADS * AHEAD) {
        Vec<T, V> a[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            if (i0 + u * THREADS < vectors) a[u] = load<T, V>(zr + (i0 + u * THREADS) * V);
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const uint32_t i = i0 + u * THREADS;
            if (i >= vectors) break;
            if ((i + 1) * V > p.vocab) {
#pragma unroll
                for (int k = 0; k < V; k++)
                    if (i * V + k >= p.vocab) a[u].v[k] = from_float<T>(-INFINITY);
            }
            float x[V], most = to_float(a[u].v[0]);
#pragma unroll
            for (int k = 0; k < V; k++) x[k] = to_float(a[u].v[k]), most = fmaxf(most, x[k]);
            if constexpr (TERMS)
#pragma unroll
                for (int k = 0; k < V; k++)
                    if (i * V + k < p.vocab) total += x[k] - at_target;
            if (B::of(most) > mine.top) move_top<T>(mine, B::of(most));
            // Of minus infinity the power is 0, and so is what it is multiplied by a number.
#pragma unroll
            for (int k = 0; k < V; k++) {
                const float shifted = B::shifted(x[k], mine.top), e = B::power(shifted);
                mine.sum += e;
                mine.weighted = fmaf(e, fmaxf(shifted, -1e30f), mine.weighted);
            }
        }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        Online other;
        other.top = __shfl_xor_sync(0xffffffffu, mine.top, offset);
        other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, offset);
        other.weighted = __shfl_xor_sync(0xffffffffu, mine.weighted, offset);
        // The same order of the two in both lanes, so that both get the same bits.
        mine = threadIdx.x & offset ? merge<T>(other, mine) : merge<T>(mine, other);
    }
    if constexpr (TERMS) {
        total = warp_sum(total);
        if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = total;
    }
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        Online all = parts[0];
        for (int i = 1; i < THREADS / 32; i++) all = merge<T>(all, parts[i]);
        whole = all;
        const float log_sum = logf(all.sum);
        float loss = log_sum - B::shifted(at_target, all.top) * B::UNIT;
        if constexpr (TERMS) {
            float sum = 0;
            for (int i = 0; i < THREADS / 32; i++) sum += totals[i];
            const float lse = log_sum + all.top * B::UNIT;
            if (terms.smoothing > 0) loss -= terms.smoothing * sum / p.vocab;
            loss += terms.z_loss * lse * lse;
        }
        losses[row] = loss;
        entropies[row] = log_sum - all.weighted / all.sum * B::UNIT;
    }
    __syncthreads();
    if (!p.gradient) return;
    const float top = whole.top;
    float factor = p.scale / whole.sum, even = 0, at_hit = p.scale;
    if constexpr (TERMS) {
        factor *= 1 + 2 * terms.z_loss * (logf(whole.sum) + top * B::UNIT);
        even = p.scale * terms.smoothing / p.vocab;
        at_hit = p.scale * (1 - terms.smoothing);
    }
#pragma unroll AHEAD
    for (uint32_t i = threadIdx.x; i < vectors; i += THREADS) {
        Vec<T, V> a = load<T, V>(zr + i * V);
        float dz[V];
#pragma unroll
        for (int k = 0; k < V; k++) dz[k] = fmaf(B::power(B::shifted(to_float(a.v[k]), top)), factor, -even);
        if (i == target / V)
#pragma unroll
            for (int k = 0; k < V; k++)
                if (k == target % V) dz[k] -= at_hit;
#pragma unroll
        for (int k = 0; k < V; k += 2) put(&a.v[k], dz[k], dz[k + 1]);
        store_once<T, V>(zr + i * V, a);
    }
}

// The mean loss, the mean entropy and the number of rows that count (1 if there is none); one block, in a fixed order.
extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_finish(const float *losses, const float *entropies, const uint32_t *targets, float *mean_loss,
                         float *mean_entropy, float *counted, uint64_t n, uint32_t ignore) {
    __shared__ double sums[3][1024];
    double loss = 0, entropy = 0, count = 0;
    for (uint64_t i = threadIdx.x; i < n; i += 1024) {
        loss += losses[i];
        entropy += entropies[i];
        count += targets[i] != ignore;
    }
    sums[0][threadIdx.x] = loss;
    sums[1][threadIdx.x] = entropy;
    sums[2][threadIdx.x] = count;
    __syncthreads();
    for (int half = 512; half > 0; half /= 2) {
        if (threadIdx.x < half)
            for (int k = 0; k < 3; k++) sums[k][threadIdx.x] += sums[k][threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const double rows = sums[2][0] > 0 ? sums[2][0] : 1;
        *mean_loss = (float)(sums[0][0] / rows);
        *mean_entropy = (float)(sums[1][0] / rows);
        *counted = (float)rows;
    }
}

// out = in * dloss / count, both factors on the device: the host need not wait for them.
template <typename S, typename T>
__device__ void scale(const S *in, T *out, const float *dloss, const float *count, uint64_t n) {
    const float factor = *dloss / *count;
    constexpr int V = 16 / (sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));
    const uint64_t step = (uint64_t)gridDim.x * blockDim.x, vectors = n / V;
    const uint64_t thread = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (uint64_t i = thread; i < vectors; i += step) {
        const Vec<S, V> a = load<S, V>(in + i * V);
        Vec<T, V> b;
#pragma unroll
        for (int k = 0; k < V; k++) b.v[k] = from_float<T>(to_float(a.v[k]) * factor);
        store<T, V>(out + i * V, b);
    }
    for (uint64_t i = vectors * V + thread; i < n; i += step) out[i] = from_float<T>(to_float(in[i]) * factor);
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_rows_##T(                                      \
        T *z, const uint32_t *targets, float *losses, float *entropies, CrossEntropyParams p) {                        \
        rows<T, false>(z, targets, losses, entropies, p, {});                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_terms_##T(                                     \
        T *z, const uint32_t *targets, float *losses, float *entropies, CrossEntropyParams p, CrossEntropyTerms t) {   \
        rows<T, true>(z, targets, losses, entropies, p, t);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void cross_entropy_scale_##T(const T *in, T *out, const float *dloss, const float *count,    \
                                                       uint64_t n) {                                                   \
        scale<T, T>(in, out, dloss, count, n);                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void cross_entropy_scale_f32_##T(const float *in, T *out, const float *dloss,                \
                                                           const float *count, uint64_t n) {                           \
        scale<float, T>(in, out, dloss, count, n);                                                                     \
    }

KERNELS(f32)
KERNELS(bf16)
KERNELS(f16)
