// The matrix products of cuBLAS, as plain loops on a stream of the emulated device. Matrices are
// column-major: A(i, p) is A[i + p · lda]. `__init__.py` adds the other functions
// of cuBLAS that CuPy links to: they answer "not supported".

#include <complex>
#include <cstdio>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

extern "C" {
int emulated_failing(const char* kind);
void emulated_note(const char* line);
void emulated_submit_product(void* stream, void (*run)(void*), void* data);
}

namespace {

constexpr int EXECUTION_FAILED = 13, NOT_SUPPORTED = 15;
enum Operation { PLAIN, TRANSPOSED, CONJUGATED };

template <typename T>
T element(const T* matrix, int leading, int operation, int row, int column) {
    if (operation == PLAIN) {
        return matrix[row + size_t(column) * leading];
    }
    const T value = matrix[column + size_t(row) * leading];
    if constexpr (!std::is_floating_point_v<T>) {
        return operation == CONJUGATED ? std::conj(value) : value;
    }
    return value;
}

// C = alpha op(A) op(B) + beta C, where op(A) is (m, k) and op(B) is (k, n).
template <typename T>
void product(int of_a, int of_b, int m, int n, int k, T alpha, const T* a, int lda, const T* b,
             int ldb, T beta, T* c, int ldc) {
    std::vector<T> rows(size_t(m) * k), column(k);
    for (int i = 0; i < m; ++i) {
        for (int p = 0; p < k; ++p) {
            rows[size_t(i) * k + p] = element(a, lda, of_a, i, p);
        }
    }
    for (int j = 0; j < n; ++j) {
        for (int p = 0; p < k; ++p) {
            column[p] = element(b, ldb, of_b, p, j);
        }
        for (int i = 0; i < m; ++i) {
            const T* row = rows.data() + size_t(i) * k;
            T sum = 0;
            for (int p = 0; p < k; ++p) {
                sum += row[p] * column[p];
            }
            T& to = c[i + size_t(j) * ldc];
            to = beta == T(0) ? alpha * sum : alpha * sum + beta * to;
        }
    }
}

void* stream;
int pointer_mode;

int submit(const char* name, std::function<void()> work) {
    emulated_note((std::string("product ") + name).c_str());
    if (emulated_failing("product") != 0) {
        return EXECUTION_FAILED;
    }
    emulated_submit_product(
        stream,
        [](void* data) {  // a captured product would be run twice, but none can be captured
            auto* given = static_cast<std::function<void()>*>(data);
            (*given)();
            delete given;
        },
        new std::function<void()>(std::move(work)));
    return 0;
}

// cudaDataType: real and complex numbers of 32 and 64 bits.
enum Type { R32 = 0, R64 = 1, C32 = 4, C64 = 5 };

template <typename T>
int typed(const char* name, int of_a, int of_b, int m, int n, int k, const void* alpha,
          const void* a, int lda, long long step_a, const void* b, int ldb, long long step_b,
          const void* beta, void* c, int ldc, long long step_c, int count) {
    const T first = *static_cast<const T*>(alpha), second = *static_cast<const T*>(beta);
    return submit(name, [=] {
        for (int i = 0; i < count; ++i) {
            product<T>(of_a, of_b, m, n, k, first, static_cast<const T*>(a) + i * step_a, lda,
                       static_cast<const T*>(b) + i * step_b, ldb, second,
                       static_cast<T*>(c) + i * step_c, ldc);
        }
    });
}

}  // namespace

extern "C" {

#define PRODUCTS(letter, T)                                                                        \
    int cublas##letter##gemm_v2(void*, int of_a, int of_b, int m, int n, int k, const T* alpha,    \
                                const T* a, int lda, const T* b, int ldb, const T* beta, T* c,     \
                                int ldc) {                                                         \
        return typed<T>("gemm", of_a, of_b, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, \
                        1);                                                                        \
    }                                                                                              \
    int cublas##letter##gemmStridedBatched(void*, int of_a, int of_b, int m, int n, int k,         \
                                           const T* alpha, const T* a, int lda, long long step_a,  \
                                           const T* b, int ldb, long long step_b, const T* beta,   \
                                           T* c, int ldc, long long step_c, int count) {           \
        return typed<T>("gemmStridedBatched", of_a, of_b, m, n, k, alpha, a, lda, step_a, b, ldb,  \
                        step_b, beta, c, ldc, step_c, count);                                      \
    }                                                                                              \
    int cublas##letter##gemmBatched(void*, int of_a, int of_b, int m, int n, int k,                \
                                    const T* alpha, const T** a, int lda, const T** b, int ldb,    \
                                    const T* beta, T** c, int ldc, int count) {                    \
        const T first = *alpha, second = *beta;                                                    \
        return submit("gemmBatched", [=] {                                                         \
            for (int i = 0; i < count; ++i) {                                                      \
                product<T>(of_a, of_b, m, n, k, first, a[i], lda, b[i], ldb, second, c[i], ldc);   \
            }                                                                                      \
        });                                                                                        \
    }
PRODUCTS(S, float)
PRODUCTS(D, double)
PRODUCTS(C, std::complex<float>)
PRODUCTS(Z, std::complex<double>)

int cublasGemmStridedBatchedEx(void*, int of_a, int of_b, int m, int n, int k, const void* alpha,
                               const void* a, int type_a, int lda, long long step_a, const void* b,
                               int type_b, int ldb, long long step_b, const void* beta, void* c,
                               int type_c, int ldc, long long step_c, int count, int, int) {
    const char* name = "gemmStridedBatchedEx";
#define TYPED(T)                                                                               \
    return typed<T>(name, of_a, of_b, m, n, k, alpha, a, lda, step_a, b, ldb, step_b, beta, c, \
                    ldc, step_c, count)
    if (type_a == type_b && type_a == type_c) {
        switch (type_a) {
            case R32:
                TYPED(float);
            case R64:
                TYPED(double);
            case C32:
                TYPED(std::complex<float>);
            case C64:
                TYPED(std::complex<double>);
        }
    }
    return NOT_SUPPORTED;
}
int cublasGemmEx(void* handle, int of_a, int of_b, int m, int n, int k, const void* alpha,
                 const void* a, int type_a, int lda, const void* b, int type_b, int ldb,
                 const void* beta, void* c, int type_c, int ldc, int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, of_a, of_b, m, n, k, alpha, a, type_a, lda, 0, b,
                                      type_b, ldb, 0, beta, c, type_c, ldc, 0, 1, compute,
                                      algorithm);
}

int cublasCreate_v2(void** handle) { return *handle = &pointer_mode, 0; }
int cublasDestroy_v2(void*) { return 0; }
int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
int cublasSetMathMode(void*, int) { return 0; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = pointer_mode, 0; }
int cublasSetPointerMode_v2(void*, int mode) { return pointer_mode = mode, 0; }
int cublasGetStream_v2(void*, void** current) { return *current = stream, 0; }
int cublasSetStream_v2(void*, void* current) { return stream = current, 0; }
int cublasGetVersion_v2(void*, int* version) { return *version = 130100, 0; }
}
