// The difference of two stored sides: d = aligned - degraded of the widened (and scaled) values, rounded once to f32.
//
//   a, b      [rows, cols] stored bytes, row-major
//   scales    one f32 for each block of a grid, or null; a value is then f32(q) * scale, one product rounded to f32
//   d         [rows, ld] f32; what lies between cols and ld is not written
//   part      one record for every DELTA_ROWS rows of the whole matrix: x sum of d^2, y sum of the squared units in the
//             last place of b, count elements that differ, first index of a difference that is not finite, max of |d|
//
// A launch may take some rows of a matrix: those from first_row on, a multiple of DELTA_ROWS. One block of 256 threads for
// each DELTA_ROWS rows. Memory bound: both sides read, 4 bytes an element written. Bit for bit that of the CPU.

#define DELTA_ROWS 16

// Where the scale of an element is.
struct Grid {
    u32 cols, block_rows, block_cols, origin_row, origin_col;
};

struct DeltaArgs {
    const u8* a[BATCH];
    const u8* b[BATCH];
    const float* a_scales[BATCH];
    const float* b_scales[BATCH];
    float* d[BATCH];
    Sums* part[BATCH];
    u32 rows, cols, ld, first_row, a_type, b_type;
    Grid a_grid, b_grid;
};
ARGS(DeltaArgs, 6, 16);

static __device__ __forceinline__ float scale_at(const float* scales, const Grid& grid, u32 row, u32 col) {
    row = (row + grid.origin_row) / grid.block_rows;
    col = (col + grid.origin_col) / grid.block_cols;
    return scales[(u64)row * grid.cols + col];
}

// at / block, without a division where block is a power of two.
static __device__ __forceinline__ u32 block_of(u32 at, u32 block) {
    return (block & (block - 1)) == 0 ? at >> (31 - __clz((int)block)) : at / block;
}

// 2^(2 e - 2 fraction) for the exponent e of a value with these f32 bits, at least that of the lowest normal number.
static __device__ __forceinline__ double ulp_squared(u32 bits, int lowest, int fraction) {
    int exponent = (int)((bits >> 23) & 0xff) - 127;
    exponent = exponent < lowest ? lowest : exponent;
    return __longlong_as_double((long long)(1023 + 2 * (exponent - fraction)) << 52);
}

static __device__ __forceinline__ void add_element(Sums& sums, float d, bool differs, u64 index) {
    const u32 magnitude = __float_as_uint(d) & 0x7fffffff;
    sums.x += (double)d * (double)d;
    sums.count += differs ? 1 : 0;
    sums.max = magnitude > sums.max ? magnitude : sums.max;
    if (magnitude >= 0x7f800000 && index < sums.first) sums.first = index;
}

