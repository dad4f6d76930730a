/* The vectors of tile.h, dense.h and rows.h with AVX-512 (F, BW, DQ, VL, VNNI). */
#include <immintrin.h>

#include "half.h"

#define ISA_NAME "avx512"
#define ISA_OPS cake_ops_avx512
#define TILE_ROWS 8
#define DENSE_ROWS 4
#define DENSE_W 4
#define ATTEND_VECTORS 2
#define S8_BIAS 128 /* vpdpbusd wants an unsigned side: the sign bit is flipped */

typedef __m512i vw;
typedef __m512i vi;
typedef __m512 vf;

static INLINE vw w_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
static INLINE vw w_low(vw a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
static INLINE vw w_high(vw a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
static INLINE vw shift_(vw a, int left, int bits) { /* by a constant once unrolled */
  __m512i x = left >= 0 ? _mm512_sll_epi16(a, _mm_cvtsi32_si128(left)) : _mm512_srl_epi16(a, _mm_cvtsi32_si128(-left));
  return _mm512_and_si512(x, _mm512_set1_epi8((char)bits));
}
static INLINE vw w_bit5(vw a, int j) { return shift_(a, 4 - j, 16); }
static INLINE vw w_bits56(vw a, int j) { return shift_(a, 4 - 2 * j, 48); }
static INLINE vw w_or(vw a, vw b) { return _mm512_or_si512(a, b); }

static INLINE vi i_set(int32_t x) { return _mm512_set1_epi32(x); }
static INLINE vi i_i8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static INLINE vi i_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static INLINE vi i_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
static INLINE vi i_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static INLINE vi i_four(const int8_t *a) { int32_t four; memcpy(&four, a, 4); return _mm512_set1_epi32(four); }
static INLINE vi i_dotu(vi acc, vw w, const int8_t *a) { return _mm512_dpbusd_epi32(acc, w, i_four(a)); }
static INLINE vi i_dots(vi acc, vw w, const int8_t *a) {
  return _mm512_dpbusd_epi32(acc, _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)), i_four(a));
}

static INLINE vf f_zero(void) { return _mm512_setzero_ps(); }
static INLINE vf f_set(float x) { return _mm512_set1_ps(x); }
static INLINE vf f_int(vi a) { return _mm512_cvtepi32_ps(a); }
static INLINE vf f_load(const float *p) { return _mm512_loadu_ps(p); }
static INLINE vf f_half(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static INLINE vf f_bf16(const void *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static INLINE vf f_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static INLINE vf f_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static INLINE vf f_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static INLINE vf f_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
static INLINE void f_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static INLINE float f_sum(vf a) { return _mm512_reduce_add_ps(a); }
