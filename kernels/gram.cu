// Y^T Y, and Y times a small matrix, with products and sums in f64.

#define GRAM_SPLIT 256
#define GRAM_TILE 32
#define GRAM_SLICE 16

struct GramArgs {
    const float* y[BATCH];
    double* part[BATCH];
    u32 rows, cols;
};
ARGS(GramArgs, 2, 2);

// gram: part[split, i, j] = the sum of y[k, i] y[k, j] over a split's GRAM_SPLIT rows, for the tiles on and below the
// diagonal.
//   y [rows, cols] f32. One block of 64 threads for each tile (blockIdx.x counts those below the diagonal row by row) and
//   split (blockIdx.y); a thread has 4 x 4 sums.
KERNEL(gram, GramArgs, 64) {
    __shared__ double left[GRAM_SLICE][GRAM_TILE], right[GRAM_SLICE][GRAM_TILE];
    u32 tile_row = 0, tile_col = blockIdx.x;
    while (tile_col > tile_row) {
        tile_row++;
        tile_col -= tile_row;
    }
    const u32 i0 = tile_row * GRAM_TILE, j0 = tile_col * GRAM_TILE, tx = threadIdx.x % 8, ty = threadIdx.x / 8;
    const u32 begin = blockIdx.y * GRAM_SPLIT;
    const u32 end = args.rows - begin < GRAM_SPLIT ? args.rows : begin + GRAM_SPLIT;
    const float* y = args.y[blockIdx.z];
    double sum[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = 0.0;
    }
    for (u32 k0 = begin; k0 < end; k0 += GRAM_SLICE) {
#pragma unroll
        for (u32 n = 0; n < GRAM_SLICE * GRAM_TILE / 64; n++) {
            const u32 at = threadIdx.x + 64 * n, k = k0 + at / GRAM_TILE, c = at % GRAM_TILE;
            const float* row = y + (u64)k * args.cols;
            left[at / GRAM_TILE][c] = k < end && i0 + c < args.cols ? (double)row[i0 + c] : 0.0;
            right[at / GRAM_TILE][c] = k < end && j0 + c < args.cols ? (double)row[j0 + c] : 0.0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < GRAM_SLICE; k++) {
            double a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = left[k][ty + 8 * i];
                b[i] = right[k][tx + 8 * i];
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] = fma(a[i], b[j], sum[i][j]);
            }
        }
        __syncthreads();
    }
    double* part = args.part[blockIdx.z] + (u64)blockIdx.y * args.cols * args.cols;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 row = i0 + ty + 8 * i, col = j0 + tx + 8 * j;
            if (row < args.cols && col < args.cols) part[(u64)row * args.cols + col] = sum[i][j];
        }
    }
}

struct GramSumArgs {
    const double* part[BATCH];
    double* out[BATCH];
    u32 parts, cols;
};
ARGS(GramSumArgs, 2, 2);

// gram_sum: out [cols, cols] = the parts added in their order, and the upper half from the lower.
KERNEL(gram_sum, GramSumArgs, 128) {
    const u64 len = (u64)args.cols * args.cols, at = blockIdx.x * 128ull + threadIdx.x;
    if (at >= len) return;
    const u64 i = at / args.cols, j = at % args.cols, from = i >= j ? at : j * args.cols + i;
    double sum = 0.0;
    for (u32 p = 0; p < args.parts; p++) sum += args.part[blockIdx.z][p * len + from];
    args.out[blockIdx.z][at] = sum;
}

struct ApplyArgs {
    const float* y[BATCH];
    const double* w[BATCH];
    float* out[BATCH];
    u32 rows, depth, cols, unused;
};
ARGS(ApplyArgs, 3, 4);

// apply: out [rows, cols] = y [rows, depth] w [depth, cols], w in f64, over ascending depth in f64, rounded once.
//   One block of 128 threads for each 64 x 32; a thread has 4 x 4 sums.
KERNEL(apply, ApplyArgs, 128) {
    __shared__ double left[16][64 + 1], right[16][32];
    const u32 row0 = blockIdx.x * 64, col0 = blockIdx.y * 32, tx = threadIdx.x % 8, ty = threadIdx.x / 8;
    const float* y = args.y[blockIdx.z];
    const double* w = args.w[blockIdx.z];
    double sum[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = 0.0;
    }
    for (u32 k0 = 0; k0 < args.depth; k0 += 16) {
#pragma unroll
        for (u32 n = 0; n < 8; n++) {
            const u32 at = threadIdx.x + 128 * n, row = row0 + at / 16, k = k0 + at % 16;
            left[at % 16][at / 16] =
                row < args.rows && k < args.depth ? (double)y[(u64)row * args.depth + k] : 0.0;
        }
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            const u32 at = threadIdx.x + 128 * n, k = k0 + at / 32, col = col0 + at % 32;
            right[at / 32][at % 32] = k < args.depth && col < args.cols ? w[(u64)k * args.cols + col] : 0.0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 16; k++) {
            double a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = left[k][ty + 16 * i];
                b[i] = right[k][tx + 8 * i];
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] = fma(a[i], b[j], sum[i][j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 row = row0 + ty + 16 * i, col = col0 + tx + 8 * j;
            if (row < args.rows && col < args.cols) {
                args.out[blockIdx.z][(u64)row * args.cols + col] = (float)sum[i][j];
            }
        }
    }
}
