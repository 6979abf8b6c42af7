// What all kernels share: types, how arguments are passed, and the number formats of weights.
//
// The files of this folder are one translation unit, in the order of ORDER. No #include, no warp intrinsics, no inline
// assembly, so that nvcc, NVRTC and g++ (with host/shim.h) take them as they are. Multiply-adds are fused only where
// fmaf or fma is written: compile with -fmad=false, or -ffp-contract=off.
//
// A launch serves up to BATCH matrices of one shape: blockIdx.z says which. So a struct of arguments is a few arrays of
// BATCH words of 8 bytes (`slots`: pointers, or one number for each matrix) and then words of 4 bytes that hold for all of
// them. ARGS states both counts, and a test compares them with the host's table.
//
// Indices of elements are 64 bits wide; rows and columns fit 32.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define BATCH 32

#ifndef KERNEL
#define KERNEL(name, Args, threads) \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args args)
#endif

#define ARGS(Args, slots, words) static_assert(sizeof(Args) == (slots) * BATCH * 8 + (words) * 4, #Args)

// Number formats, as the host numbers them.
enum { F64 = 0, F32 = 1, F16 = 2, BF16 = 3, F8E4M3 = 4, F8E5M2 = 5 };

// The exponent of the lowest normal number, and the bits after the leading one.
static __device__ __forceinline__ int lowest_exponent(u32 type) {
    return type == F64 ? -1022 : type == F16 || type == F8E5M2 ? -14 : type == F8E4M3 ? -6 : -126;
}

static __device__ __forceinline__ int fraction_bits(u32 type) {
    return type == F64 ? 52 : type == F32 ? 23 : type == F16 ? 10 : type == BF16 ? 7 : type == F8E4M3 ? 3 : 2;
}

static __device__ __forceinline__ float bf16_value(u32 bits) { return __uint_as_float(bits << 16); }

// The exponent moved over, and its range made up for by an exact product (2^112).
static __device__ __forceinline__ float f16_value(u32 bits) {
    const u32 magnitude = (bits & 0x7fff) << 13;
    const u32 finite = __float_as_uint(__uint_as_float(magnitude) * __uint_as_float(0x77800000));
    return __uint_as_float((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite) | (bits & 0x8000) << 16);
}

// The same with 2^120; the one NaN of each sign is all ones.
static __device__ __forceinline__ float e4m3_value(u32 bits) {
    const u32 magnitude = (bits & 0x7f) << 20;
    const u32 finite = __float_as_uint(__uint_as_float(magnitude) * __uint_as_float(0x7b800000));
    return __uint_as_float(((bits & 0x7f) == 0x7f ? 0x7fc00000 : finite) | (bits & 0x80) << 24);
}

// An element of any format in f32; exact but for f64, which is rounded.
static __device__ __forceinline__ float widen(const u8* x, u64 i, u32 type) {
    switch (type) {
        case F64: return (float)((const double*)x)[i];
        case F32: return ((const float*)x)[i];
        case F16: return f16_value(((const u16*)x)[i]);
        case BF16: return bf16_value(((const u16*)x)[i]);
        case F8E4M3: return e4m3_value(x[i]);
        default: return f16_value((u32)x[i] << 8);
    }
}

static __device__ __forceinline__ double widen_f64(const u8* x, u64 i, u32 type) {
    return type == F64 ? ((const double*)x)[i] : (double)widen(x, i, type);
}

// Rounded to nearest, ties to even, in integers: a NaN keeps its sign and leading bits and becomes quiet, a value beyond
// the range becomes infinite.
static __device__ __forceinline__ u16 bf16_bits(float x) {
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (u16)((bits >> 16) | 0x0040);
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static __device__ __forceinline__ u16 f16_bits(float x) {
    const u32 bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    u32 rounded;
    if (magnitude > 0x7f800000) {
        rounded = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    } else if (magnitude >= 0x47800000) {
        rounded = 0x7c00;  // 65536 and above
    } else if (magnitude >= 0x38800000) {
        const u32 rebiased = magnitude - 0x38000000;
        rounded = (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13;
    } else if (magnitude < 0x33000000) {
        rounded = 0;  // below half of the smallest denormal
    } else {
        const u32 shift = 126 - (magnitude >> 23);
        const u32 significand = (magnitude & 0x7fffff) | 0x800000;
        const u32 kept = significand >> shift, rest = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
        rounded = kept + (rest > half || (rest == half && (kept & 1)) ? 1 : 0);
    }
    return (u16)(sign | rounded);
}

static __device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000) != 0x7f800000; }

static __device__ __forceinline__ bool is_finite(double x) {
    const u64 exponent = 0x7ffull << 52;
    return ((u64)__double_as_longlong(x) & exponent) != exponent;
}
