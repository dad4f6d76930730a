/* Choice of the instruction set, and single products. */
#include <stdlib.h>
#include <string.h>

#include "layout.h"
#include "ops.h"

#if defined(_M_X64)
#include <intrin.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif (defined(__aarch64__) || defined(_M_ARM64)) && defined(_WIN32)
#include <windows.h>
#endif

static cake_ops current;

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_M_X64)
static int has_avx2(void) {
  int r[4];
  __cpuid(r, 1);
  if ((r[2] & (1 << 27)) == 0 || (r[2] & (1 << 12)) == 0 || (r[2] & (1 << 29)) == 0 || (_xgetbv(0) & 6) != 6) return 0;
  __cpuidex(r, 7, 0);
  return (r[1] & (1 << 5)) != 0;
}
static int has_avx512(void) {
  int r[4];
  __cpuidex(r, 7, 0);
  const int needed = 1 << 16 | 1 << 17 | 1 << 30 | (int)(1u << 31); /* F, DQ, BW, VL */
  return has_avx2() && (_xgetbv(0) & 0xE6) == 0xE6 && (r[1] & needed) == needed && (r[2] & (1 << 11)) != 0;
}
static int has_bf16(void) {
  int r[4];
  __cpuidex(r, 7, 1);
  return (r[0] & (1 << 5)) != 0;
}
#else
static int has_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
static int has_bf16(void) { return __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

#if defined(__aarch64__) || defined(_M_ARM64)
static int has_dot_product(void) {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; /* ASIMDDP */
#elif defined(_WIN32)
  return IsProcessorFeaturePresent(43) != 0; /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */
#elif defined(__APPLE__)
  return 1; /* every Mac on ARM has it */
#else
  return 0;
#endif
}
#endif

static int use(const cake_ops *ops, const char *name, const char *wanted) {
  if (*wanted != '\0' && strcmp(name, wanted) != 0) return 0;
  current = *ops;
  current.name = name;
  return 1;
}

int32_t cake_use_isa(const char *name) {
#if defined(__x86_64__) || defined(_M_X64)
  if (has_avx512() && has_bf16() && use(&cake_ops_avx512, "avx512-bf16", name)) {
    current.matmul_bf16 = cake_matmul_avx512_bf16;
    current.round_bf16 = cake_round_avx512_bf16;
    current.bf16_bytes = 2;
    return 0;
  }
  if (has_avx512() && use(&cake_ops_avx512, "avx512", name)) return 0;
  if (has_avx2() && use(&cake_ops_avx2, "avx2", name)) return 0;
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
  if (has_dot_product() && use(&cake_ops_neon, "neon", name)) return 0;
#endif
  return use(&cake_ops_scalar, "scalar", name) ? 0 : -1;
}

const cake_ops *cake_current_ops(void) {
  if (current.name == NULL) cake_use_isa("");
  return &current;
}

const char *cake_isa(void) { return cake_current_ops()->name; }

int32_t cake_abi(void) { return CAKE_ABI; }

int32_t cake_want(int32_t type) {
  return type == CAKE_BF16 ? WANT_BF16 : type == CAKE_F32 || type == CAKE_F16 || type == CAKE_F8 ? WANT_FLOAT : WANT_UNITS;
}

void cake_prepare(const cake_ops *ops, int32_t wants, const float *x, int32_t row, int32_t cols, int32_t column, int32_t count,
                  const activations *a) {
  int64_t start = (int64_t)row * cols + column;
  if (wants & WANT_BF16) ops->round_bf16(x, count, (char *)a->bf16 + start * ops->bf16_bytes);
  if (wants & WANT_UNITS) ops->quantize(x, count, a->units + start / UNIT);
}

int64_t cake_activation_bytes(int32_t wants, int32_t m, int32_t cols) {
  int64_t values = (int64_t)m * cols, bytes = 0;
  if (wants & WANT_BF16) bytes += (values * cake_current_ops()->bf16_bytes + 63) / 64 * 64;
  if (wants & WANT_UNITS) bytes += (values / UNIT * (int64_t)sizeof(unit_act) + 63) / 64 * 64;
  return bytes;
}

activations cake_activations(int32_t wants, const float *x, int64_t x_stride, int32_t m, int32_t cols, char *memory) {
  activations a = {x, x_stride, NULL, NULL};
  if (wants & WANT_BF16) {
    a.bf16 = memory;
    memory += ((int64_t)m * cols * cake_current_ops()->bf16_bytes + 63) / 64 * 64;
  }
  if (wants & WANT_UNITS) a.units = (unit_act *)memory;
  return a;
}

int32_t cake_chunk(const cake_pool *pool, int32_t rows, int32_t m) {
  int32_t chunk = rows / (4 * cake_threads(pool));
  int32_t most = m > 16 ? 64 : 256; /* a chunk's weights stay in the cache while the rows of x pass */
  chunk = chunk > most ? most : chunk;
  return (chunk + 31) / 32 * 32 > 0 ? (chunk + 31) / 32 * 32 : 32;
}

void cake_product(const cake_ops *ops, const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end, float *y,
                  int64_t y_stride) {
  if (w->type == CAKE_BF16) ops->matmul_bf16(w, a, m, begin, end, y, y_stride);
  else ops->matmul(w, a, m, begin, end, y, y_stride);
}

typedef struct {
  const cake_ops *ops;
  const cake_matrix *w;
  const float *bias, *x;
  int64_t x_stride, y_stride;
  float *y;
  int32_t m;
  activations a;
} matmul_job;

static void matmul_work(void *argument, cake_worker *worker) {
  const matmul_job *job = argument;
  const cake_matrix *w = job->w;
  int32_t task, wants = cake_want(w->type);
  if (wants != WANT_FLOAT) {
    while ((task = cake_next(worker, job->m)) >= 0)
      cake_prepare(job->ops, wants, job->x + task * job->x_stride, task, w->cols, 0, w->cols, &job->a);
    cake_barrier(worker);
  }
  int32_t chunk = cake_chunk(worker->pool, w->rows, job->m);
  while ((task = cake_next(worker, (w->rows + chunk - 1) / chunk)) >= 0) {
    int32_t begin = task * chunk, end = begin + chunk < w->rows ? begin + chunk : w->rows;
    cake_product(job->ops, w, &job->a, job->m, begin, end, job->y, job->y_stride);
    if (job->bias == NULL) continue;
    for (int32_t i = 0; i < job->m; i++)
      for (int32_t row = begin; row < end; row++) job->y[i * job->y_stride + row] += job->bias[row];
  }
}

#define ROWS_A_PASS 512 /* bounds the scratch memory of a long prompt */

int32_t cake_matmul(cake_pool *pool, const cake_matrix *w, const float *bias, const float *x, int64_t x_stride, float *y,
                    int64_t y_stride, int32_t m) {
  for (int32_t first = 0; first < m; first += ROWS_A_PASS) {
    matmul_job job = {cake_current_ops(), w, bias, x + first * x_stride, x_stride, y_stride, y + first * y_stride, 0, {0}};
    job.m = m - first < ROWS_A_PASS ? m - first : ROWS_A_PASS;
    int32_t wants = cake_want(w->type);
    char *memory = cake_scratch(pool, cake_activation_bytes(wants, job.m, w->cols));
    if (memory == NULL && wants != WANT_FLOAT) return -1;
    job.a = cake_activations(wants, job.x, x_stride, job.m, w->cols, memory);
    cake_run(pool, matmul_work, &job);
  }
  return 0;
}

void cake_rms_norm(const float *x, const float *weight, float eps, int32_t rows, int32_t width, float *y) {
  for (int32_t i = 0; i < rows; i++)
    cake_current_ops()->rms_norm(x + (int64_t)i * width, weight, eps, width, y + (int64_t)i * width);
}
