// Sums over a matrix: one record for each block of a launch, then one for the matrix, in an order that depends on the
// count of records only.

struct Sums {
    double x, y;  // sums of squares
    u64 count;
    u64 first;  // the lowest index that something is wrong with, or NONE
    u32 max;    // of bits
    u32 unused;
};

#define NONE 0xffffffffffffffffull

static __device__ __forceinline__ Sums nothing() {
    Sums sums = {0.0, 0.0, 0, NONE, 0, 0};
    return sums;
}

static __device__ __forceinline__ void add_sums(Sums& sum, const Sums& part) {
    sum.x += part.x;
    sum.y += part.y;
    sum.count += part.count;
    sum.first = part.first < sum.first ? part.first : sum.first;
    sum.max = part.max > sum.max ? part.max : sum.max;
}

// The sum over the threads of a block, a tree; THREADS is a power of two. Complete in thread 0.
template <int THREADS>
static __device__ __forceinline__ Sums block_sum(const Sums& own) {
    __shared__ Sums part[THREADS];
    part[threadIdx.x] = own;
    __syncthreads();
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) add_sums(part[threadIdx.x], part[threadIdx.x + half]);
        __syncthreads();
    }
    return part[0];
}

struct ReduceSumsArgs {
    const Sums* part[BATCH];
    Sums* out[BATCH];
    u32 parts, unused;
};
ARGS(ReduceSumsArgs, 2, 2);

// reduce_sums: out = the sum of `parts` records. One block a matrix.
KERNEL(reduce_sums, ReduceSumsArgs, 128) {
    Sums own = nothing();
    for (u32 i = threadIdx.x; i < args.parts; i += 128) add_sums(own, args.part[blockIdx.z][i]);
    const Sums sum = block_sum<128>(own);
    if (threadIdx.x == 0) *args.out[blockIdx.z] = sum;
}

struct SquaresArgs {
    const float* x[BATCH];
    Sums* part[BATCH];
    u64 len;
};
ARGS(SquaresArgs, 2, 2);

// squares: part[block].x = a share of the sum of x^2. The number of blocks is fixed (gridDim.x).
KERNEL(squares, SquaresArgs, 128) {
    const float* x = args.x[blockIdx.z];
    Sums own = nothing();
    for (u64 i = blockIdx.x * 128ull + threadIdx.x; i < args.len; i += gridDim.x * 128ull) {
        own.x += (double)x[i] * (double)x[i];
    }
    const Sums sum = block_sum<128>(own);
    if (threadIdx.x == 0) args.part[blockIdx.z][blockIdx.x] = sum;
}
