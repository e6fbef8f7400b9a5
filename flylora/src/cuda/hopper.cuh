// What Hopper has of its own: copies of boxes of a matrix by the copy engine, barriers that count the bytes of such copies,
// and products of bf16 by four warps at once. For compute capability 9.0 alone: elsewhere there is nothing here.
//
// Boxes lie in shared memory in rows of 128 bytes, and of each eight rows the 16-byte parts are exchanged ("swizzled") in a
// way that both the copy engine and the products know.
#pragma once

#include "mma.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1

// A matrix as the copy engine knows it, made by the driver.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After all of them, before other threads or the copy engine use them.
__device__ __forceinline__ void barriers_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the barrier wait for so many bytes more.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra over;\nbra wait;\nover:\n}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// A box from column x of row y on; zeros where the matrix ends.
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap &map, uint32_t barrier, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(to),
                 "l"(&map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}

template <int REGISTERS> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Four 8 x 8 matrices of 16-bit numbers, of each of which lane 4 g + t has columns 2t, 2t+1 of row g; lane l gives the
// address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t to, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3])
                 : "memory");
}

// A matrix in shared memory for a product. Row after row, in one box of 64 columns; or, turned, in boxes of 64 of its
// columns as rows.
template <int TURNED> __device__ __forceinline__ uint64_t operand(uint32_t address) {
    constexpr uint64_t SWIZZLED = 1ull << 62, EIGHT_ROWS = (uint64_t)(1024 >> 4) << 32;
    constexpr uint64_t NEXT_BOX = (uint64_t)(TURNED ? 8192 >> 4 : 1) << 16;
    return SWIZZLED | EIGHT_ROWS | NEXT_BOX | (address & 0x3ffff) >> 4;
}

// How far the next 16 terms of the sum are in such a matrix, in the units of `operand`.
template <int TURNED> constexpr uint64_t SIXTEEN = TURNED ? 2048 >> 4 : 32 >> 4;

// Before the first of several products, once their registers are what they shall add to.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N groups of products are under way.
template <int N> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving a use of the registers of a product across this place.
template <int N> __device__ __forceinline__ void hold(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

// The first registers of an instruction by number, and the elements of c that they are.
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                       \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"                                 \
             ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128                                                                                                      \
    NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
             ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
             ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
             ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_8(i)                                                                                                      \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)

// c = a b^T or c += a b^T by 128 threads: c (64, N) in f32, a (64, 16) in shared memory or in registers, b (N, 16) in shared
// memory, N twice the length of c here. Lane 4 g + t of warp w has, of rows 16 w + g and 16 w + g + 8 of c, columns 2t and
// 2t + 1 of each eight: c[4 j] and c[4 j + 1], and c[4 j + 2] and c[4 j + 3]; of a likewise, in the order of `mma.cuh`.
template <int TURNED> __device__ __forceinline__ void product(float (&c)[8], uint64_t a, uint64_t b, bool adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %10, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
                 "{" NAMES_8 "}, "
                 "%8, %9, adds, 1, 1, 0, %11;\n}"
                 : SUMS_8(0)
                 : "l"(a), "l"(b), "r"((int)adds), "n"(TURNED));
}

template <int TURNED> __device__ __forceinline__ void product(float (&c)[16], uint64_t a, uint64_t b, bool adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{" NAMES_16 "}, "
                 "%16, %17, adds, 1, 1, 0, %19;\n}"
                 : SUMS_16(0)
                 : "l"(a), "l"(b), "r"((int)adds), "n"(TURNED));
}

template <int TURNED> __device__ __forceinline__ void product(float (&c)[32], uint64_t a, uint64_t b, bool adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{" NAMES_32 "}, "
                 "%32, %33, adds, 1, 1, 0, %35;\n}"
                 : SUMS_32(0)
                 : "l"(a), "l"(b), "r"((int)adds), "n"(TURNED));
}

template <int TURNED> __device__ __forceinline__ void product(float (&c)[64], uint64_t a, uint64_t b, bool adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{" NAMES_64 "}, "
                 "%64, %65, adds, 1, 1, 0, %67;\n}"
                 : SUMS_64(0)
                 : "l"(a), "l"(b), "r"((int)adds), "n"(TURNED));
}

template <int TURNED> __device__ __forceinline__ void product(float (&c)[128], uint64_t a, uint64_t b, bool adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
                 "{" NAMES_128 "}, "
                 "%128, %129, adds, 1, 1, 0, %131;\n}"
                 : SUMS_128(0)
                 : "l"(a), "l"(b), "r"((int)adds), "n"(TURNED));
}

template <int TURNED> __device__ __forceinline__ void product(float (&c)[128], const uint32_t (&a)[4], uint64_t b, bool adds) {
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %133, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
                 "{" NAMES_128 "}, "
                 "{%128, %129, %130, %131}, %132, adds, 1, 1, %134;\n}"
                 : SUMS_128(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)adds), "n"(TURNED));
}

#endif
