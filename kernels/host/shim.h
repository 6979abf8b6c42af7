// What CUDA's words mean to a C++ compiler, so that our kernels run on a CPU with the same bits.
//
// Include this first, then the `.cu` sources. Compile with -std=c++20 -ffp-contract=off: multiply-adds are fused only
// where `fmaf` or `fma` is written, as in the GPU builds.
//
// A kernel is written KERNEL(name, Args, threads) { body }. It gets one plain struct `args` and enters a table by its
// name; `shim::launch` in block.h runs it. `threadIdx` and its like hold `unsigned` fields x, y, z.
//
// Not here: warp intrinsics, atomics, dynamic shared memory, half types. No kernel of ours uses them.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <math.h> // the C++ one: `sqrt(float)` and its like in the global namespace

#include "block.h"

#define __host__
#define __device__ __attribute__((unused))
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ const

// Blocks run one after another, so one copy of a shared variable is enough. Its contents at the start of a block are
// whatever the block before left there, as on a GPU.
//
// For ThreadSanitizer every block has its own operating system thread, and so its own copy: else a second block that
// uses the same address would look like a race with the first.
#ifdef __SANITIZE_THREAD__
#define __shared__ static thread_local
#else
#define __shared__ static
#endif

#define KERNEL(name, Args, threads)                                                             \
    static void name##_on_host(const Args& args);                                               \
    static const shim::Registration name##_registration{                                        \
        {#name, sizeof(Args), threads,                                                          \
         [](const void* args) { name##_on_host(*static_cast<const Args*>(args)); }}};           \
    static void name##_on_host([[maybe_unused]] const Args& args)

// The place in the source tells barriers apart, so that threads waiting at two of them are found out.
static inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    shim::barrier(file, line);
}

#define SHIM_VECTOR(name, type, bytes, fields, parameters, ...)                                \
    struct alignas(bytes) name {                                                                \
        type fields;                                                                            \
    };                                                                                          \
    [[maybe_unused]] static inline name make_##name parameters { return name{__VA_ARGS__}; }
#define SHIM_XY x, y
#define SHIM_XYZW x, y, z, w
SHIM_VECTOR(float2, float, 8, SHIM_XY, (float x, float y), x, y)
SHIM_VECTOR(float4, float, 16, SHIM_XYZW, (float x, float y, float z, float w), x, y, z, w)
SHIM_VECTOR(double2, double, 16, SHIM_XY, (double x, double y), x, y)
SHIM_VECTOR(int2, int, 8, SHIM_XY, (int x, int y), x, y)
SHIM_VECTOR(int4, int, 16, SHIM_XYZW, (int x, int y, int z, int w), x, y, z, w)
SHIM_VECTOR(uint2, unsigned, 8, SHIM_XY, (unsigned x, unsigned y), x, y)
SHIM_VECTOR(uint4, unsigned, 16, SHIM_XYZW, (unsigned x, unsigned y, unsigned z, unsigned w), x, y, z, w)
#undef SHIM_VECTOR
#undef SHIM_XY
#undef SHIM_XYZW

static inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
static inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
static inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
static inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
static inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
static inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
static inline int __popc(unsigned v) { return std::popcount(v); }
static inline int __popcll(unsigned long long v) { return std::popcount(v); }
static inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
// Close to the GPU's, not equal to it: CUDA allows these an error of its own.
static inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
static inline double rsqrt(double v) { return 1.0 / sqrt(v); }