// Any formats, any columns, any scales.
KERNEL(delta_any, DeltaArgs, 256) {
    const u32 z = blockIdx.z, row0 = blockIdx.x * DELTA_ROWS;
    const u32 rows = args.rows - row0 < DELTA_ROWS ? args.rows - row0 : DELTA_ROWS;
    const u8 *a = args.a[z], *b = args.b[z];
    const float *a_scales = args.a_scales[z], *b_scales = args.b_scales[z];
    const bool wide = args.a_type == F64 || args.b_type == F64;
    const int lowest = lowest_exponent(args.b_type), fraction = fraction_bits(args.b_type);
    Sums own = nothing();
    for (u32 i = threadIdx.x; i < rows * args.cols; i += 256) {
        const u32 row = row0 + i / args.cols, col = i % args.cols, full_row = args.first_row + row;
        const u64 at = (u64)row * args.cols + col, index = (u64)full_row * args.cols + col;
        const float a_scale = a_scales ? scale_at(a_scales, args.a_grid, full_row, col) : 1.0f;
        const float b_scale = b_scales ? scale_at(b_scales, args.b_grid, full_row, col) : 1.0f;
        float d;
        if (wide) {
            double x = widen_f64(a, at, args.a_type), y = widen_f64(b, at, args.b_type);
            if (a_scales) x *= (double)a_scale;
            if (b_scales) y *= (double)b_scale;
            d = (float)(x - y);
            add_element(own, d, x != y, index);
            int exponent = (int)(((u64)__double_as_longlong(y) >> 52) & 0x7ff) - 1023;
            exponent = exponent < lowest ? lowest : exponent;
            const int biased = 1023 + 2 * (exponent - fraction);
            if (biased >= 1) own.y += __longlong_as_double((long long)biased << 52);
        } else {
            float x = widen(a, at, args.a_type), y = widen(b, at, args.b_type);
            if (b_scales) {
                // The unit of a scaled value is that of its 8 bits, scaled.
                u32 power = __float_as_uint(y) & 0x7f800000;
                const u32 least = (u32)(lowest + 127) << 23;
                power = power < least ? least : power;
                const double unit = (double)(__uint_as_float(power) * b_scale);
                own.y += unit * unit * __longlong_as_double((long long)(1023 - 2 * fraction) << 52);
            } else {
                own.y += ulp_squared(__float_as_uint(y), lowest, fraction);
            }
            if (a_scales) x *= a_scale;
            if (b_scales) y *= b_scale;
            d = x - y;
            add_element(own, d, x != y, index);
        }
        args.d[z][(u64)row * args.ld + col] = d;
    }
    const Sums sum = block_sum<256>(own);
    if (threadIdx.x == 0) args.part[z][args.first_row / DELTA_ROWS + blockIdx.x] = sum;
}

struct FromBf16 {
    static const int LOWEST = -126, FRACTION = 7;
    static __device__ __forceinline__ float value(u32 bits) { return bf16_value(bits & 0xffff); }
};

struct FromF16 {
    static const int LOWEST = -14, FRACTION = 10;
    static __device__ __forceinline__ float value(u32 bits) { return f16_value(bits & 0xffff); }
};

// Two sides of one 16-bit format without scales, ld == cols: four elements a load, and whole sectors stored.
template <typename From>
static __device__ __forceinline__ void delta_16_bits(const DeltaArgs& args) {
    const u32 z = blockIdx.z, row0 = blockIdx.x * DELTA_ROWS;
    const u32 rows = args.rows - row0 < DELTA_ROWS ? args.rows - row0 : DELTA_ROWS;
    const u64 start = (u64)row0 * args.cols;
    const uint2* a = (const uint2*)(args.a[z] + 2 * start);
    const uint2* b = (const uint2*)(args.b[z] + 2 * start);
    float4* d = (float4*)(args.d[z] + start);
    const u64 index = (u64)args.first_row * args.cols + start;
    Sums own = nothing();
#pragma unroll 4
    for (u32 v = threadIdx.x; v < rows * (args.cols / 4); v += 256) {
        const uint2 x = a[v], y = b[v];
        const u32 xs[2] = {x.x, x.y}, ys[2] = {y.x, y.y};
        float out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float degraded = From::value(ys[i / 2] >> (i % 2 * 16));
            out[i] = From::value(xs[i / 2] >> (i % 2 * 16)) - degraded;
            add_element(own, out[i], out[i] != 0.0f, index + 4ull * v + i);
            own.y += ulp_squared(__float_as_uint(degraded), From::LOWEST, From::FRACTION);
        }
        d[v] = make_float4(out[0], out[1], out[2], out[3]);
    }
    const Sums sum = block_sum<256>(own);
    if (threadIdx.x == 0) args.part[z][args.first_row / DELTA_ROWS + blockIdx.x] = sum;
}

KERNEL(delta_bf16, DeltaArgs, 256) { delta_16_bits<FromBf16>(args); }

KERNEL(delta_f16, DeltaArgs, 256) { delta_16_bits<FromF16>(args); }

