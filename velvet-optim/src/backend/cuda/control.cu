// The optimizer's control block: what is observed, what a step is to do, and what it did.
//
// The same formulas in the same order as src/adaptive/*.rs, src/step.rs and the rules' constructors, in f64.
#include "common.cuh"

enum Setting : uint32_t {
    WARM_UP = 1,
    WARM_UP_BY_ENTROPY = 2,
    MOMENTUM = 4,
    BRAKE = 8,
    POLYAK = 16,
    TRUST = 32,
    CLIP = 64,
    MEASURE = 128,
    // The sums of squares of the gradients were made.
    SUMS = 256,
    SKIP = 512,
    ERROR = 1024,
};

// The change for each unit of learning rate that is expected of a first update: AdamW's.
constexpr double FIRST_CHANGE = 1.0;

// The configuration, by value.
struct Settings {
    double warm_initial, warm_margin, warm_nats, warm_floor, warm_decay;
    double momentum_initial, momentum_nats, momentum_start, momentum_end, momentum_decay;
    double brake_margin, brake_nats, brake_floor, brake_decay;
    double polyak_bound, polyak_factor, polyak_decay;
    double trust_ratio, trust_floor;
    double beta1, beta2, eps, clip;
    uint64_t seed;
    uint32_t on;
    uint32_t parameters;
};
static_assert(sizeof(Settings) == 200, "as in layout.rs");

// A number that is known on the host or lies in device memory.
struct Number {
    uint64_t at;
    double value;
    uint32_t type;
    uint32_t pad;
};
static_assert(sizeof(Number) == 24, "as in layout.rs");

enum NumberType : uint32_t { NONE = 0, VALUE = 1, OF_F32 = 2, OF_F64 = 3, OF_BF16 = 4, OF_F16 = 5 };

__device__ double read(const Number &x) {
    switch (x.type) {
    case OF_F32: return *reinterpret_cast<const float *>(x.at);
    case OF_F64: return *reinterpret_cast<const double *>(x.at);
    case OF_BF16: return to_float(*reinterpret_cast<const bf16 *>(x.at));
    case OF_F16: return to_float(*reinterpret_cast<const f16 *>(x.at));
    default: return x.value;
    }
}

__device__ void take_in(double &average, double decay, double x) {
    if (isfinite(x)) average = isnan(average) ? x : decay * average + (1.0 - decay) * x;
}

extern "C" __global__ void observe(Control *control, const __grid_constant__ Settings s, const Number loss_at,
                                   const Number entropy_at) {
    const double loss = read(loss_at);
    const bool has_entropy = entropy_at.type != NONE;
    const double entropy = has_entropy ? read(entropy_at) : 0.0;
    if (!isfinite(loss)) control->ignored += 1;
    if (s.on & WARM_UP) {
        const bool by_entropy = (s.on & WARM_UP_BY_ENTROPY) && has_entropy;
        take_in(control->averages[0], s.warm_decay, by_entropy ? entropy : loss);
    }
    if (s.on & MOMENTUM) take_in(control->averages[1], s.momentum_decay, loss);
    if ((s.on & BRAKE) && has_entropy) take_in(control->averages[2], s.brake_decay, loss - entropy);
    if (s.on & POLYAK) take_in(control->averages[3], s.polyak_decay, loss);
}

extern "C" __global__ void set_learning_rate(Control *control, double lr) { control->base_lr = lr; }

extern "C" __global__ void clear_failure(Control *control, uint64_t *mailbox) {
    control->failed_step = 0;
    *mailbox = 0;
    __threadfence_system();
}

