/* The vectors of tile.h, dense.h and rows.h in plain C: what every processor has, and what the others are tested against. */
#include <math.h>
#include <string.h>

#include "half.h"

#define ISA_NAME "scalar"
#define ISA_OPS cake_ops_scalar
#define TILE_ROWS 1  /* rows of x that a pass over quantised weights serves */
#define DENSE_ROWS 1 /* the same for f32, f16 and bf16 weights */
#define DENSE_W 4        /* rows of such weights at a time */
#define ATTEND_VECTORS 1 /* vectors of queries that attend together */
#define S8_BIAS 0    /* what i_dots adds to each signed weight */

typedef struct { uint8_t v[64]; } vw;
typedef struct { int32_t v[16]; } vi;
typedef struct { float v[16]; } vf;

#define EACH for (int i = 0; i < 16; i++)
#define EACH_BYTE for (int i = 0; i < 64; i++)

static INLINE vw w_load(const uint8_t *p) { vw r; memcpy(r.v, p, 64); return r; }
static INLINE vw w_low(vw a) { EACH_BYTE a.v[i] &= 15; return a; }
static INLINE vw w_high(vw a) { EACH_BYTE a.v[i] >>= 4; return a; }
static INLINE vw w_bit5(vw a, int j) { EACH_BYTE a.v[i] = (uint8_t)((a.v[i] >> j & 1) << 4); return a; }
static INLINE vw w_bits56(vw a, int j) { EACH_BYTE a.v[i] = (uint8_t)((a.v[i] >> (2 * j) & 3) << 4); return a; }
static INLINE vw w_or(vw a, vw b) { EACH_BYTE a.v[i] |= b.v[i]; return a; }

static INLINE vi i_set(int32_t x) { vi r; EACH r.v[i] = x; return r; }
static INLINE vi i_i8(const int8_t *p) { vi r; EACH r.v[i] = p[i]; return r; }
static INLINE vi i_u8(const uint8_t *p) { vi r; EACH r.v[i] = p[i]; return r; }
static INLINE vi i_mul(vi a, vi b) { EACH a.v[i] *= b.v[i]; return a; }
static INLINE vi i_add(vi a, vi b) { EACH a.v[i] += b.v[i]; return a; }
static INLINE vi i_dotu(vi acc, vw w, const int8_t *a) {
  EACH for (int k = 0; k < 4; k++) acc.v[i] += w.v[4 * i + k] * a[k];
  return acc;
}
static INLINE vi i_dots(vi acc, vw w, const int8_t *a) {
  EACH for (int k = 0; k < 4; k++) acc.v[i] += (int8_t)w.v[4 * i + k] * a[k];
  return acc;
}

static INLINE vf f_zero(void) { vf r; EACH r.v[i] = 0; return r; }
static INLINE vf f_set(float x) { vf r; EACH r.v[i] = x; return r; }
static INLINE vf f_int(vi a) { vf r; EACH r.v[i] = (float)a.v[i]; return r; }
static INLINE vf f_load(const float *p) { vf r; memcpy(r.v, p, 64); return r; }
static INLINE vf f_half(const void *p) { vf r; EACH r.v[i] = half_to_float(((const uint16_t *)p)[i]); return r; }
static INLINE vf f_bf16(const void *p) { vf r; EACH r.v[i] = bf16_to_float(((const uint16_t *)p)[i]); return r; }
static INLINE vf f_add(vf a, vf b) { EACH a.v[i] += b.v[i]; return a; }
static INLINE vf f_mul(vf a, vf b) { EACH a.v[i] *= b.v[i]; return a; }
static INLINE vf f_fma(vf a, vf b, vf c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }
static INLINE vf f_fnma(vf a, vf b, vf c) { EACH c.v[i] -= a.v[i] * b.v[i]; return c; }
static INLINE void f_store(float *p, vf a) { memcpy(p, a.v, 64); }
static INLINE float f_sum(vf a) {
  for (int n = 8; n; n /= 2) for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
  return a.v[0];
}

#undef EACH
#undef EACH_BYTE
