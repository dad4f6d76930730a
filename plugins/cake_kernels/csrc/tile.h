/* Quantised weights times 8-bit activations, 16 rows of W by `mt` rows of x at a time. Included once an instruction set.

   Every row of x is worked on in the same order however many there are, so a row's result does not depend on its batch. */
#include "layout.h"

#define AHEAD 4096 /* bytes: what the hardware fetches by itself ends at each page */

/* Vector j (0..7) of a unit's codes, as unsigned numbers; for 8 bit they are signed. */
static INLINE vw codes_(const int type, const uint8_t *p, int j) {
  switch (type) {
    case CAKE_Q8_0:
    case CAKE_G8: return w_load(p + 64 * j);
    case CAKE_Q5_0:
    case CAKE_Q5_1:
    case CAKE_Q5_K: {
      vw low = w_load(p + 64 + 64 * (j & 3));
      return w_or(j < 4 ? w_low(low) : w_high(low), w_bit5(w_load(p), j));
    }
    case CAKE_Q6_K: {
      vw low = w_load(p + 128 + 64 * (j & 3));
      return w_or(j < 4 ? w_low(low) : w_high(low), w_bits56(w_load(p + 64 * (j >> 2)), j & 3));
    }
    default: {
      vw low = w_load(p + 64 * (j & 3));
      return j < 4 ? w_low(low) : w_high(low);
    }
  }
}

static INLINE int signed_codes_(const int type) { return type == CAKE_Q8_0 || type == CAKE_G8; }

/* What is taken off every code, in whole numbers: exact. */
static INLINE int offset_(const int type) {
  switch (type) {
    case CAKE_Q4_0: return 8;
    case CAKE_Q5_0: return 16;
    case CAKE_Q6_K: return 32;
    case CAKE_Q8_0:
    case CAKE_G8: return S8_BIAS;
    default: return 0;
  }
}

/* Scales of a unit: W = d * code + low, where `low` is used. */
typedef struct {
  vf d, low, head_d, head_low;
  vi halves[2];
} scales_;

static INLINE int has_low_(const int type) { return type != CAKE_Q8_0 && type != CAKE_Q4_0 && type != CAKE_Q5_0 && type != CAKE_Q6_K; }

static INLINE const uint8_t *head_(const int type, const uint8_t *p, scales_ *s) {
  s->d = s->head_d = f_half(p);
  switch (type) {
    case CAKE_Q4_1:
    case CAKE_Q5_1: s->low = f_half(p + 32); return p + 64;
    case CAKE_Q4_K:
    case CAKE_Q5_K: s->head_low = f_half(p + 32); return p + 64;
    case CAKE_G4: s->low = f_fnma(s->d, f_int(i_u8(p + 32)), f_zero()); return p + 48;
    case CAKE_G8: s->low = f_fnma(s->d, f_int(i_i8((const int8_t *)p + 32)), f_zero()); return p + 48;
    default: return p + 32;
  }
}

static INLINE const uint8_t *unit_scales_(const int type, const uint8_t *p, scales_ *s) {
  switch (type) {
    case CAKE_Q4_K:
    case CAKE_Q5_K:
      s->d = f_mul(s->head_d, f_int(i_u8(p)));
      s->low = f_fnma(s->head_low, f_int(i_u8(p + 16)), f_zero());
      return p + 32;
    case CAKE_Q6_K:
      s->halves[0] = i_i8((const int8_t *)p);
      s->halves[1] = i_i8((const int8_t *)p + 16);
      return p + 32;
    default: return p;
  }
}

static INLINE int bits_(const int type) {
  switch (type) {
    case CAKE_Q5_0:
    case CAKE_Q5_1:
    case CAKE_Q5_K: return 5;
    case CAKE_Q6_K: return 6;
    default: return 4;
  }
}

/* Where an instruction set has no product of four bytes that sums in 32 bit, it may sum in less as long as that fits. */
#ifndef PARTIAL_SUMS
#define PARTIAL_SUMS(ROWS)
#define DOT_PARTIAL(to, m, w, q, j, bits) *(to) = i_dotu(*(to), w, q)
#endif

/* One unit for mt rows of x, whose units lie `stride` apart. */
static INLINE void unit_(const int type, const int mt, const uint8_t *codes, const scales_ *s, const unit_act *a, int64_t stride,
                         vf *sum) {
  vi acc[TILE_ROWS], second[TILE_ROWS];
  UNROLL for (int m = 0; m < mt; m++) {
    const int32_t *sums = a[m * stride].sums;
    int offset = offset_(type);
    acc[m] = i_set(type == CAKE_Q6_K ? -offset * sums[0] : -offset * (sums[0] + sums[1]));
    second[m] = i_set(-offset * sums[1]);
  }
  PARTIAL_SUMS(TILE_ROWS);
  UNROLL for (int j = 0; j < 8; j++) {
    vw w = codes_(type, codes, j);
    UNROLL for (int m = 0; m < mt; m++) {
      const int8_t *q = a[m * stride].q + 4 * j;
      vi *to = type == CAKE_Q6_K && j >= 4 ? second + m : acc + m;
      if (signed_codes_(type)) *to = i_dots(*to, w, q);
      else DOT_PARTIAL(to, m, w, q, j, bits_(type));
    }
  }
  UNROLL for (int m = 0; m < mt; m++) {
    const unit_act *x = a + m * stride;
    if (type == CAKE_Q6_K) acc[m] = i_add(i_mul(acc[m], s->halves[0]), i_mul(second[m], s->halves[1]));
    sum[m] = f_fma(f_mul(f_int(acc[m]), s->d), f_set(x->scale), sum[m]);
    if (has_low_(type)) sum[m] = f_fma(s->low, f_set(x->scaled_sum), sum[m]);
  }
}

