// Chains s = fma(b[i, k], a[k, j], s) over ascending k, from a difference (residual) or from 0 (addition to weights).
//
//   b [rows, rank], a [rank, cols] f32 row-major
//
// A block of 256 threads makes a tile of 64 x 64; a thread has 4 x 4 chains. blockIdx.x counts the tiles row by row. Every
// chain is that of the CPU, bit for bit.

#define CHAIN_TILE 64
#define CHAIN_SLICE 16

// Where this block's tile, and in it this thread's chains, are.
struct Tile {
    u32 across, row, col;
};

static __device__ __forceinline__ Tile tile_of(u32 cols) {
    const u32 across = (cols + CHAIN_TILE - 1) / CHAIN_TILE;
    const Tile tile = {across, blockIdx.x / across * CHAIN_TILE, blockIdx.x % across * CHAIN_TILE};
    return tile;
}

static __device__ __forceinline__ float fused(float x, float y, float s) { return fmaf(x, y, s); }
static __device__ __forceinline__ double fused(double x, double y, double s) { return fma(x, y, s); }

// Four neighbours, moved at once.
template <typename T>
struct alignas(16) Four {
    T v[4];
};

// Continues the chains of this thread: rows row0 + 4 ty + i, columns col0 + 4 tx + j, with b times `sign`.
template <typename T>
static __device__ __forceinline__ void chains(T (&s)[4][4], const Tile& tile, float sign, const float* b, const float* a,
                                              u32 rows, u32 cols, u32 rank) {
    __shared__ Four<T> b_tile[CHAIN_SLICE][CHAIN_TILE / 4 + 1], a_tile[CHAIN_SLICE][CHAIN_TILE / 4];
    const u32 row0 = tile.row, col0 = tile.col;
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (u32 k0 = 0; k0 < rank; k0 += CHAIN_SLICE) {
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            const u32 at = threadIdx.x + 256 * n;
            const u32 row = row0 + at / CHAIN_SLICE, b_k = k0 + at % CHAIN_SLICE;
            ((T*)b_tile[at % CHAIN_SLICE])[at / CHAIN_SLICE] =
                row < rows && b_k < rank ? (T)(sign * b[(u64)row * rank + b_k]) : (T)0;
            const u32 a_k = k0 + at / CHAIN_TILE, col = col0 + at % CHAIN_TILE;
            ((T*)a_tile[at / CHAIN_TILE])[at % CHAIN_TILE] = a_k < rank && col < cols ? (T)a[(u64)a_k * cols + col] : (T)0;
        }
        __syncthreads();
        // Not further than the rank: a factor of 0 would turn -0 into 0.
        const u32 depth = rank - k0 < CHAIN_SLICE ? rank - k0 : CHAIN_SLICE;
        for (u32 k = 0; k < depth; k++) {
            const Four<T> x = b_tile[k][ty], y = a_tile[k][tx];
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) s[i][j] = fused(x.v[i], y.v[j], s[i][j]);
            }
        }
        __syncthreads();
    }
}

struct ResidualArgs {
    const float* d[BATCH];
    const float* b[BATCH];
    const float* a[BATCH];
    Sums* part[BATCH];
    u32 rows, cols, rank, ld, first_row, unused;
};
ARGS(ResidualArgs, 4, 6);

// residual: part[tile].x = the sum over a tile of (d - b a)^2, in f64.
//   d [rows, ld]: the rows of a difference from first_row (a multiple of CHAIN_TILE) on; b begins with the same row
template <typename T>
static __device__ __forceinline__ void residual_tile(const ResidualArgs& args) {
    const u32 z = blockIdx.z, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const Tile tile = tile_of(args.cols);
    const u32 row0 = tile.row + 4 * ty, col0 = tile.col + 4 * tx;
    T s[4][4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const bool inside = row0 + i < args.rows && col0 + j < args.cols;
            s[i][j] = inside ? (T)args.d[z][(u64)(row0 + i) * args.ld + col0 + j] : (T)0;
        }
    }
    chains<T>(s, tile, -1.0f, args.b[z], args.a[z], args.rows, args.cols, args.rank);
    Sums own = nothing();
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (row0 + i < args.rows && col0 + j < args.cols) own.x += (double)s[i][j] * (double)s[i][j];
        }
    }
    const Sums sum = block_sum<256>(own);
    if (threadIdx.x == 0) args.part[z][(u64)(args.first_row / CHAIN_TILE) * tile.across + blockIdx.x] = sum;
}