// One warp a parameter: the sum of its chunks' sums; 0 for parameters without a gradient.
extern "C" __global__ void finish_sums(const __grid_constant__ Present present, const Param *params, uint32_t base,
                                       uint32_t count, const double *partials, double *sums) {
    const uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (i >= count) return;
    double sum = 0.0;
    if (is_present(present, i)) {
        const Param &param = params[base + i];
        const uint32_t chunks = chunks_of(param);
        for (uint32_t k = lane; k < chunks; k += 32) sum += partials[param.chunk + k];
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[base + i] = sum;
}

// The same of the squares of weights, for a trust region that has measured no update of them yet.
extern "C" __global__ void finish_weights(const __grid_constant__ Present present, const Param *params, uint32_t base,
                                          uint32_t count, const double *partials, double *sizes) {
    const uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (i >= count || !is_present(present, i)) return;
    const Param &param = params[base + i];
    const uint32_t chunks = chunks_of(param);
    double sum = 0.0;
    for (uint32_t k = lane; k < chunks; k += 32) sum += partials[param.chunk + k];
    sum = warp_sum(sum);
    double *size = sizes + 3 * (base + i);
    if (lane == 0 && isnan(size[0])) {
        size[0] = FIRST_CHANGE;
        size[1] = sqrt(sum / static_cast<double>(param.elements > 0 ? param.elements : 1));
        size[2] = 0.0;
    }
}

// What this step is to do; one block.
extern "C" __global__ void begin(Control *control, const __grid_constant__ Settings s, const double *sums,
                                 double *failed_sums, uint64_t *mailbox) {
    __shared__ bool fails;
    double total[1] = {0.0};
    if (s.on & SUMS) {
        for (uint32_t i = threadIdx.x; i < s.parameters; i += blockDim.x) total[0] += sums[i];
    }
    block_sum(total);
    if (threadIdx.x == 0) {
        fails = false;
        bool apply = control->failed_step == 0;
        double clip_scale = 1.0;
        if (apply) {
            control->has_norm = (s.on & SUMS) != 0;
            if (s.on & SUMS) {
                const double norm = sqrt(total[0]);
                control->grad_norm = norm;
                if (!isfinite(norm) && (s.on & SKIP)) {
                    control->skipped += 1;
                    apply = false;
                }
                if (!isfinite(norm) && (s.on & ERROR)) {
                    control->failed_step = control->step + 1;
                    control->failed_norm = norm;
                    fails = true;
                    apply = false;
                }
                if (s.on & CLIP) clip_scale = fmin(s.clip / (norm + 1e-6), 1.0);
            }
        }
        control->apply = apply;
        if (apply) {
            double warm_up = 1.0, brake = 1.0;
            const double warm_loss = control->averages[0], gap = control->averages[2];
            if ((s.on & WARM_UP) && !isnan(warm_loss)) {
                warm_up = fmin(fmax((s.warm_initial + s.warm_margin - warm_loss) / s.warm_nats, s.warm_floor), 1.0);
            }
            if ((s.on & BRAKE) && !isnan(gap)) {
                brake = fmin(fmax(1.0 - (gap - s.brake_margin) / s.brake_nats, s.brake_floor), 1.0);
            }
            double lr = control->base_lr * warm_up * brake;
            const double loss = control->averages[3], rate = control->averages[4];
            if ((s.on & POLYAK) && !isnan(loss) && rate > 0.0) {
                lr = fmin(lr, s.polyak_factor * fmax(loss - s.polyak_bound, 0.0) / rate);
            }
            double beta1 = s.beta1, progress = 0.0;
            const double momentum_loss = control->averages[1];
            const bool has_progress = (s.on & MOMENTUM) && !isnan(momentum_loss);
            if (has_progress) {
                progress = fmin(fmax((s.momentum_initial - momentum_loss) / s.momentum_nats, 0.0), 1.0);
                beta1 = s.momentum_start + (s.momentum_end - s.momentum_start) * progress;
            }
            control->step += 1;
            control->clip_scale = clip_scale;
            control->lr = lr;
            control->beta1 = beta1;
            control->progress = progress;
            control->has_progress = has_progress;
            control->has_ratio = 0;
        }
    }
    __syncthreads();
    if (fails) {
        // Kept for the report: the next step overwrites the sums.
        for (uint32_t i = threadIdx.x; i < s.parameters; i += blockDim.x) failed_sums[i] = sums[i];
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence_system();
            *mailbox = control->failed_step;
        }
    }
}

