// Copies of whole tiles by the copy engine of compute capability 9.0, and the barriers in shared memory that say when
// they have come and when their place is free again.
#pragma once

#include "warpgroup.cuh"

// A tensor (batch, t, heads, dim) as the copy engine knows it (`CUtensorMap`), in boxes of 64 rows of one head and 64
// columns; what lies outside of the tensor is read as zeros.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// A barrier in shared memory: its phase ends when all arrivals have come, and all bytes that were announced.
typedef uint64_t Barrier;

__device__ __forceinline__ void barrier_init(Barrier *barrier, uint32_t arrivals) {
#ifdef WARPGROUPS
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// After all barriers have been initialised, before the block's threads meet.
__device__ __forceinline__ void barriers_fence() {
#ifdef WARPGROUPS
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(Barrier *barrier) {
#ifdef WARPGROUPS
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// One arrival for the warp, when all of its lanes have come here.
__device__ __forceinline__ void release(Barrier *barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_expect(Barrier *barrier, uint32_t bytes) {
#ifdef WARPGROUPS
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// Waits for the end of a phase: of the first with parity 0, of the second with 1, and so on. With parity 1 a new
// barrier lets through at once.
__device__ __forceinline__ void barrier_wait(Barrier *barrier, uint32_t parity) {
#ifdef WARPGROUPS
    asm volatile("{\n.reg .pred done;\nWAIT:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
#endif
}

// A ring of STAGES places: which of them the n-th tile has, and the parity of its phase.
template <int STAGES> struct Ring {
    uint32_t stage = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }

    __device__ __forceinline__ uint32_t before() const { return stage == 0 ? STAGES - 1 : stage - 1; }
};

// The pieces of work of a thread block: tiles of heads, in pairs of the j-th tile from the end and the j-th from the
// beginning of one head, which with a causal mask are as much work together whatever j is. The pairs of a head are
// neighbours, so that blocks that run at the same time read the same keys and values.
struct Pieces {
    uint32_t tiles;            // of a head
    uint32_t pairs, next_pair;  // of all heads
    uint32_t head, tile;       // the piece
    bool second = true;

    __device__ __forceinline__ Pieces(uint32_t heads, uint32_t tiles)
        : tiles(tiles), pairs(heads * ((tiles + 1) / 2)), next_pair(blockIdx.x) {}

    // Goes on to the next piece, where there is one.
    __device__ __forceinline__ bool next() {
        second = !second;
        if (second && tile != tiles - 1 - tile) {
            tile = tiles - 1 - tile;
            return true;
        }
        second = false;
        if (next_pair >= pairs) return false;
        const uint32_t each = (tiles + 1) / 2;
        head = next_pair / each;
        tile = tiles - 1 - next_pair % each;
        next_pair += gridDim.x;
        return true;
    }
};

// Starts to copy ROWS rows of a head from `row0` on into panels; `barrier` gets their bytes.
template <typename T, int D, int ROWS>
__device__ __forceinline__ void fetch_panels(T *tile, const TensorMap *map, Barrier *barrier, int head, int row0,
                                             int batch) {
#ifdef WARPGROUPS
#pragma unroll
    for (int panel = 0; panel < D / 64; panel++)
#pragma unroll
        for (int row = 0; row < ROWS; row += 64)
            asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                         "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(tile + panel * ROWS * 64 + row * 64)),
                         "l"(map), "r"(shared_address(barrier)), "r"(panel * 64), "r"(head), "r"(row0 + row), "r"(batch)
                         : "memory");
#endif
}

// How many registers a thread of this warpgroup may use from here on. All warpgroups together may have what the
// kernel began with: 3 times 168 a thread is 40 + 2 times 232, or 24 + 2 times 240.
template <int N> __device__ __forceinline__ void fewer_registers() {
#ifdef WARPGROUPS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N> __device__ __forceinline__ void more_registers() {
#ifdef WARPGROUPS
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// Two warpgroups take turns: one waits for the other to say that its turn is over.
__device__ __forceinline__ void turn_wait(int group) {
#ifdef WARPGROUPS
    asm volatile("bar.sync %0, 256;" ::"r"(group + 3) : "memory");
#endif
}

__device__ __forceinline__ void turn_over(int group) {
#ifdef WARPGROUPS
    asm volatile("bar.arrive %0, 256;" ::"r"(group + 3) : "memory");
#endif
}

// The threads of one warpgroup meet.
__device__ __forceinline__ void meet(int group) {
#ifdef WARPGROUPS
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
#endif
}
