/* f32, f16, bf16 and f8 weights, row after row as in the file. Included once an instruction set.

   bf16 weights meet activations rounded to bf16, the others f32 ones; both lie in f32, and so are the sums. The order of
   summation does not depend on the batch. */

#define DENSE_LANES 16

/* e4m3 has the fraction and the exponent of an f16 with three and four bits less, so its bits in place are 2^8 too small: that
   factor is in the scale. */
static INLINE vf f_f8_(const uint8_t *p) {
  uint16_t half[DENSE_LANES];
  for (int i = 0; i < DENSE_LANES; i++) half[i] = (uint16_t)((p[i] & 0x80) << 8 | (p[i] & 0x7F) << 7);
  return f_half(half);
}

static INLINE vf widen_type_(const int type, const void *p, int64_t i) {
  switch (type) {
    case CAKE_F16: return f_half((const uint16_t *)p + i);
    case CAKE_BF16: return f_bf16((const uint16_t *)p + i);
    case CAKE_F8: return f_f8_((const uint8_t *)p + i);
    default: return f_load((const float *)p + i);
  }
}

static INLINE size_t dense_size_(const int type) { return type == CAKE_F32 ? 4 : type == CAKE_F8 ? 1 : 2; }

/* The last cols % 16 columns, filled up with zeros. */
static INLINE vf widen_tail_(const int type, const void *p, int64_t i, int32_t count) {
  union {
    float f[DENSE_LANES];
    uint16_t h[DENSE_LANES];
  } tail = {{0}};
  size_t size = dense_size_(type);
  memcpy(&tail, (const char *)p + (size_t)i * size, (size_t)count * size);
  return type == CAKE_F32 ? f_load(tail.f) : widen_type_(type, tail.h, 0);
}

/* Of a group of columns, for nr rows of W. */
static INLINE void f8_scales_(const int nr, const float *scale, int32_t groups, vf *scales) {
  UNROLL for (int r = 0; r < nr; r++) scales[r] = f_set(scale[r * groups] * 256.0f);
}

/* nr rows of W by mt rows of x. */
static INLINE void dense_tile_(const int type, const int nr, const int mt, const cake_matrix *w, int32_t row, const float *x,
                               int64_t x_stride, float *y, int64_t y_stride) {
  const size_t size = dense_size_(type);
  const char *rows = (const char *)w->data + (size_t)row * (size_t)w->cols * size;
  vf acc[DENSE_W][DENSE_ROWS];
  UNROLL for (int r = 0; r < nr; r++) UNROLL for (int m = 0; m < mt; m++) acc[r][m] = f_zero();
  vf scales[DENSE_W];
  UNROLL for (int r = 0; r < nr; r++) scales[r] = f_zero();
  const int32_t groups = type == CAKE_F8 ? (w->cols + w->group - 1) / w->group : 0;
  const float *scale = (const float *)((const char *)w->data + (size_t)w->rows * (size_t)w->cols) + (int64_t)row * groups;
  int32_t k = 0, full = w->cols / DENSE_LANES * DENSE_LANES, next = 0;
  for (; k < full; k += DENSE_LANES) {
    if (type == CAKE_F8 && k == next) {
      f8_scales_(nr, scale++, groups, scales);
      next += w->group;
    }
    vf b[DENSE_ROWS];
    UNROLL for (int m = 0; m < mt; m++) b[m] = f_load(x + m * x_stride + k);
    UNROLL for (int r = 0; r < nr; r++) {
      if (mt == 1) PREFETCH(rows + (size_t)k * size + AHEAD);
      vf a = widen_type_(type, rows + (size_t)r * (size_t)w->cols * size, k);
      if (type == CAKE_F8) a = f_mul(a, scales[r]);
      UNROLL for (int m = 0; m < mt; m++) acc[r][m] = f_fma(a, b[m], acc[r][m]);
    }
  }
  if (k < w->cols) {
    if (type == CAKE_F8 && k == next) f8_scales_(nr, scale, groups, scales);
    for (int r = 0; r < nr; r++) {
      vf a = widen_tail_(type, rows + (size_t)r * (size_t)w->cols * size, k, w->cols - k);
      if (type == CAKE_F8) a = f_mul(a, scales[r]);
      for (int m = 0; m < mt; m++) acc[r][m] = f_fma(a, widen_tail_(CAKE_F32, x + m * x_stride, k, w->cols - k), acc[r][m]);
    }
  }
  UNROLL for (int m = 0; m < mt; m++) UNROLL for (int r = 0; r < nr; r++) y[m * y_stride + row + r] = f_sum(acc[r][m]);
}

static INLINE void dense_type_(const int type, const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end,
                               float *y, int64_t y_stride) {
  const int64_t x_stride = type == CAKE_BF16 ? w->cols : a->f32_stride;
  if (end > w->rows) end = w->rows;
  for (int32_t first = 0; first < m;) {
    int32_t mt = m - first >= DENSE_ROWS ? DENSE_ROWS : 1;
    const float *x = (type == CAKE_BF16 ? (const float *)a->bf16 : a->f32) + first * x_stride;
    float *out = y + first * y_stride;
    int32_t row = begin;
    for (; mt > 1 && row + DENSE_W <= end; row += DENSE_W) dense_tile_(type, DENSE_W, DENSE_ROWS, w, row, x, x_stride, out, y_stride);
    for (; row < end; row++) { /* of one row of x, one stream from memory is faster than several */
      if (mt == DENSE_ROWS) dense_tile_(type, 1, DENSE_ROWS, w, row, x, x_stride, out, y_stride);
      else dense_tile_(type, 1, 1, w, row, x, x_stride, out, y_stride);
    }
    first += mt;
  }
}

#define FOR_TYPE(T)                                                                                                          \
  static void dense_##T(const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end, float *y,         \
                        int64_t y_stride) {                                                                                  \
    dense_type_(CAKE_##T, w, a, m, begin, end, y, y_stride);                                                                 \
  }
FOR_TYPE(F32)
FOR_TYPE(F16)
FOR_TYPE(BF16)
FOR_TYPE(F8)
#undef FOR_TYPE

static void matmul_any(const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end, float *y,
                       int64_t y_stride) {
  switch (w->type) {
    case CAKE_F32: dense_F32(w, a, m, begin, end, y, y_stride); break;
    case CAKE_F16: dense_F16(w, a, m, begin, end, y, y_stride); break;
    case CAKE_F8: dense_F8(w, a, m, begin, end, y, y_stride); break;
    default: matmul_units(w, a, m, begin, end, y, y_stride);
  }
}
