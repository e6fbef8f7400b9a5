// What an orthogonalised update does beside its matrix products, which are cuBLAS's.
//
// The matrices of one shape lie behind each other in a workspace of bf16, each as its parameter does: row by row. The
// products take tall ones as transposed, so nothing is ever transposed here.
#include "update.cuh"

// What is known of a row of an orthogonalised matrix.
struct Row {
    // Its share of the squared norm of the update, after the scale.
    double share;
    float scale;
    uint32_t pad;
};
static_assert(sizeof(Row) == 16, "as in layout.rs");

constexpr float NORM_EPS = 1e-7f;
constexpr double ROW_EPS = 1e-8;

// Elements of a workspace that Table::at counts.
constexpr uint64_t UNIT = 64;

// Takes gradients into the momentum and writes what is to be orthogonalised, with the sum of squares of each chunk.
template <typename G>
__device__ __forceinline__ void direction(const Table &table, const Control *control, const Param *params,
                                          const Coefficients *coefficients, bf16 *workspace, double *partials) {
    if (!control->apply) return;
    constexpr int W = 8;
    const uint32_t entry = entry_of(table, blockIdx.x);
    const uint32_t tensor = table.tensor[entry], block = blockIdx.x - table.first[entry];
    const Param &param = params[tensor];
    const Coefficients c = coefficients[tensor];
    const uint64_t start = static_cast<uint64_t>(block) * CHUNK;
    const int len = static_cast<int>(min(static_cast<uint64_t>(CHUNK), param.elements - start));
    const G *g = reinterpret_cast<const G *>(table.g[entry]) + start;
    float *m = reinterpret_cast<float *>(param.state[0]) + start;
    bf16 *x = workspace + table.at[entry] * UNIT + start;
    double sum[1] = {0.0};
    const auto element = [&](float g, float &m) {
        g = g * c.clip;
        m = m + (g - m) * c.first_weight;
        const bf16 u = __float2bfloat16_rn((c.options & NESTEROV) ? g + (m - g) * c.past : m);
        const float rounded = __bfloat162float(u);
        sum[0] += static_cast<double>(rounded) * static_cast<double>(rounded);
        return u;
    };
    const int vectors = is_aligned(g) && is_aligned(m) ? len / W : 0;
    for (int v = threadIdx.x; v < vectors; v += THREADS) {
        Run<G, W> gv;
        Run<float, W> mv;
        Run<bf16, W> xv;
        gv.load(g + v * W);
        mv.load(m + v * W);
#pragma unroll
        for (int k = 0; k < W; ++k) xv.v[k] = element(to_float(gv.v[k]), mv.v[k]);
        mv.store(m + v * W);
        xv.store(x + v * W);
    }
    for (int i = vectors * W + threadIdx.x; i < len; i += THREADS) {
        float momentum = m[i];
        x[i] = element(to_float(g[i]), momentum);
        m[i] = momentum;
    }
    block_sum(sum);
    if (threadIdx.x == 0) partials[param.chunk + block] = sum[0];
}

#define DIRECTION(G)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        direction_##G(const __grid_constant__ Table table, const Control *control, const Param *params,                \
                      const Coefficients *coefficients, bf16 *workspace, double *partials) {                           \
        direction<G>(table, control, params, coefficients, workspace, partials);                                       \
    }

DIRECTION(f32)
DIRECTION(bf16)
DIRECTION(f16)

// Divides each matrix by its Frobenius norm; sums are of the squares.
extern "C" __global__ void __launch_bounds__(THREADS)
    normalise(const __grid_constant__ Table table, const Control *control, const Param *params, const double *sums,
              bf16 *workspace) {
    if (!control->apply) return;
    constexpr int W = 8;
    const uint32_t entry = entry_of(table, blockIdx.x);
    const uint32_t tensor = table.tensor[entry];
    const uint64_t start = static_cast<uint64_t>(blockIdx.x - table.first[entry]) * CHUNK;
    const int len = static_cast<int>(min(static_cast<uint64_t>(CHUNK), params[tensor].elements - start));
    bf16 *x = workspace + table.at[entry] * UNIT + start;
    const float norm = static_cast<float>(sqrt(sums[tensor])) + NORM_EPS;
    const int vectors = len / W; // matrices begin at multiples of 128 bytes
    for (int v = threadIdx.x; v < vectors; v += THREADS) {
        Run<bf16, W> xv;
        xv.load(x + v * W);
#pragma unroll
        for (int k = 0; k < W; ++k) xv.v[k] = __float2bfloat16_rn(to_float(xv.v[k]) / norm);
        xv.store(x + v * W);
    }
    for (int i = vectors * W + threadIdx.x; i < len; i += THREADS) x[i] = __float2bfloat16_rn(to_float(x[i]) / norm);
}

