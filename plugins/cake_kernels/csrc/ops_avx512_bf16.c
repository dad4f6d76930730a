/* bf16 weights with vdpbf16ps: 32 products an instruction, two f32 sums a lane pair. */
#include <immintrin.h>

#include "half.h"
#include "ops.h"

#define LANES 32
#define AHEAD 4096 /* values; measured */

static INLINE __m512bh load_(const uint16_t *p, int32_t left) {
  if (left >= LANES) return (__m512bh)_mm512_loadu_si512(p);
  return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1u << left) - 1), p);
}

/* nr rows of W by mt rows of x; the order of summation is the same for every nr and mt. */
static INLINE void tile_(const int nr, const int mt, const uint16_t *w, const uint16_t *x, int32_t cols, float *y,
                         int64_t y_stride) {
  __m512 acc[4][4];
  UNROLL for (int r = 0; r < nr; r++) UNROLL for (int m = 0; m < mt; m++) acc[r][m] = _mm512_setzero_ps();
  for (int32_t k = 0; k < cols; k += LANES) {
    __m512bh b[4];
    UNROLL for (int m = 0; m < mt; m++) b[m] = load_(x + (int64_t)m * cols + k, cols - k);
    UNROLL for (int r = 0; r < nr; r++) {
      if (mt == 1) PREFETCH(w + (int64_t)r * cols + k + AHEAD);
      __m512bh a = load_(w + (int64_t)r * cols + k, cols - k);
      UNROLL for (int m = 0; m < mt; m++) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], a, b[m]);
    }
  }
  UNROLL for (int m = 0; m < mt; m++) UNROLL for (int r = 0; r < nr; r++) y[m * y_stride + r] = _mm512_reduce_add_ps(acc[r][m]);
}

void cake_matmul_avx512_bf16(const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end, float *y,
                             int64_t y_stride) {
  const int32_t cols = w->cols;
  if (end > w->rows) end = w->rows;
  for (int32_t first = 0; first < m;) {
    int32_t mt = m - first >= 4 ? 4 : 1;
    const uint16_t *x = (const uint16_t *)a->bf16 + (int64_t)first * cols;
    int32_t row = begin;
    for (; row < end;) {
      int32_t nr = end - row < 4 || mt == 1 ? 1 : 4; /* one stream from memory is faster than four */
      const uint16_t *rows = (const uint16_t *)w->data + (int64_t)row * cols;
      float *out = y + first * y_stride + row;
      if (nr == 4 && mt == 4) tile_(4, 4, rows, x, cols, out, y_stride);
      else if (mt == 4) tile_(1, 4, rows, x, cols, out, y_stride);
      else tile_(1, 1, rows, x, cols, out, y_stride);
      row += nr;
    }
    first += mt;
  }
}

void cake_round_avx512_bf16(const float *x, int32_t n, void *out) {
  for (int32_t i = 0; i < n; i++) ((uint16_t *)out)[i] = float_to_bf16(x[i]);
}
