/* From GGUF blocks, or from codes and scales, to the interleaved layout; and rows of it back to f32. */
#include <string.h>

#include "half.h"
#include "layout.h"

/* One unit of one row: codes as unsigned numbers (signed for 8 bit), and its scales as they are stored. */
typedef struct {
  uint8_t codes[UNIT];
  uint16_t d, low; /* f16 */
  uint8_t scale, minimum;
} unit_codes;

/* Q4_K and Q5_K keep eight pairs of 6-bit scales in 12 bytes. */
static void six_bit_scales(const uint8_t *s, int i, uint8_t *scale, uint8_t *minimum) {
  if (i < 4) {
    *scale = s[i] & 63;
    *minimum = s[i + 4] & 63;
  } else {
    *scale = (uint8_t)((s[i + 4] & 15) | (s[i - 4] >> 6) << 4);
    *minimum = (uint8_t)(s[i + 4] >> 4 | (s[i] >> 6) << 4);
  }
}

static void nibbles(const uint8_t *p, unit_codes *u) {
  for (int i = 0; i < 16; i++) {
    u->codes[i] = p[i] & 15;
    u->codes[i + 16] = p[i] >> 4;
  }
}

static void fifth_bits(const uint8_t *p, unit_codes *u) {
  for (int i = 0; i < UNIT; i++) u->codes[i] |= (uint8_t)((p[i / 8] >> (i % 8) & 1) << 4);
}

/* Unit i of a block of 256. */
static void k_unit(int32_t type, const uint8_t *b, int i, unit_codes *u) {
  if (type == CAKE_Q6_K) {
    const uint8_t *low = b + (i / 4) * 64 + (i % 2) * 32, *high = b + 128 + (i / 4) * 32;
    for (int k = 0; k < UNIT; k++) {
      int nibble = i % 4 < 2 ? low[k] & 15 : low[k] >> 4;
      u->codes[k] = (uint8_t)(nibble | (high[k] >> (2 * (i % 4)) & 3) << 4);
    }
    u->scale = b[192 + 2 * i];
    u->minimum = b[193 + 2 * i];
    memcpy(&u->d, b + 208, 2);
    return;
  }
  const uint8_t *low = b + (type == CAKE_Q5_K ? 48 : 16) + (i / 2) * 32;
  for (int k = 0; k < UNIT; k++) {
    u->codes[k] = i % 2 == 0 ? low[k] & 15 : low[k] >> 4;
    if (type == CAKE_Q5_K) u->codes[k] |= (uint8_t)((b[16 + k] >> i & 1) << 4);
  }
  memcpy(&u->d, b, 2);
  memcpy(&u->low, b + 2, 2);
  six_bit_scales(b + 4, i, &u->scale, &u->minimum);
}

static void read_unit(int32_t type, layout l, const uint8_t *row, int32_t unit, unit_codes *u) {
  const uint8_t *b = row + (int64_t)(unit * UNIT / l.block) * l.bytes;
  memset(u, 0, sizeof *u);
  switch (type) {
    case CAKE_Q8_0: memcpy(u->codes, b + 2, UNIT); break;
    case CAKE_Q4_0: nibbles(b + 2, u); break;
    case CAKE_Q4_1: nibbles(b + 4, u); break;
    case CAKE_Q5_0: nibbles(b + 6, u), fifth_bits(b + 2, u); break;
    case CAKE_Q5_1: nibbles(b + 8, u), fifth_bits(b + 4, u); break;
    default: k_unit(type, b, unit % 8, u); return;
  }
  memcpy(&u->d, b, 2);
  memcpy(&u->low, b + 2, 2); /* used by the types that have a minimum */
}

/* Row `lane` of the codes of a unit, into the vectors described in layout.h. */
static void write_codes(int32_t code_bytes, const uint8_t *codes, int lane, uint8_t *out) {
  for (int k = 0; k < UNIT; k++) {
    int j = k / 4, at = 4 * lane + k % 4;
    uint8_t code = codes[k];
    if (code_bytes == 512) {
      out[64 * j + at] = code;
      continue;
    }
    out[code_bytes - 256 + 64 * (j & 3) + at] |= (uint8_t)((code & 15) << (j < 4 ? 0 : 4));
    if (code_bytes == 320) out[at] |= (uint8_t)((code >> 4) << j);
    if (code_bytes == 384) out[64 * (j >> 2) + at] |= (uint8_t)((code >> 4) << (2 * (j & 3)));
  }
}