__device__ uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// As in src/rounding.rs.
__device__ uint32_t rounding_key(uint64_t seed, uint64_t step, uint64_t parameter) {
    const uint64_t golden = 0x9e3779b97f4a7c15ull;
    uint64_t z = mix64(seed + golden);
    z = mix64(z + step + golden);
    z = mix64(z + parameter + golden);
    return static_cast<uint32_t>(z >> 32);
}

// The coefficients of each parameter's step; one thread a parameter.
extern "C" __global__ void coefficients(const Control *control, const __grid_constant__ Settings s,
                                        const __grid_constant__ Present present, const Param *params, uint32_t base,
                                        uint32_t count, double *products, const double *sizes, double *rates,
                                        Coefficients *out) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count || !control->apply || !is_present(present, i)) return;
    const Param &param = params[base + i];
    double lr = control->lr * param.lr_scale;
    const double *size = sizes + 3 * (base + i);
    if ((s.on & TRUST) && !isnan(size[0])) {
        if (lr * size[0] > 0.0) {
            lr *= fmin(s.trust_ratio * fmax(size[1], s.trust_floor) / (lr * size[0]), 1.0);
        }
    }
    rates[base + i] = lr;
    double betas[2] = {0.0, 0.0};
    Coefficients c = {};
    c.clip = static_cast<float>(control->clip_scale);
    c.keep = static_cast<float>(1.0 - lr * param.decay);
    c.options = param.options;
    c.scale = 1.0f;
    c.key = rounding_key(s.seed, control->step, base + i);
    double *product = products + 2 * (base + i);
    switch (param.rule) {
    case ADAMW: {
        const double beta1 = control->beta1;
        betas[0] = beta1, betas[1] = s.beta2;
        const double first = product[0] * betas[0], second = product[1] * betas[1];
        const double first_correction = 1.0 - first;
        c.first_weight = static_cast<float>(1.0 - beta1);
        c.past = static_cast<float>(s.beta2);
        c.fresh = static_cast<float>(1.0 - s.beta2);
        c.step_size = static_cast<float>(lr / first_correction);
        c.correction = static_cast<float>(1.0 / sqrt(1.0 - second));
        c.eps = static_cast<float>(s.eps);
        c.of_m = static_cast<float>(beta1 * first_correction / (1.0 - first * beta1));
        c.of_g = static_cast<float>(1.0 - beta1);
        break;
    }
    case SGD: // a: momentum
        betas[0] = param.a;
        c.past = static_cast<float>(param.a);
        c.of_m = (param.options & NESTEROV) ? static_cast<float>(param.a) : 1.0f;
        c.of_g = (param.options & NESTEROV) ? 1.0f : 0.0f;
        c.step_size = static_cast<float>(lr);
        break;
    case LION: // a, b: betas
        betas[0] = param.b;
        c.of_m = static_cast<float>(param.a);
        c.of_g = static_cast<float>(1.0 - param.a);
        c.past = static_cast<float>(param.b);
        c.fresh = static_cast<float>(1.0 - param.b);
        c.step_size = static_cast<float>(lr);
        break;
    default: { // a: momentum, b: early momentum, c: decay of the rows' average, d: size
        const double momentum =
            control->has_progress ? param.b + (param.a - param.b) * control->progress : param.a;
        betas[0] = momentum, betas[1] = param.c;
        c.first_weight = static_cast<float>(1.0 - momentum);
        c.past = static_cast<float>(momentum);
        c.of_m = static_cast<float>(param.c);
        c.of_g = static_cast<float>(1.0 - param.c);
        c.correction = static_cast<float>(1.0 / (1.0 - product[1] * param.c));
        c.step_size = static_cast<float>(lr);
        c.scale = static_cast<float>(param.d);
        break;
    }
    }
    product[0] *= betas[0];
    product[1] *= betas[1];
    out[base + i] = c;
}

