/* The vectors of tile.h, dense.h and rows.h with NEON and its dot product (ARMv8.2): each is four registers. */
#include <arm_neon.h>

#include "half.h"

#define ISA_NAME "neon"
#define ISA_OPS cake_ops_neon
#define TILE_ROWS 2
#define DENSE_ROWS 2
#define DENSE_W 2 /* with four, the sums alone would fill the registers */
#define ATTEND_VECTORS 1
#define S8_BIAS 0

typedef struct { uint8x16_t v[4]; } vw;
typedef struct { int32x4_t v[4]; } vi;
typedef struct { float32x4_t v[4]; } vf;

#define EACH UNROLL for (int i = 0; i < 4; i++)

static INLINE vw w_load(const uint8_t *p) { vw r; EACH r.v[i] = vld1q_u8(p + 16 * i); return r; }
static INLINE vw w_low(vw a) { EACH a.v[i] = vandq_u8(a.v[i], vdupq_n_u8(15)); return a; }
static INLINE vw w_high(vw a) { EACH a.v[i] = vshrq_n_u8(a.v[i], 4); return a; }
static INLINE vw w_shift_(vw a, int left, uint8_t mask) {
  EACH a.v[i] = vandq_u8(vshlq_u8(a.v[i], vdupq_n_s8((int8_t)left)), vdupq_n_u8(mask));
  return a;
}
static INLINE vw w_bit5(vw a, int j) { return w_shift_(a, 4 - j, 16); }
static INLINE vw w_bits56(vw a, int j) { return w_shift_(a, 4 - 2 * j, 48); }
static INLINE vw w_or(vw a, vw b) { EACH a.v[i] = vorrq_u8(a.v[i], b.v[i]); return a; }

static INLINE vi i_set(int32_t x) { vi r; EACH r.v[i] = vdupq_n_s32(x); return r; }
static INLINE vi i_i8(const int8_t *p) {
  vi r;
  int8x16_t x = vld1q_s8(p);
  int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
  r.v[0] = vmovl_s16(vget_low_s16(low)), r.v[1] = vmovl_s16(vget_high_s16(low));
  r.v[2] = vmovl_s16(vget_low_s16(high)), r.v[3] = vmovl_s16(vget_high_s16(high));
  return r;
}
static INLINE vi i_u8(const uint8_t *p) {
  vi r;
  uint8x16_t x = vld1q_u8(p);
  uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_u8(vget_high_u8(x));
  r.v[0] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low)));
  r.v[1] = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low)));
  r.v[2] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high)));
  r.v[3] = vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)));
  return r;
}
static INLINE vi i_mul(vi a, vi b) { EACH a.v[i] = vmulq_s32(a.v[i], b.v[i]); return a; }
static INLINE vi i_add(vi a, vi b) { EACH a.v[i] = vaddq_s32(a.v[i], b.v[i]); return a; }
/* Codes below 128 are the same signed. */
static INLINE vi i_dots(vi acc, vw w, const int8_t *a) {
  int32_t four;
  memcpy(&four, a, 4);
  int8x16_t s = vreinterpretq_s8_s32(vdupq_n_s32(four));
  EACH acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), s);
  return acc;
}
static INLINE vi i_dotu(vi acc, vw w, const int8_t *a) { return i_dots(acc, w, a); }

static INLINE vf f_set(float x) { vf r; EACH r.v[i] = vdupq_n_f32(x); return r; }
static INLINE vf f_zero(void) { return f_set(0); }
static INLINE vf f_int(vi a) { vf r; EACH r.v[i] = vcvtq_f32_s32(a.v[i]); return r; }
static INLINE vf f_load(const float *p) { vf r; EACH r.v[i] = vld1q_f32(p + 4 * i); return r; }
static INLINE vf f_half(const void *p) {
  vf r;
  const uint16_t *h = (const uint16_t *)p;
  EACH r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h + 4 * i)));
  return r;
}
static INLINE vf f_bf16(const void *p) {
  vf r;
  const uint16_t *h = (const uint16_t *)p;
  EACH r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(h + 4 * i), 16));
  return r;
}
static INLINE vf f_add(vf a, vf b) { EACH a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
static INLINE vf f_mul(vf a, vf b) { EACH a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
static INLINE vf f_fma(vf a, vf b, vf c) { EACH c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return c; }
static INLINE vf f_fnma(vf a, vf b, vf c) { EACH c.v[i] = vfmsq_f32(c.v[i], a.v[i], b.v[i]); return c; }
static INLINE void f_store(float *p, vf a) { EACH vst1q_f32(p + 4 * i, a.v[i]); }
static INLINE float f_sum(vf a) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3])));
}

#undef EACH