static void read_codes(int32_t code_bytes, const uint8_t *in, int lane, uint8_t *codes) {
  for (int k = 0; k < UNIT; k++) {
    int j = k / 4, at = 4 * lane + k % 4;
    if (code_bytes == 512) {
      codes[k] = in[64 * j + at];
      continue;
    }
    codes[k] = in[code_bytes - 256 + 64 * (j & 3) + at] >> (j < 4 ? 0 : 4) & 15;
    if (code_bytes == 320) codes[k] |= (uint8_t)((in[at] >> j & 1) << 4);
    if (code_bytes == 384) codes[k] |= (uint8_t)((in[64 * (j >> 2) + at] >> (2 * (j & 3)) & 3) << 4);
  }
}

/* The head of the scales that unit `unit` belongs to, and the unit's own beside it. */
static uint8_t *head_at(layout l, int32_t units, int32_t unit, uint8_t *group, uint8_t **own) {
  int32_t head = unit / l.per_head;
  uint8_t *p = group + (int64_t)units * l.code_bytes + (int64_t)head * (l.head_bytes + l.per_head * l.scale_bytes);
  *own = p + l.head_bytes + unit % l.per_head * l.scale_bytes;
  return p;
}

typedef struct {
  cake_matrix w;
  layout l;
  const uint8_t *blocks;
  const int32_t *order;
  const uint8_t *codes, *zeros;
  const uint16_t *scales;
  uint8_t *out;
} pack_job;

static void pack_row(const pack_job *job, int32_t source, int lane, uint8_t *group) {
  const layout l = job->l;
  const int32_t units = units_of(job->w.cols);
  const uint8_t *row = job->blocks + (int64_t)source * (job->w.cols / l.block) * l.bytes;
  for (int32_t i = 0; i < units; i++) {
    unit_codes u;
    uint8_t *own, *head = head_at(l, units, i, group, &own);
    read_unit(job->w.type, l, row, i, &u);
    write_codes(l.code_bytes, u.codes, lane, group + (int64_t)i * l.code_bytes);
    memcpy(head + 2 * lane, &u.d, 2);
    if (l.head_bytes == 64) memcpy(head + 32 + 2 * lane, &u.low, 2);
    if (l.scale_bytes) own[lane] = u.scale, own[16 + lane] = u.minimum;
  }
}

static void pack_group_row(const pack_job *job, int32_t source, int lane, uint8_t *group) {
  const layout l = job->l;
  const int32_t cols = job->w.cols, units = units_of(cols), heads = (units + l.per_head - 1) / l.per_head;
  const int is8 = job->w.type == CAKE_G8;
  for (int32_t i = 0; i < units; i++) {
    unit_codes u;
    uint8_t *own, *head = head_at(l, units, i, group, &own);
    const uint8_t *given = job->codes + ((int64_t)source * cols + i * UNIT) / (is8 ? 1 : 2);
    if (is8) for (int k = 0; k < UNIT; k++) u.codes[k] = given[k] ^ 0x80;
    else nibbles(given, &u);
    write_codes(l.code_bytes, u.codes, lane, group + (int64_t)i * l.code_bytes);
    int64_t at = (int64_t)source * heads + i / l.per_head;
    memcpy(head + 2 * lane, &job->scales[at], 2);
    head[32 + lane] = job->zeros[at] ^ (is8 ? 0x80 : 0);
  }
}

static void pack_work(void *argument, cake_worker *worker) {
  const pack_job *job = argument;
  const int32_t rows = job->w.rows, groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
  const int64_t bytes = group_bytes(job->l, job->w.cols);
  int32_t g;
  while ((g = cake_next(worker, groups)) >= 0) {
    uint8_t *group = job->out + g * bytes;
    memset(group, 0, (size_t)bytes);
    for (int lane = 0; lane < GROUP_ROWS && g * GROUP_ROWS + lane < rows; lane++) {
      int32_t row = g * GROUP_ROWS + lane;
      if (job->blocks != NULL) pack_row(job, job->order != NULL ? job->order[row] : row, lane, group);
      else pack_group_row(job, row, lane, group);
    }
  }
}

int64_t cake_packed_bytes(int32_t type, int32_t rows, int32_t cols, int32_t group) {
  if (type == CAKE_G4 || type == CAKE_G8) {
    if (group <= 0 || group % UNIT != 0 || cols % UNIT != 0) return -1;
  }
  layout l = layout_of(type, group);
  if (l.code_bytes == 0 || rows <= 0 || cols <= 0 || (l.block > 0 && cols % l.block != 0)) return -1;
  return ((int64_t)rows + GROUP_ROWS - 1) / GROUP_ROWS * group_bytes(l, cols);
}

