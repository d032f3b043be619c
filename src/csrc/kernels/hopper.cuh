// Instructions of compute capability 9.0, most of which CUDA C++ has no names for: barriers in shared memory, bulk copies,
// products of a warpgroup. Addresses of shared memory are 32-bit; code that uses these must be compiled for sm_90a.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace smartmoe {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barriers in shared memory. A phase ends after the arrivals that it was made for and the bytes that it was told of.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// After the barriers of a block were made, before its other threads and the copy engine use them.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Barriers 1..15 of the block, for some of its threads.
__device__ __forceinline__ void threads_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Ordinary stores to shared memory become visible to bulk copies and to products of a warpgroup.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box of the map at (x, y, z), by the copy engine.
__device__ __forceinline__ void load_box(uint32_t to, const void* map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The box of shared memory to (x, y, z) of the map, by the copy engine; what lies beyond the edges is left out.
__device__ __forceinline__ void store_box(uint32_t from, const void* map, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(from), "r"(x),
               "r"(y), "r"(z)
               : "memory");
}

// What this thread has stored in boxes was read from shared memory.
__device__ __forceinline__ void boxes_read() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(from)
               : "memory");
  return value;
}

__device__ __forceinline__ int load_int(uint32_t from) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  return value;
}

__device__ __forceinline__ void store_int(uint32_t to, int value) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void min_int(uint32_t to, int value) {
  asm volatile("red.shared.min.s32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void add_int(uint32_t to, int value) {
  asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t to, const float* four) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3])
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t to, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
}

// *to += four, where the sums lie: nothing is read here. to: of 16 bytes.
__device__ __forceinline__ void add_global(float* to, const uint4& four) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(__uint_as_float(four.x)),
               "f"(__uint_as_float(four.y)), "f"(__uint_as_float(four.z)), "f"(__uint_as_float(four.w))
               : "memory");
}

// Products of a warpgroup.

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// A matrix in shared memory in rows of 128 bytes, swizzled as the copy engine does it, 8 rows a group. The groups follow
// each other 1,024 bytes apart; `column_step`: bytes from 64 columns to the next 64, where rows run along k.
__device__ __forceinline__ uint64_t matrix_at(uint32_t address, int column_step) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(column_step >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#define SMARTMOE_SUMS8(i) \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define SMARTMOE_SUMS32(i) SMARTMOE_SUMS8(i), SMARTMOE_SUMS8(i + 8), SMARTMOE_SUMS8(i + 16), SMARTMOE_SUMS8(i + 24)

// sum = a b + (keep ? sum : 0), a [64, 16] and b [16, 256]. ROWS_ALONG_K: rows of the matrix in shared memory hold one k.
template <bool A_ROWS_ALONG_K, bool B_ROWS_ALONG_K>
__device__ __forceinline__ void multiply(float (&sum)[128], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, keep, 1, 1, %131, %132;\n}"
      : SMARTMOE_SUMS32(0), SMARTMOE_SUMS32(32), SMARTMOE_SUMS32(64), SMARTMOE_SUMS32(96)
      : "l"(a), "l"(b), "r"(static_cast<int>(keep)), "n"(A_ROWS_ALONG_K ? 1 : 0), "n"(B_ROWS_ALONG_K ? 1 : 0));
}

// The same with b [16, 128], into the first half of sum.
template <bool A_ROWS_ALONG_K, bool B_ROWS_ALONG_K>
__device__ __forceinline__ void multiply_narrow(float (&sum)[128], uint64_t a, uint64_t b, bool keep) {
  asm volatile(
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, keep, 1, 1, %67, %68;\n}"
      : SMARTMOE_SUMS32(0), SMARTMOE_SUMS32(32)
      : "l"(a), "l"(b), "r"(static_cast<int>(keep)), "n"(A_ROWS_ALONG_K ? 1 : 0), "n"(B_ROWS_ALONG_K ? 1 : 0));
}

#undef SMARTMOE_SUMS32
#undef SMARTMOE_SUMS8

// Four 8 x 8 matrices of 16-bit values from the registers of a warp; thread 8 i + r has the address of row r of matrix i.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(m0), "r"(m1), "r"(m2),
               "r"(m3)
               : "memory");
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace smartmoe
