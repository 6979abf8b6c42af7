// The random integers of a sketch: x[row, col] = popcount(word) - 16, where the words are Philox4x32-10 (Salmon et al., 2011)
// at counter (col / 4, row, key) under seed. Bit for bit that of the CPU.
//
//   x [rows, cols] f32. One thread for each four columns of a row.

struct SketchArgs {
    float* x[BATCH];
    u64 key[BATCH];
    u64 seed;
    u32 rows, cols;
};
ARGS(SketchArgs, 2, 4);

KERNEL(sketch, SketchArgs, 128) {
    const u32 across = (args.cols + 3) / 4;
    const u64 i = blockIdx.x * 128ull + threadIdx.x;
    if (i >= (u64)args.rows * across) return;
    const u32 row = (u32)(i / across), block = (u32)(i % across);
    const u64 key = args.key[blockIdx.z];
    u32 c0 = block, c1 = row, c2 = (u32)key, c3 = (u32)(key >> 32);
    u32 k0 = (u32)args.seed, k1 = (u32)(args.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const u32 words[4] = {c0, c1, c2, c3};
    float* x = args.x[blockIdx.z] + (u64)row * args.cols + 4 * block;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
        if (4 * block + j < args.cols) x[j] = (float)__popc(words[j]) - 16.0f;
    }
}
