/* f16 and bf16 by bit operations, and the few things compilers disagree about. */
#ifndef CAKE_HALF_H
#define CAKE_HALF_H

#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER)
#define INLINE __forceinline
#define UNROLL
#define PREFETCH(p) ((void)(p))
#else
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define PREFETCH(p) __builtin_prefetch(p)
#endif

static INLINE float bits_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static INLINE uint32_t float_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

static INLINE float bf16_to_float(uint16_t h) { return bits_float((uint32_t)h << 16); }

/* To nearest, ties to even; a NaN stays one. */
static INLINE uint16_t float_to_bf16(float f) {
  uint32_t bits = float_bits(f);
  uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
}

static INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF;
  if (rest >= 0x7C00) return bits_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  if (rest >= 0x0400) return bits_float(sign | ((rest << 13) + 0x38000000));
  float small = (float)rest * 5.9604644775390625e-08f; /* 2^-24: a subnormal */
  return sign ? -small : small;
}

static INLINE uint16_t float_to_half(float f) {
  uint32_t bits = float_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (rest >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
  if (rest < 0x38800000) { /* subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits */
    return (uint16_t)(sign | (float_bits(bits_float(rest) + 0.5f) - 0x3F000000));
  }
  return (uint16_t)(sign | ((rest + 0xFFF + (rest >> 13 & 1) - 0x38000000) >> 13));
}

#endif