// One warp a parameter: what the elements of a cautious update are scaled by.
extern "C" __global__ void finish_aligned(const Control *control, const __grid_constant__ Present present,
                                          const Param *params, uint32_t base, uint32_t count,
                                          const double *partials, Coefficients *coefficients) {
    const uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (i >= count || !control->apply || !is_present(present, i)) return;
    const Param &param = params[base + i];
    if (param.rule != ADAMW || !(param.options & CAUTIOUS)) return;
    const uint32_t chunks = chunks_of(param);
    double aligned = 0.0;
    for (uint32_t k = lane; k < chunks; k += 32) aligned += partials[param.chunk + k];
    aligned = warp_sum(aligned);
    double moving = static_cast<double>(param.elements);
    if (param.rows) {
        // A byte a row, 1 where it moves; the memory is of whole 16 bytes, and those past the last row stay 0.
        const uint4 *rows = reinterpret_cast<const uint4 *>(param.rows);
        const uint64_t sixteens = (param.elements / param.row + 15) / 16;
        uint32_t moves = 0;
        for (uint64_t k = lane; k < sixteens; k += 32) {
            const uint4 some = rows[k];
            moves += __popc(some.x) + __popc(some.y) + __popc(some.z) + __popc(some.w);
        }
        moving = warp_sum(static_cast<double>(moves)) * param.row;
    }
    if (lane == 0 && moving > 0.0) {
        coefficients[base + i].scale = static_cast<float>(moving / fmax(aligned, 1e-3 * moving));
    }
}

// One warp a parameter: what its update was, out of three sums a chunk.
extern "C" __global__ void finish_measured(const Control *control, const __grid_constant__ Present present,
                                           const Param *params, uint32_t base, uint32_t count,
                                           const double *partials, const double *rates, double *measured,
                                           double *sizes) {
    const uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (i >= count) return;
    double sums[3] = {0.0, 0.0, 0.0};
    const bool counts = control->apply && is_present(present, i);
    const Param &param = params[base + i];
    if (counts) {
        const uint32_t chunks = chunks_of(param);
        for (uint32_t k = lane; k < chunks; k += 32) {
            for (int n = 0; n < 3; ++n) sums[n] += partials[3 * static_cast<size_t>(param.chunk + k) + n];
        }
    }
    for (int n = 0; n < 3; ++n) {
        sums[n] = warp_sum(sums[n]);
        if (lane == 0) measured[3 * (base + i) + n] = sums[n];
    }
    if (lane == 0 && counts && param.elements > 0 && rates[base + i] > 0.0) {
        const double elements = static_cast<double>(param.elements);
        const double change = sqrt(sums[0] / elements), weight = sqrt(sums[1] / elements);
        double *size = sizes + 3 * (base + i);
        // A gradient of zeros tells nothing about the update that the next gradient will make.
        const double known = isnan(size[0]) ? FIRST_CHANGE : size[0], now = change / rates[base + i];
        // What is no number says nothing of a size either.
        if (isfinite(now) && isfinite(weight)) {
            size[0] = sums[2] == 0.0 ? fmax(known, now) : now;
            size[1] = weight;
            size[2] = change / weight;
        }
    }
}

// What this step did; one block.
extern "C" __global__ void end(Control *control, const __grid_constant__ Settings s, const double *measured) {
    if (!control->apply) return;
    double sums[3] = {0.0, 0.0, 0.0};
    for (uint32_t i = threadIdx.x; i < s.parameters; i += blockDim.x) {
        for (int n = 0; n < 3; ++n) sums[n] += measured[3 * i + n];
    }
    block_sum(sums);
    if (threadIdx.x == 0) {
        const double lr = control->lr;
        if ((s.on & POLYAK) && lr > 0.0) take_in(control->averages[4], s.polyak_decay, sums[2] / lr);
        control->update_ratio = sqrt(sums[0] / sums[1]);
        control->has_ratio = 1;
    }
}
