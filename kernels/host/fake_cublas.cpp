// A libcublas.so.12 for the fake driver: matrix products by plain loops, done when the stream comes to them.
//
// Sums are f64 and rounded once, so a product is as near as one can be, and not the bits of any kernel. Column-major, as
// cuBLAS has it.

#include <dlfcn.h>

#include <cstddef>

namespace {

enum : int { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7 };

struct Handle {
    void* stream = nullptr;
};

struct Product {
    bool transpose_a, transpose_b;
    int m, n, k;
    float alpha, beta;
    const float *a, *b;
    float* c;
    size_t lda, ldb, ldc;
};

void run(void* data) {
    const Product* p = static_cast<Product*>(data);
    for (int i = 0; i < p->m; i++) {
        for (int j = 0; j < p->n; j++) {
            double sum = 0.0;
            for (int l = 0; l < p->k; l++) {
                const float a = p->transpose_a ? p->a[i * p->lda + l] : p->a[l * p->lda + i];
                const float b = p->transpose_b ? p->b[l * p->ldb + j] : p->b[j * p->ldb + l];
                sum += static_cast<double>(a) * b;
            }
            float& c = p->c[j * p->ldc + i];
            // As cuBLAS: what is multiplied by 0 is not read.
            c = static_cast<float>(p->alpha * sum + (p->beta == 0.0f ? 0.0 : static_cast<double>(p->beta) * c));
        }
    }
    delete p;
}

} // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cublasCreate_v2(Handle** out) {
    *out = new Handle;
    return SUCCESS;
}

API cublasDestroy_v2(Handle* handle) {
    delete handle;
    return SUCCESS;
}

API cublasSetStream_v2(Handle* handle, void* stream) {
    handle->stream = stream;
    return SUCCESS;
}

API cublasSetMathMode(Handle*, int) { return SUCCESS; }

API cublasSgemm_v2(Handle* handle, int transa, int transb, int m, int n, int k, const float* alpha, const float* a, int lda,
                   const float* b, int ldb, const float* beta, float* c, int ldc) {
    const int a_rows = transa ? k : m, b_rows = transb ? n : k;
    if (m < 0 || n < 0 || k < 0 || lda < a_rows || ldb < b_rows || ldc < m) return INVALID_VALUE;
    using Enqueue = int (*)(void*, void (*)(void*), void*);
    static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    static auto enqueue = driver ? reinterpret_cast<Enqueue>(dlsym(driver, "cuFakeEnqueue")) : nullptr;
    if (!enqueue) return NOT_INITIALIZED;
    auto* product = new Product{transa != 0, transb != 0, m, n, k, *alpha, *beta, a, b, c,
                                static_cast<size_t>(lda), static_cast<size_t>(ldb), static_cast<size_t>(ldc)};
    return enqueue(handle->stream, run, product);
}