// y = b * x + a * identity for square matrices of side m that begin `stride` elements after each other; a matrix each
// blockIdx.y.
extern "C" __global__ void __launch_bounds__(THREADS)
    mix(const bf16 *x, bf16 *y, uint32_t m, uint64_t stride, float a, float b) {
    constexpr int W = 8;
    x += blockIdx.y * stride;
    y += blockIdx.y * stride;
    const uint64_t len = static_cast<uint64_t>(m) * m, step = static_cast<uint64_t>(gridDim.x) * THREADS;
    const uint64_t vectors = len / W; // the stride is a multiple of 64
    const uint64_t first = static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x;
    const uint64_t diagonal = static_cast<uint64_t>(m) + 1; // from one of its elements to the next
    for (uint64_t v = first; v < vectors; v += step) {
        uint64_t next = (v * W + m) / diagonal * diagonal;
        Run<bf16, W> run;
        run.load(x + v * W);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            float mixed = b * to_float(run.v[k]);
            if (v * W + k == next) {
                mixed += a;
                next += diagonal;
            }
            run.v[k] = __float2bfloat16_rn(mixed);
        }
        run.store(y + v * W);
    }
    for (uint64_t i = vectors * W + first; i < len; i += step) {
        y[i] = __float2bfloat16_rn(b * to_float(x[i]) + (i % diagonal == 0 ? a : 0.0f));
    }
}

// The second moment of each row and the scale that it gives the row: a warp a row, 8 rows a block.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_moments(const __grid_constant__ Table table, const Control *control, const Param *params,
                const Coefficients *coefficients, const bf16 *workspace) {
    if (!control->apply) return;
    const uint32_t entry = entry_of(table, blockIdx.x);
    const uint32_t tensor = table.tensor[entry];
    const Param &param = params[tensor];
    const Coefficients &c = coefficients[tensor];
    const uint64_t row = static_cast<uint64_t>(blockIdx.x - table.first[entry]) * (THREADS / 32) + threadIdx.x / 32;
    if (row * param.row >= param.elements) return;
    const bf16 *x = workspace + table.at[entry] * UNIT + row * param.row;
    const uint32_t lane = threadIdx.x % 32;
    float sum = 0.0f;
    const uint32_t vectors = is_aligned(x) ? param.row / 8 : 0;
    for (uint32_t v = lane; v < vectors; v += 32) {
        Run<bf16, 8> xv;
        xv.load(x + v * 8);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum += to_float(xv.v[k]) * to_float(xv.v[k]);
    }
    for (uint32_t i = vectors * 8 + lane; i < param.row; i += 32) sum += to_float(x[i]) * to_float(x[i]);
    const double total = warp_sum(static_cast<double>(sum));
    if (lane == 0) {
        float *row_sq = reinterpret_cast<float *>(param.state[1]) + row;
        const float mean = static_cast<float>(total / param.row);
        const float average = *row_sq * c.of_m + mean * c.of_g;
        *row_sq = average;
        const double scale = 1.0 / (sqrt(static_cast<double>(average) * c.correction) + ROW_EPS);
        reinterpret_cast<Row *>(param.rows)[row] = Row{total * scale * scale, static_cast<float>(scale), 0};
    }
}

// The scale of a whole matrix after that of its rows; a block an entry.
extern "C" __global__ void __launch_bounds__(THREADS)
    finish_rows(const __grid_constant__ Table table, const Control *control, const Param *params,
                Coefficients *coefficients) {
    if (!control->apply) return;
    const uint32_t tensor = table.tensor[blockIdx.x];
    const Param &param = params[tensor];
    const Row *rows = reinterpret_cast<const Row *>(param.rows);
    const uint64_t count = param.elements / param.row;
    double sum[1] = {0.0};
    for (uint64_t i = threadIdx.x; i < count; i += THREADS) sum[0] += rows[i].share;
    block_sum(sum);
    if (threadIdx.x == 0) coefficients[tensor].scale = static_cast<float>(param.d / (sqrt(sum[0]) + ROW_EPS));
}