KERNEL(residual_f32, ResidualArgs, 256) { residual_tile<float>(args); }
KERNEL(residual_f64, ResidualArgs, 256) { residual_tile<double>(args); }

struct AddArgs {
    u8* w[BATCH];
    const float* b[BATCH];
    const float* a[BATCH];
    Sums* part[BATCH];
    u32 rows, cols, rank, first_row;
};
ARGS(AddArgs, 4, 4);

// How a format is added to. Where s is 0 the stored bits are kept.
struct AddBf16 {
    typedef u16 Stored;
    static __device__ __forceinline__ double value(u16 w) { return (double)bf16_value(w); }
    static __device__ __forceinline__ u16 sum(u16 w, float s) { return bf16_bits(bf16_value(w) + s); }
};
struct AddF16 {
    typedef u16 Stored;
    static __device__ __forceinline__ double value(u16 w) { return (double)f16_value(w); }
    static __device__ __forceinline__ u16 sum(u16 w, float s) { return f16_bits(f16_value(w) + s); }
};
struct AddF32 {
    typedef float Stored;
    static __device__ __forceinline__ double value(float w) { return (double)w; }
    static __device__ __forceinline__ float sum(float w, float s) { return w + s; }
};
struct AddF64 {
    typedef double Stored;
    static __device__ __forceinline__ double value(double w) { return w; }
    static __device__ __forceinline__ double sum(double w, float s) { return w + (double)s; }
};

// add_low_rank: w = round(w + s), s the chain of b a from 0, in place.
//   w    [rows, cols] stored weights, the rows from first_row (a multiple of CHAIN_TILE) on; b begins with the same row
//   part one record for each tile of the whole matrix: x sum of s^2, y sum of the squared change, count elements that changed, first
//        2 * index + (1 if the weight was finite before) of the first result, or weight, that is not finite
template <typename Add>
static __device__ __forceinline__ void add_tile(const AddArgs& args) {
    typedef typename Add::Stored Stored;
    const u32 z = blockIdx.z, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const Tile tile = tile_of(args.cols);
    const u32 row0 = tile.row + 4 * ty, col0 = tile.col + 4 * tx;
    float s[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] = 0.0f;
    }
    chains<float>(s, tile, 1.0f, args.b[z], args.a[z], args.rows, args.cols, args.rank);
    Stored* w = (Stored*)args.w[z];
    Sums own = nothing();
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (row0 + i >= args.rows || col0 + j >= args.cols) continue;
            const u64 at = (u64)(row0 + i) * args.cols + col0 + j;
            const Stored stored = w[at];
            const double before = Add::value(stored);
            double after = before;
            if (s[i][j] != 0.0f) {
                const Stored added = Add::sum(stored, s[i][j]);
                after = Add::value(added);
                w[at] = added;
            }
            own.x += (double)s[i][j] * (double)s[i][j];
            own.y += (after - before) * (after - before);
            own.count += after != before ? 1 : 0;
            const bool was_finite = is_finite(before);
            if (!was_finite || !is_finite(after)) {
                const u64 fault = 2 * (at + (u64)args.first_row * args.cols) + (was_finite ? 1 : 0);
                own.first = fault < own.first ? fault : own.first;
            }
        }
    }
    const Sums sum = block_sum<256>(own);
    if (threadIdx.x == 0) args.part[z][(u64)(args.first_row / CHAIN_TILE) * tile.across + blockIdx.x] = sum;
}

KERNEL(add_bf16, AddArgs, 256) { add_tile<AddBf16>(args); }
KERNEL(add_f16, AddArgs, 256) { add_tile<AddF16>(args); }
KERNEL(add_f32, AddArgs, 256) { add_tile<AddF32>(args); }
KERNEL(add_f64, AddArgs, 256) { add_tile<AddF64>(args); }
