/* The vectors of tile.h, dense.h and rows.h with AVX2, FMA and F16C: each is a pair of registers. */
#include <immintrin.h>

#include "half.h"

#define ISA_NAME "avx2"
#define ISA_OPS cake_ops_avx2
#define TILE_ROWS 4
#define DENSE_ROWS 2
#define DENSE_W 3
#define ATTEND_VECTORS 1
#define S8_BIAS 0

typedef struct { __m256i a, b; } vw;
typedef struct { __m256i a, b; } vi;
typedef struct { __m256 a, b; } vf;

#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define BOTH(T, x, y) T r = {x, y}; return r

static INLINE vw w_load(const uint8_t *p) { BOTH(vw, LOAD(p), LOAD(p + 32)); }
static INLINE __m256i mask_(__m256i a, int bits) { return _mm256_and_si256(a, _mm256_set1_epi8((char)bits)); }
static INLINE vw w_low(vw x) { BOTH(vw, mask_(x.a, 15), mask_(x.b, 15)); }
static INLINE vw w_high(vw x) { BOTH(vw, mask_(_mm256_srli_epi16(x.a, 4), 15), mask_(_mm256_srli_epi16(x.b, 4), 15)); }
static INLINE __m256i shift_(__m256i a, int left) { /* by a constant once unrolled */
  return left >= 0 ? _mm256_sll_epi16(a, _mm_cvtsi32_si128(left)) : _mm256_srl_epi16(a, _mm_cvtsi32_si128(-left));
}
static INLINE vw w_bit5(vw x, int j) { BOTH(vw, mask_(shift_(x.a, 4 - j), 16), mask_(shift_(x.b, 4 - j), 16)); }
static INLINE vw w_bits56(vw x, int j) { BOTH(vw, mask_(shift_(x.a, 4 - 2 * j), 48), mask_(shift_(x.b, 4 - 2 * j), 48)); }
static INLINE vw w_or(vw x, vw y) { BOTH(vw, _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }

static INLINE vi i_set(int32_t x) { BOTH(vi, _mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
static INLINE vi i_i8(const int8_t *p) {
  __m128i x = _mm_loadu_si128((const __m128i *)p);
  BOTH(vi, _mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)));
}
static INLINE vi i_u8(const uint8_t *p) {
  __m128i x = _mm_loadu_si128((const __m128i *)p);
  BOTH(vi, _mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}
static INLINE vi i_mul(vi x, vi y) { BOTH(vi, _mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)); }
static INLINE vi i_add(vi x, vi y) { BOTH(vi, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
static INLINE __m256i four_(const int8_t *a) { int32_t four; memcpy(&four, a, 4); return _mm256_set1_epi32(four); }
/* Pairs are summed in 16 bit: 128 * 127 * 2 fits. */
static INLINE __m256i dot_(__m256i acc, __m256i u, __m256i s) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
/* Pairs of 8, 4 or 2 vectors of codes in 4, 5 or 6 bit are summed in 16 bit, which they fit: 15 * 127 * 16, 31 * 127 * 8,
   63 * 127 * 4. */
static INLINE vi h_dot(vi acc, int first, vw w, const int8_t *a) {
  __m256i s = four_(a), x = _mm256_maddubs_epi16(w.a, s), y = _mm256_maddubs_epi16(w.b, s);
  BOTH(vi, first ? x : _mm256_add_epi16(acc.a, x), first ? y : _mm256_add_epi16(acc.b, y));
}
static INLINE vi i_addh(vi acc, vi h) {
  const __m256i one = _mm256_set1_epi16(1);
  BOTH(vi, _mm256_add_epi32(acc.a, _mm256_madd_epi16(h.a, one)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(h.b, one)));
}
#define PARTIAL_SUMS(ROWS) vi partial[ROWS] = {{_mm256_setzero_si256(), _mm256_setzero_si256()}}
#define DOT_PARTIAL(to, m, w, q, j, bits)                                            \
  do {                                                                               \
    const int each = 8 >> ((bits) - 4);                                              \
    partial[m] = h_dot(partial[m], (j) % each == 0, w, q);                           \
    if ((j) % each == each - 1) *(to) = i_addh(*(to), partial[m]);                   \
  } while (0)
static INLINE vi i_dots(vi acc, vw w, const int8_t *a) {
  __m256i s = four_(a);
  BOTH(vi, dot_(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(s, w.a)),
       dot_(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(s, w.b)));
}

static INLINE vf f_set(float x) { BOTH(vf, _mm256_set1_ps(x), _mm256_set1_ps(x)); }
static INLINE vf f_zero(void) { return f_set(0); }
static INLINE vf f_int(vi x) { BOTH(vf, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
static INLINE vf f_load(const float *p) { BOTH(vf, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static INLINE vf f_half(const void *p) {
  const __m128i *h = (const __m128i *)p;
  BOTH(vf, _mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1)));
}
static INLINE __m256 widen_(const __m128i *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}
static INLINE vf f_bf16(const void *p) { BOTH(vf, widen_((const __m128i *)p), widen_((const __m128i *)p + 1)); }
static INLINE vf f_add(vf x, vf y) { BOTH(vf, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
static INLINE vf f_mul(vf x, vf y) { BOTH(vf, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
static INLINE vf f_fma(vf x, vf y, vf z) { BOTH(vf, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
static INLINE vf f_fnma(vf x, vf y, vf z) { BOTH(vf, _mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)); }
static INLINE void f_store(float *p, vf x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
static INLINE float f_sum(vf x) {
  __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}

#undef LOAD
#undef BOTH
