/* Products of packed weights on the CPU, and one decode step of a run of Llama-like layers.

   The whole interface: C types only, no state but the pool's, so that ctypes can call it. Pointers are borrowed, never kept
   beyond a call. Every function is safe to call from several threads as long as they use different pools. */
#ifndef CAKE_KERNELS_H
#define CAKE_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define CAKE_API __declspec(dllexport)
#else
#define CAKE_API __attribute__((visibility("default")))
#endif

#define CAKE_ABI 4

/* Numbers of GGUF where GGUF has the type. */
enum cake_type {
  CAKE_F32 = 0,
  CAKE_F16 = 1,
  CAKE_Q4_0 = 2,
  CAKE_Q4_1 = 3,
  CAKE_Q5_0 = 6,
  CAKE_Q5_1 = 7,
  CAKE_Q8_0 = 8,
  CAKE_Q4_K = 12,
  CAKE_Q5_K = 13,
  CAKE_Q6_K = 14,
  CAKE_I8 = 24, /* KV cache only: int8 with one f32 scale a vector */
  CAKE_BF16 = 30,
  CAKE_G4 = 100, /* group-wise 4 bit: (q - zero) * scale, groups of a multiple of 32 columns */
  CAKE_G8 = 101, /* the same with 8 bit */
  /* 8-bit floats (e4m3), row after row, then f32 scales [rows, ceil(cols / group)]; groups of a multiple of 16
     columns, or of all */
  CAKE_F8 = 102
};

/* W[rows, cols]. f32, f16, bf16 and f8 lie row after row as in the file; the others are packed by `cake_pack`. */
typedef struct {
  const void *data;
  int32_t type, rows, cols, group; /* group: columns a scale for CAKE_G4, CAKE_G8 and CAKE_F8, else 0 */
} cake_matrix;

typedef struct cake_pool cake_pool;

CAKE_API int32_t cake_abi(void);
/* "scalar", "avx2", "avx512", "avx512-bf16" or "neon". */
CAKE_API const char *cake_isa(void);
/* Chooses by name, "" for the best this processor has. 0, or -1 when it lacks it. Before any other call. */
CAKE_API int32_t cake_use_isa(const char *name);

/* A pool of `threads` threads, the caller's among them: a pool of one starts none. A pool serves one call at a time. */
CAKE_API cake_pool *cake_pool_new(int32_t threads);
CAKE_API void cake_pool_free(cake_pool *pool);

/* Asks the system for large pages for memory that is not written yet. Does nothing where it cannot. */
CAKE_API void cake_use_large_pages(void *memory, int64_t bytes);

/* Bytes of a packed matrix, -1 for a shape or type that cannot be packed. */
CAKE_API int64_t cake_packed_bytes(int32_t type, int32_t rows, int32_t cols, int32_t group);
/* GGUF blocks, row after row, into `out` (64-byte aligned). Packed row i is source row order[i]; NULL: in order. */
CAKE_API int32_t cake_pack(cake_pool *pool, int32_t type, int32_t rows, int32_t cols, const void *blocks, const int32_t *order,
                           void *out);
/* Group-wise weights: codes u8 [rows, cols], or in 4 bit [rows, cols / 2] with the nibbles of 32 columns as GGUF has them; scales
   f16 and zeros u8 [rows, ceil(cols / group)]. */
CAKE_API int32_t cake_pack_groups(cake_pool *pool, const cake_matrix *shape, const uint8_t *codes, const uint16_t *scales,
                                  const uint8_t *zeros, void *out);
/* out[i] = row ids[i] of the matrix, in f32. -1 when an id is out of range. */
CAKE_API int32_t cake_rows(const cake_matrix *w, const int32_t *ids, int32_t count, float *out);

/* y[m, rows] = x[m, cols] * W^T (+ bias). Strides in floats. A row's result does not depend on the other rows of x. */
CAKE_API int32_t cake_matmul(cake_pool *pool, const cake_matrix *w, const float *bias, const float *x, int64_t x_stride,
                             float *y, int64_t y_stride, int32_t m);

/* What all layers of a model share. */
typedef struct {
  int32_t hidden, heads, kv_heads, head_dim, inner; /* inner: width of the feed-forward */
  int32_t rotary_dim;                               /* leading dimensions of a head that are rotated, i with i + rotary_dim / 2 */
  int32_t activation;                               /* of the gate: 0 silu, 1 gelu (tanh) */
  int32_t kv_type, kv_block;                        /* CAKE_F32, F16, BF16 or I8; positions a KV block */
  float norm_eps, scale;                            /* scale: of the attention scores */
} cake_shape;

/* One layer. Null: absent. Norm weights and biases are f32. */
typedef struct {
  cake_matrix q, k, v, o, gate, up, down;
  const float *attention_norm, *mlp_norm, *q_norm, *k_norm, *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias,
      *up_bias, *down_bias;
  void *keys, *values;          /* [blocks, kv_block, kv_heads, head_dim] */
  float *key_scale, *value_scale; /* CAKE_I8: [blocks, kv_block, kv_heads] */
  int32_t window;               /* positions attended to, 0: all */
} cake_layer;

/* Runs of successive positions, each of a sequence of its own, one after another. */
typedef struct {
  int32_t rows, runs, table_stride;
  const int32_t *positions;     /* [rows] */
  const int32_t *lengths;       /* [runs]: rows of each */
  const int32_t *tables;        /* [runs, table_stride]: KV block numbers of each run's sequence */
  const float *cosines, *sines; /* [rows, rotary_dim / 2]: of each row's angles */
} cake_step;

/* x[rows, hidden] through `count` layers, in place; writes the rows' keys and values into the cache. 0, or -1: no memory. */
CAKE_API int32_t cake_decode(cake_pool *pool, const cake_shape *shape, const cake_layer *layers, int32_t count,
                             const cake_step *step, float *x);

/* y = x / rms(x) * weight, row by row. */
CAKE_API void cake_rms_norm(const float *x, const float *weight, float eps, int32_t rows, int32_t width, float *y);

#endif
