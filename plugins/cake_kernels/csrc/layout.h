/* How quantised weights lie in memory once packed.

   Rows are taken GROUP_ROWS at a time and columns UNIT at a time. Of a group of rows, first come the codes of all units, then
   their scales. Within a unit, vector j (64 bytes) holds columns 4j..4j+3 of 16 rows, row after row, so that one dot-product
   instruction advances 16 rows and nothing is ever summed across lanes:

     4 bit   4 vectors, the low nibbles are vectors 0..3, the high ones 4..7
     5 bit   one vector more before them: bit j of a byte is the fifth bit of vector j
     6 bit   two vectors more: bits 2j..2j+1 are the upper bits of vector j, and of vector 4 + j
     8 bit   8 vectors, signed

   The last group is filled up with zeros. Scales, each for 16 rows:

     Q8_0 Q4_0 Q5_0   a unit: scale f16
     Q4_1 Q5_1        a unit: scale f16, minimum f16
     Q4_K Q5_K        8 units: scale f16, minimum scale f16, then a unit: scale u8, minimum u8
     Q6_K             8 units: scale f16, then a unit: scale i8 of either half
     G4 G8            a group: scale f16, zero u8 (i8 for G8) */
#ifndef CAKE_LAYOUT_H
#define CAKE_LAYOUT_H

#include "ops.h"

typedef struct {
  int32_t code_bytes;   /* a unit of 16 rows */
  int32_t per_head;     /* units that share a head of scales */
  int32_t head_bytes;   /* of such a head */
  int32_t scale_bytes;  /* beside it, a unit */
  int32_t block, bytes; /* GGUF: columns and bytes of a block; 0 where GGUF has no such type */
} layout;

static inline layout layout_of(int32_t type, int32_t group) {
  switch (type) {
    case CAKE_Q8_0: return (layout){512, 1, 32, 0, 32, 34};
    case CAKE_Q4_0: return (layout){256, 1, 32, 0, 32, 18};
    case CAKE_Q4_1: return (layout){256, 1, 64, 0, 32, 20};
    case CAKE_Q5_0: return (layout){320, 1, 32, 0, 32, 22};
    case CAKE_Q5_1: return (layout){320, 1, 64, 0, 32, 24};
    case CAKE_Q4_K: return (layout){256, 8, 64, 32, 256, 144};
    case CAKE_Q5_K: return (layout){320, 8, 64, 32, 256, 176};
    case CAKE_Q6_K: return (layout){384, 8, 32, 32, 256, 210};
    case CAKE_G4: return (layout){256, group / UNIT, 48, 0, 0, 0};
    case CAKE_G8: return (layout){512, group / UNIT, 48, 0, 0, 0};
    default: return (layout){0, 1, 0, 0, 0, 0};
  }
}

static inline int32_t units_of(int32_t cols) { return cols / UNIT; }

/* Bytes of a packed group of rows, a multiple of 64. */
static inline int64_t group_bytes(layout l, int32_t cols) {
  int64_t units = units_of(cols);
  int64_t heads = l.per_head > 0 ? (units + l.per_head - 1) / l.per_head : 0;
  int64_t bytes = units * (l.code_bytes + l.scale_bytes) + heads * l.head_bytes;
  return (bytes + 63) / 64 * 64;
}

#endif
