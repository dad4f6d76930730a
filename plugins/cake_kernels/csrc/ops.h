/* What each instruction set provides, and the values that pass between the parts. Not part of the interface. */
#ifndef CAKE_OPS_H
#define CAKE_OPS_H

#include "cake_kernels.h"

#define GROUP_ROWS 16 /* rows whose weights are interleaved: the lanes of a vector */
#define UNIT 32       /* columns that share a scale of the activations */

/* 32 activations in 8 bit: x ~ q * scale. */
typedef struct {
  int8_t q[UNIT];
  float scale;
  float scaled_sum;     /* scale * (sums[0] + sums[1]) */
  int32_t sums[2];      /* of q, of either half */
} unit_act;

/* How a product wants its activations. */
enum { WANT_FLOAT = 1, WANT_BF16 = 2, WANT_UNITS = 4 };

/* The same rows in every form that was asked for. */
typedef struct {
  const float *f32;
  int64_t f32_stride;
  void *bf16; /* [m, cols]: rounded to bf16, in as many bytes as the product wants */
  unit_act *units; /* [m, cols / UNIT] */
} activations;

#define ATTEND_KEYS 32 /* positions of the cache that many rows attend to at a time */

/* Successive positions of a sequence and `queries` heads of each, which share a key/value head. */
typedef struct {
  const cake_shape *shape;
  const cake_layer *layer;
  const int32_t *table;
  int32_t kv_head, queries, position, rows;
  const float *q; /* [rows, queries, head_dim], rows `stride` apart, as in `out` */
  float *out;
  int64_t stride;
  float *scratch;
} attention_task;

typedef struct {
  const char *name;
  /* Rows [begin, end) of W against all m rows of the activations; begin is a multiple of GROUP_ROWS. */
  void (*matmul)(const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end, float *y, int64_t y_stride);
  void (*matmul_bf16)(const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end, float *y,
                      int64_t y_stride);
  void (*quantize)(const float *x, int32_t n, unit_act *out);
  void (*round_bf16)(const float *x, int32_t n, void *out); /* for matmul_bf16, in `bf16_bytes` each: 2, or 4 as f32 */
  int32_t bf16_bytes;
  void (*rms_norm)(const float *x, const float *weight, float eps, int32_t n, float *y);
  void (*gate)(const float *gate, const float *up, int32_t activation, int32_t n, float *y);
  void (*store_kv)(const float *x, int32_t type, int32_t n, void *out, float *scale);
  void (*attend)(const attention_task *task);      /* one row; scratch [queries, position + 1] */
  void (*attend_rows)(const attention_task *task); /* up to `lanes` rows * queries; scratch: cake_rows_scratch */
  int32_t lanes;
} cake_ops;

/* Floats. */
static inline int64_t cake_rows_scratch(int32_t lanes, int32_t head_dim) {
  return 2 * (int64_t)head_dim * (lanes + ATTEND_KEYS) + lanes * ATTEND_KEYS;
}

extern const cake_ops cake_ops_scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const cake_ops cake_ops_avx2;
extern const cake_ops cake_ops_avx512;
void cake_matmul_avx512_bf16(const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end, float *y,
                             int64_t y_stride);
void cake_round_avx512_bf16(const float *x, int32_t n, void *out);
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
extern const cake_ops cake_ops_neon;
#endif

const cake_ops *cake_current_ops(void);

/* Threads. `work` is a row of phases, each of them some tasks and a barrier. Every thread of the pool may run it, but only the
   caller must: a phase is over when its tasks are done, so a thread that the system has taken off its processor holds nobody up
   unless it is in the middle of a task. */
typedef struct {
  cake_pool *pool;
  int32_t index;  /* 0: the caller */
  uint32_t phase; /* it is in */
  int32_t holds;  /* a task */
} cake_worker;

typedef void (*cake_work)(void *argument, cake_worker *worker);
void cake_run(cake_pool *pool, cake_work work, void *argument);
/* The next of the `tasks` (at least one) tasks of this phase, or -1 when all are taken. Asking ends the task before. */
int32_t cake_next(cake_worker *worker, int32_t tasks);
/* Waits until all tasks of the phase are done. Only after `cake_next` has returned -1. */
void cake_barrier(cake_worker *worker);
int32_t cake_threads(const cake_pool *pool);
/* Memory of the pool's that grows, 64-byte aligned; what was in it is lost. NULL when there is none. */
char *cake_scratch(cake_pool *pool, int64_t bytes);

/* Which form of the activations a weight type is multiplied with, and row `row` of m brought into the forms asked for:
   `count` values from column `column` on, a multiple of UNIT where units are wanted. */
int32_t cake_want(int32_t type);
void cake_prepare(const cake_ops *ops, int32_t wants, const float *x, int32_t row, int32_t cols, int32_t column, int32_t count,
                  const activations *a);
int64_t cake_activation_bytes(int32_t wants, int32_t m, int32_t cols);
/* Lays the forms out in `memory` of that many bytes. */
activations cake_activations(int32_t wants, const float *x, int64_t x_stride, int32_t m, int32_t cols, char *memory);
/* Rows a task of a product with `rows` rows takes. */
int32_t cake_chunk(const cake_pool *pool, int32_t rows, int32_t m);
/* Rows [begin, end) of the product. */
void cake_product(const cake_ops *ops, const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end, float *y,
                  int64_t y_stride);

#endif