/* 16 rows of W, all columns, for mt rows of x. */
static INLINE void tile_(const int type, const int mt, const uint8_t *group, layout l, int32_t units, const unit_act *a, float *y,
                         int64_t y_stride, int32_t rows) {
  const uint8_t *codes = group, *scales = group + (int64_t)units * l.code_bytes;
  scales_ s;
  vf sum[TILE_ROWS];
  UNROLL for (int m = 0; m < mt; m++) sum[m] = f_zero();
  for (int32_t u = 0; u < units;) {
    int32_t stop = u + l.per_head < units ? u + l.per_head : units;
    scales = head_(type, scales, &s);
    for (; u < stop; u++) {
      scales = unit_scales_(type, scales, &s);
      if (mt == 1) for (int32_t line = 0; line < l.code_bytes; line += 64) PREFETCH(codes + AHEAD + line);
      unit_(type, mt, codes, &s, a + u, units, sum);
      codes += l.code_bytes;
    }
  }
  UNROLL for (int m = 0; m < mt; m++) {
    if (rows == GROUP_ROWS) {
      f_store(y + m * y_stride, sum[m]);
    } else {
      float all[GROUP_ROWS];
      f_store(all, sum[m]);
      memcpy(y + m * y_stride, all, sizeof(float) * (size_t)rows);
    }
  }
}

static INLINE void matmul_type_(const int type, const cake_matrix *w, const unit_act *a, int32_t m, int32_t begin, int32_t end,
                                float *y, int64_t y_stride) {
  layout l = layout_of(type, w->group);
  int32_t units = units_of(w->cols);
  int64_t bytes = group_bytes(l, w->cols);
  for (int32_t first = 0; first < m;) {
    int32_t left = m - first, mt = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (mt > TILE_ROWS) mt = TILE_ROWS;
    const unit_act *x = a + (int64_t)first * units;
    for (int32_t row = begin; row < end; row += GROUP_ROWS) {
      const uint8_t *group = (const uint8_t *)w->data + row / GROUP_ROWS * bytes;
      int32_t rows = w->rows - row < GROUP_ROWS ? w->rows - row : GROUP_ROWS;
      float *out = y + first * y_stride + row;
      switch (mt) {
#if TILE_ROWS >= 8
        case 8: tile_(type, 8, group, l, units, x, out, y_stride, rows); break;
#endif
#if TILE_ROWS >= 4
        case 4: tile_(type, 4, group, l, units, x, out, y_stride, rows); break;
#endif
#if TILE_ROWS >= 2
        case 2: tile_(type, 2, group, l, units, x, out, y_stride, rows); break;
#endif
        default: tile_(type, 1, group, l, units, x, out, y_stride, rows);
      }
    }
    first += mt;
  }
}

#define FOR_TYPE(T)                                                                                                    \
  static void matmul_##T(const cake_matrix *w, const unit_act *a, int32_t m, int32_t begin, int32_t end, float *y,     \
                         int64_t y_stride) {                                                                           \
    matmul_type_(CAKE_##T, w, a, m, begin, end, y, y_stride);                                                          \
  }
FOR_TYPE(Q8_0)
FOR_TYPE(Q4_0)
FOR_TYPE(Q4_1)
FOR_TYPE(Q5_0)
FOR_TYPE(Q5_1)
FOR_TYPE(Q4_K)
FOR_TYPE(Q5_K)
FOR_TYPE(Q6_K)
FOR_TYPE(G4)
FOR_TYPE(G8)
#undef FOR_TYPE

static void matmul_units(const cake_matrix *w, const activations *a, int32_t m, int32_t begin, int32_t end, float *y,
                         int64_t y_stride) {
  switch (w->type) {
#define CASE(T) case CAKE_##T: matmul_##T(w, a->units, m, begin, end, y, y_stride); break
    CASE(Q8_0);
    CASE(Q4_0);
    CASE(Q4_1);
    CASE(Q5_0);
    CASE(Q5_1);
    CASE(Q4_K);
    CASE(Q5_K);
    CASE(Q6_K);
    CASE(G4);
    CASE(G8);
#undef CASE
    default: break;
  }
}