// Two f32 sides without scales, cols a multiple of 4 and ld == cols.
KERNEL(delta_f32, DeltaArgs, 256) {
    const u32 z = blockIdx.z, row0 = blockIdx.x * DELTA_ROWS;
    const u32 rows = args.rows - row0 < DELTA_ROWS ? args.rows - row0 : DELTA_ROWS;
    const u64 start = (u64)row0 * args.cols;
    const float4* a = (const float4*)(args.a[z] + 4 * start);
    const float4* b = (const float4*)(args.b[z] + 4 * start);
    float4* d = (float4*)(args.d[z] + start);
    const u64 index = (u64)args.first_row * args.cols + start;
    Sums own = nothing();
#pragma unroll 4
    for (u32 v = threadIdx.x; v < rows * (args.cols / 4); v += 256) {
        const float4 x = a[v], y = b[v];
        const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
        float out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] = xs[i] - ys[i];
            add_element(own, out[i], xs[i] != ys[i], index + 4ull * v + i);
            // In f64 an f32 unit squared never vanishes.
            own.y += ulp_squared(__float_as_uint(ys[i]), -126, 23);
        }
        d[v] = make_float4(out[0], out[1], out[2], out[3]);
    }
    const Sums sum = block_sum<256>(own);
    if (threadIdx.x == 0) args.part[z][args.first_row / DELTA_ROWS + blockIdx.x] = sum;
}

// Two scaled e4m3 sides; the blocks' columns and origins multiples of 4, and ld == cols: four elements of a load have one
// scale.
KERNEL(delta_e4m3, DeltaArgs, 256) {
    const u32 z = blockIdx.z, row0 = blockIdx.x * DELTA_ROWS, across = args.cols / 4;
    const u32 rows = args.rows - row0 < DELTA_ROWS ? args.rows - row0 : DELTA_ROWS;
    const u64 start = (u64)row0 * args.cols;
    const u32* a = (const u32*)(args.a[z] + start);
    const u32* b = (const u32*)(args.b[z] + start);
    float4* d = (float4*)(args.d[z] + start);
    const double unit = __longlong_as_double((long long)(1023 - 2 * 3) << 52);
    Sums own = nothing();
    for (u32 r = 0; r < rows; r++) {
        const u32 row = args.first_row + row0 + r;
        const float* a_scales =
            args.a_scales[z] + (u64)((row + args.a_grid.origin_row) / args.a_grid.block_rows) * args.a_grid.cols;
        const float* b_scales =
            args.b_scales[z] + (u64)((row + args.b_grid.origin_row) / args.b_grid.block_rows) * args.b_grid.cols;
#pragma unroll 2
        for (u32 v = threadIdx.x; v < across; v += 256) {
            const u32 xs = a[r * across + v], ys = b[r * across + v], col = 4 * v;
            const float a_scale = a_scales[block_of(col + args.a_grid.origin_col, args.a_grid.block_cols)];
            const float b_scale = b_scales[block_of(col + args.b_grid.origin_col, args.b_grid.block_cols)];
            const u64 index = (u64)row * args.cols + col;
            float out[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float coarse = e4m3_value((ys >> (i * 8)) & 0xff);
                u32 power = __float_as_uint(coarse) & 0x7f800000;
                power = power < (121u << 23) ? 121u << 23 : power;
                const double last_place = (double)(__uint_as_float(power) * b_scale);
                own.y += last_place * last_place * unit;
                const float aligned = e4m3_value((xs >> (i * 8)) & 0xff) * a_scale;
                const float degraded = coarse * b_scale;
                out[i] = aligned - degraded;
                add_element(own, out[i], aligned != degraded, index + i);
            }
            d[r * across + v] = make_float4(out[0], out[1], out[2], out[3]);
        }
    }
    const Sums sum = block_sum<256>(own);
    if (threadIdx.x == 0) args.part[z][args.first_row / DELTA_ROWS + blockIdx.x] = sum;
}
