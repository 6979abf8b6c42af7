// Matrices rounded to a format, and moved into others.

struct PackArgs {
    const float* x[BATCH];
    u8* out[BATCH];
    Sums* part[BATCH];
    u64 len;
    u32 type, unused;
};
ARGS(PackArgs, 3, 4);

// pack: out[i] = x[i] in a format, to nearest even. part[block].first is the lowest index of a finite value that became
// infinite. One block for each 4096 elements.
KERNEL(pack, PackArgs, 256) {
    const u32 z = blockIdx.z;
    const u64 begin = blockIdx.x * 4096ull;
    const u64 end = args.len - begin < 4096 ? args.len : begin + 4096;
    Sums own = nothing();
    for (u64 i = begin + threadIdx.x; i < end; i += 256) {
        const float x = args.x[z][i];
        bool lost = false;
        switch (args.type) {
            case F64: ((double*)args.out[z])[i] = (double)x; break;
            case F32: ((float*)args.out[z])[i] = x; break;
            case F16: {
                const u16 bits = f16_bits(x);
                ((u16*)args.out[z])[i] = bits;
                lost = (bits & 0x7fff) == 0x7c00 && is_finite(x);
                break;
            }
            default: {
                const u16 bits = bf16_bits(x);
                ((u16*)args.out[z])[i] = bits;
                lost = (bits & 0x7fff) == 0x7f80 && is_finite(x);
            }
        }
        if (lost && i < own.first) own.first = i;
    }
    const Sums sum = block_sum<256>(own);
    if (threadIdx.x == 0) args.part[z][blockIdx.x] = sum;
}

struct PlaceArgs {
    const float* x[BATCH];
    float* out[BATCH];
    u64 len;
    u32 cols, ld_in, ld_out;
    float factor;
};
ARGS(PlaceArgs, 2, 6);

// place: out[row, col] = factor * x[row, col], with strides of their own. `len` counts elements, row by row.
KERNEL(place, PlaceArgs, 256) {
    const u64 i = blockIdx.x * 256ull + threadIdx.x;
    if (i >= args.len) return;
    const u64 row = i / args.cols, col = i % args.cols;
    args.out[blockIdx.z][row * args.ld_out + col] = args.factor * args.x[blockIdx.z][row * args.ld_in + col];
}