int32_t cake_pack(cake_pool *pool, int32_t type, int32_t rows, int32_t cols, const void *blocks, const int32_t *order,
                  void *out) {
  layout l = layout_of(type, 0);
  if (cake_packed_bytes(type, rows, cols, 0) < 0 || l.block == 0) return -1;
  pack_job job = {{out, type, rows, cols, 0}, l, blocks, order, NULL, NULL, NULL, out};
  cake_run(pool, pack_work, &job);
  return 0;
}

int32_t cake_pack_groups(cake_pool *pool, const cake_matrix *shape, const uint8_t *codes, const uint16_t *scales,
                         const uint8_t *zeros, void *out) {
  if (cake_packed_bytes(shape->type, shape->rows, shape->cols, shape->group) < 0) return -1;
  layout l = layout_of(shape->type, shape->group);
  if (l.block != 0) return -1;
  pack_job job = {*shape, l, NULL, NULL, codes, zeros, scales, out};
  cake_run(pool, pack_work, &job);
  return 0;
}

static void unpack_row(const cake_matrix *w, int32_t row, float *out) {
  const layout l = layout_of(w->type, w->group);
  const int32_t units = units_of(w->cols), lane = row % GROUP_ROWS;
  uint8_t *group = (uint8_t *)w->data + row / GROUP_ROWS * group_bytes(l, w->cols);
  for (int32_t i = 0; i < units; i++) {
    uint8_t codes[UNIT], *own, *head = head_at(l, units, i, group, &own);
    float scales[2], low = 0;
    uint16_t half[2];
    read_codes(l.code_bytes, group + (int64_t)i * l.code_bytes, lane, codes);
    memcpy(half, head + 2 * lane, 2);
    scales[0] = scales[1] = half_to_float(half[0]);
    if (l.head_bytes == 64) {
      memcpy(half + 1, head + 32 + 2 * lane, 2);
      low = half_to_float(half[1]);
    }
    switch (w->type) {
      case CAKE_Q4_0: low = -8 * scales[0]; break;
      case CAKE_Q5_0: low = -16 * scales[0]; break;
      case CAKE_Q4_K:
      case CAKE_Q5_K: scales[1] = scales[0] *= own[lane], low *= -(float)own[16 + lane]; break;
      case CAKE_Q6_K: scales[1] = scales[0] * (int8_t)own[16 + lane], scales[0] *= (int8_t)own[lane]; break;
      case CAKE_G4: low = -scales[0] * head[32 + lane]; break;
      case CAKE_G8: low = -scales[0] * (int8_t)head[32 + lane]; break;
      default: break;
    }
    for (int k = 0; k < UNIT; k++) {
      float code = l.code_bytes == 512 ? (float)(int8_t)codes[k] : (float)codes[k];
      if (w->type == CAKE_Q6_K) code -= 32;
      out[i * UNIT + k] = code * scales[k / 16] + low;
    }
  }
}

static void widen_f8(const cake_matrix *w, int32_t row, float *out) {
  const uint8_t *codes = (const uint8_t *)w->data + (int64_t)row * w->cols;
  const int32_t groups = (w->cols + w->group - 1) / w->group;
  const float *scales = (const float *)((const uint8_t *)w->data + (int64_t)w->rows * w->cols) + (int64_t)row * groups;
  for (int32_t k = 0; k < w->cols; k++)
    out[k] = half_to_float((uint16_t)((codes[k] & 0x80) << 8 | (codes[k] & 0x7F) << 7)) * scales[k / w->group] * 256.0f;
}

int32_t cake_rows(const cake_matrix *w, const int32_t *ids, int32_t count, float *out) {
  for (int32_t i = 0; i < count; i++, out += w->cols) {
    if (ids[i] < 0 || ids[i] >= w->rows) return -1;
    int64_t start = (int64_t)ids[i] * w->cols;
    if (w->type == CAKE_F32) memcpy(out, (const float *)w->data + start, sizeof(float) * (size_t)w->cols);
    else if (w->type == CAKE_F16)
      for (int32_t k = 0; k < w->cols; k++) out[k] = half_to_float(((const uint16_t *)w->data)[start + k]);
    else if (w->type == CAKE_BF16)
      for (int32_t k = 0; k < w->cols; k++) out[k] = bf16_to_float(((const uint16_t *)w->data)[start + k]);
    else if (w->type == CAKE_F8) widen_f8(w, ids[i], out);
    else unpack_row(w, ids[i], out);
  }
  return 0;
}
