// Products of f32 matrices with few columns: C = A B, and C = A^T B.
//
// The sum over the depth is cut into parts of SPLIT, one block each, so that a long thin product fills the device and no
// chain of f32 additions is longer than SPLIT. reduce_parts adds the parts in their order in f64 and rounds once. Nothing
// of this depends on the device.
//
//   gemm_nn   a [rows, depth] (lda), b [depth, cols] row-major
//   gemm_tn   a [depth, rows] (lda), b [depth, cols] row-major
//   part      [splits, rows, cols]
//
// A block makes a tile of 128 rows and 24 or 72 columns from slices of 16: a slice is loaded into registers while the one
// before, in shared memory, is multiplied; a thread has 8 x 6 sums. blockIdx.z = matrix * splits + split.

#define SPLIT 256
#define TILE_ROWS 128
#define SLICE 16

struct GemmArgs {
    const float* a[BATCH];
    const float* b[BATCH];
    float* part[BATCH];
    u32 rows, cols, depth, lda, splits, unused;
};
ARGS(GemmArgs, 3, 6);

template <bool TRANSPOSED, int GROUPS>
static __device__ __forceinline__ void gemm_tile(const GemmArgs& args) {
    const int THREADS = 16 * GROUPS, COLS = 6 * GROUPS;
    const int A_LOADS = (TILE_ROWS * SLICE / 4 + THREADS - 1) / THREADS, B_LOADS = SLICE * COLS / THREADS;
    __shared__ float4 a_tile[2][SLICE][TILE_ROWS / 4 + 1];
    __shared__ float2 b_tile[2][SLICE][COLS / 2];

    const u32 z = blockIdx.z / args.splits, split = blockIdx.z % args.splits;
    const u32 row0 = blockIdx.x * TILE_ROWS, col0 = blockIdx.y * COLS;
    const u32 begin = split * SPLIT, end = args.depth - begin < SPLIT ? args.depth : begin + SPLIT;
    const float *a = args.a[z], *b = args.b[z];
    const bool whole = args.lda % 4 == 0;
    const int tid = threadIdx.x, tx = tid % GROUPS, ty = tid / GROUPS;

    float4 next_a[A_LOADS];
    float next_b[B_LOADS];
    float sum[8][6];
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int j = 0; j < 6; j++) sum[i][j] = 0.0f;
    }

    // Loads the slice that begins at k0; what lies outside of the matrices is 0.
    auto load = [&](u32 k0) {
#pragma unroll
        for (int n = 0; n < A_LOADS; n++) {
            const u32 at = tid + n * THREADS;
            float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (at < TILE_ROWS * SLICE / 4) {
                // Four neighbours along the rows of what is stored: of the depth, or transposed of the result.
                const u32 outer = TRANSPOSED ? k0 + at / (TILE_ROWS / 4) : row0 + at / (SLICE / 4);
                const u32 inner = TRANSPOSED ? row0 + at % (TILE_ROWS / 4) * 4 : k0 + at % (SLICE / 4) * 4;
                const u32 outer_end = TRANSPOSED ? end : args.rows, inner_end = TRANSPOSED ? args.rows : end;
                if (outer < outer_end && inner < inner_end) {
                    const float* from = a + (u64)outer * args.lda + inner;
                    if (whole) {
                        // A row is padded to whole vectors; the padding holds anything.
                        const float4 v = *(const float4*)from;
                        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
                    }
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        if (inner + i >= inner_end) {
                            x[i] = 0.0f;
                        } else if (!whole) {
                            x[i] = from[i];
                        }
                    }
                }
            }
            next_a[n] = make_float4(x[0], x[1], x[2], x[3]);
        }
#pragma unroll
        for (int n = 0; n < B_LOADS; n++) {
            const u32 at = tid + n * THREADS, k = k0 + at / COLS, col = col0 + at % COLS;
            next_b[n] = k < end && col < args.cols ? b[(u64)k * args.cols + col] : 0.0f;
        }
    };
    auto store = [&](int into) {
#pragma unroll
        for (int n = 0; n < A_LOADS; n++) {
            const int at = tid + n * THREADS;
            if (at < TILE_ROWS * SLICE / 4) {
                if (TRANSPOSED) {
                    a_tile[into][at / (TILE_ROWS / 4)][at % (TILE_ROWS / 4)] = next_a[n];
                } else {
                    const int row = at / (SLICE / 4), k = at % (SLICE / 4) * 4;
                    ((float*)a_tile[into][k])[row] = next_a[n].x;
                    ((float*)a_tile[into][k + 1])[row] = next_a[n].y;
                    ((float*)a_tile[into][k + 2])[row] = next_a[n].z;
                    ((float*)a_tile[into][k + 3])[row] = next_a[n].w;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < B_LOADS; n++) {
            const int at = tid + n * THREADS;
            ((float*)b_tile[into][at / COLS])[at % COLS] = next_b[n];
        }
    };

    load(begin);
    store(0);
    __syncthreads();
    int now = 0;
    for (u32 k0 = begin; k0 < end; k0 += SLICE) {
        const bool more = k0 + SLICE < end;
        if (more) load(k0 + SLICE);
#pragma unroll
        for (int k = 0; k < SLICE; k++) {
            const float4 low = a_tile[now][k][2 * ty], high = a_tile[now][k][2 * ty + 1];
            const float2 b0 = b_tile[now][k][3 * tx], b1 = b_tile[now][k][3 * tx + 1], b2 = b_tile[now][k][3 * tx + 2];
            const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            const float y[6] = {b0.x, b0.y, b1.x, b1.y, b2.x, b2.y};
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int j = 0; j < 6; j++) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
            }
        }
        if (more) store(1 - now);
        __syncthreads();
        now = 1 - now;
    }

    float* part = args.part[z] + (u64)split * args.rows * args.cols;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 row = row0 + 8 * ty + i;
#pragma unroll
        for (int j = 0; j < 6; j++) {
            const u32 col = col0 + 6 * tx + j;
            if (row < args.rows && col < args.cols) part[(u64)row * args.cols + col] = sum[i][j];
        }
    }
}

KERNEL(gemm_nn_24, GemmArgs, 64) { gemm_tile<false, 4>(args); }
KERNEL(gemm_nn_72, GemmArgs, 192) { gemm_tile<false, 12>(args); }
KERNEL(gemm_tn_24, GemmArgs, 64) { gemm_tile<true, 4>(args); }
KERNEL(gemm_tn_72, GemmArgs, 192) { gemm_tile<true, 12>(args); }

struct ReducePartsArgs {
    const float* part[BATCH];
    double* sum[BATCH];
    float* out[BATCH];
    u64 len;
    u32 parts, first, last, unused;
};
ARGS(ReducePartsArgs, 3, 6);

// reduce_parts: out[i] = the sum of part[p, i] over ascending p, in f64, rounded once. A sum that goes on over several
// launches begins where `first` is, ends where `last` is, and rests in `sum` in between.
KERNEL(reduce_parts, ReducePartsArgs, 256) {
    const u32 z = blockIdx.z;
    const u64 i = blockIdx.x * 256ull + threadIdx.x;
    if (i >= args.len) return;
    double sum = args.first ? 0.0 : args.sum[z][i];
    for (u32 p = 0; p < args.parts; p++) sum += (double)args.part[z][p * args.len + i];
    if (args.last) {
        args.out[z][i] = (float)sum;
    } else {
        args.sum[z][i] = sum;
    }
}