enum GradientType : uint32_t { UNMEASURED = 0, OF_F32 = 1, OF_BF16 = 2, OF_F16 = 3 };

__device__ __forceinline__ float gradient(uint64_t g, uint32_t type, uint64_t i) {
    switch (type) {
    case OF_F32: return reinterpret_cast<const float *>(g)[i];
    case OF_BF16: return to_float(reinterpret_cast<const bf16 *>(g)[i]);
    default: return to_float(reinterpret_cast<const f16 *>(g)[i]);
    }
}

// Decays the parameters and moves them by the orthogonalised matrices.
template <typename P>
__device__ __forceinline__ void apply(const Table &table, const Control *control, const Param *params,
                                      const Coefficients *coefficients, const bf16 *workspace, double *partials,
                                      uint32_t gradients) {
    if (!control->apply) return;
    constexpr int W = 16 / sizeof(P);
    const uint32_t entry = entry_of(table, blockIdx.x);
    const uint32_t tensor = table.tensor[entry], block = blockIdx.x - table.first[entry];
    const Param &param = params[tensor];
    const Coefficients c = coefficients[tensor];
    const uint64_t start = static_cast<uint64_t>(block) * CHUNK;
    const int len = static_cast<int>(min(static_cast<uint64_t>(CHUNK), param.elements - start));
    P *p = reinterpret_cast<P *>(table.p[entry]) + start;
    float *master = param.master ? reinterpret_cast<float *>(param.master) + start : nullptr;
    const bf16 *x = workspace + table.at[entry] * UNIT + start;
    const Row *rows = (c.options & ROW_MOMENT) ? reinterpret_cast<const Row *>(param.rows) + start / param.row : nullptr;
    const uint32_t column = static_cast<uint32_t>(start % param.row);
    const float other_keep = (c.options & CAUTIOUS_DECAY) ? 1.0f : c.keep;
    double sums[3] = {0.0, 0.0, 0.0};
    const auto row_scale = [&](int i) { return rows ? rows[(column + i) / param.row].scale * c.scale : c.scale; };
    const auto element = [&](float &p, float o, int i) {
        const float before = p;
        p = p * (p * o > 0.0f ? c.keep : other_keep) - o * c.step_size;
        if (gradients != UNMEASURED) measure(sums, before, p, gradient(table.g[entry], gradients, start + i));
        return stored<P>(c, p, start + i);
    };
    const bool wide = is_aligned(p) && (!master || is_aligned(master)) && (!rows || param.row % W == 0);
    const int vectors = wide ? len / W : 0;
    for (int v = threadIdx.x; v < vectors; v += THREADS) {
        const int i = v * W;
        Run<bf16, W> xv;
        Run<P, W> pv;
        Run<float, W> mv;
        xv.load(x + i);
        if (master) {
            mv.load(master + i);
        } else {
            pv.load(p + i);
        }
        const float scale = row_scale(i);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            float value = master ? mv.v[k] : to_float(pv.v[k]);
            pv.v[k] = element(value, to_float(xv.v[k]) * scale, i + k);
            if (master) mv.v[k] = value;
        }
        if (master) mv.store(master + i);
        pv.store(p + i);
    }
    for (int i = vectors * W + threadIdx.x; i < len; i += THREADS) {
        float value = master ? master[i] : to_float(p[i]);
        p[i] = element(value, to_float(x[i]) * row_scale(i), i);
        if (master) master[i] = value;
    }
    if (gradients != UNMEASURED) {
        block_sum(sums);
        if (threadIdx.x == 0) {
            double *out = partials + 3 * static_cast<size_t>(param.chunk + block);
            for (int n = 0; n < 3; ++n) out[n] = sums[n];
        }
    }
}

#define APPLY(P)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        apply_##P(const __grid_constant__ Table table, const Control *control, const Param *params,                    \
                  const Coefficients *coefficients, const bf16 *workspace, double *partials, uint32_t gradients) {     \
        apply<P>(table, control, params, coefficients, workspace, partials, gradients);                                \
    }

APPLY(f32)
APPLY(bf16)
APPLY(f16)
