// The products that MLX computes by CBLAS, forwarded to the OpenBLAS in numpy's wheel, which has 64-bit integers and
// names of its own. Loaded into the global scope before MLX, these definitions come before those of MLX's own BLAS.

using Int = long long;

extern "C" {
void scipy_cblas_sgemm64_(int, int, int, Int, Int, Int, float, const float*, Int, const float*, Int, float, float*, Int);
void scipy_cblas_dgemm64_(
    int, int, int, Int, Int, Int, double, const double*, Int, const double*, Int, double, double*, Int);
void scipy_cblas_cgemm64_(
    int, int, int, Int, Int, Int, const void*, const void*, Int, const void*, Int, const void*, void*, Int);
int scipy_openblas_get_num_threads64_();
void scipy_openblas_set_num_threads64_(int);
}

static unsigned long long products = 0;

// Products of fewer multiply-adds take one thread: waiting for a second one, which may have to be woken or, on a busy
// machine, wait for its turn, takes longer than the product.
static constexpr double SMALL = 1 << 24;

static void begin(double m, double n, double k) {
  static const int all = scipy_openblas_get_num_threads64_();
  static int current = all;
  const int wanted = m * n * k < SMALL ? 1 : all;
  if (wanted != current)
    scipy_openblas_set_num_threads64_(current = wanted);
  __atomic_fetch_add(&products, 1, __ATOMIC_RELAXED);
}

extern "C" {

unsigned long long attention_blas_products() {
  return __atomic_load_n(&products, __ATOMIC_RELAXED);
}

void cblas_sgemm(
    int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
    int ldb, float beta, float* c, int ldc) {
  begin(m, n, k);
  scipy_cblas_sgemm64_(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_dgemm(
    int order, int trans_a, int trans_b, int m, int n, int k, double alpha, const double* a, int lda, const double* b,
    int ldb, double beta, double* c, int ldc) {
  begin(m, n, k);
  scipy_cblas_dgemm64_(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_cgemm(
    int order, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a, int lda, const void* b,
    int ldb, const void* beta, void* c, int ldc) {
  begin(m, n, k);
  scipy_cblas_cgemm64_(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}
