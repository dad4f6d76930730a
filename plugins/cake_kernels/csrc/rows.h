/* Everything but the products: quantising, norms, gates, attention over the cache. Included once an instruction set. */
#include <math.h>

/* e^x to 2 units in the last place, without a branch, so that loops over it are vectorised. */
static INLINE float exp_(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the rounded integer */
  float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_float((float_bits(shifted) + 127) << 23);
}

static INLINE int8_t round_(float x) { return (int8_t)(float_bits(x + 12582912.0f) & 0xFF); }

/* The largest magnitude; as integers, whose maximum every compiler vectorises. A NaN counts as the largest of all. */
static INLINE float largest_(const float *x, int32_t n) {
  uint32_t most = 0;
  for (int32_t i = 0; i < n; i++) {
    uint32_t bits = float_bits(x[i]) & 0x7FFFFFFF;
    most = bits > most ? bits : most;
  }
  return bits_float(most);
}

static void quantize_(const float *x, int32_t n, unit_act *out) {
  for (int32_t u = 0; u < n / UNIT; u++, x += UNIT, out++) {
    float most = largest_(x, UNIT), scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
    if (scale < 1.2e-38f) scale = inverse = 0.0f; /* 127 / most is infinite for the smallest numbers */
    for (int32_t i = 0; i < UNIT; i++) out->q[i] = round_(x[i] * inverse);
    int32_t sums[2] = {0, 0};
    for (int32_t i = 0; i < UNIT / 2; i++) sums[0] += out->q[i];
    for (int32_t i = UNIT / 2; i < UNIT; i++) sums[1] += out->q[i];
    out->sums[0] = sums[0];
    out->sums[1] = sums[1];
    out->scale = scale;
    out->scaled_sum = scale * (float)(sums[0] + sums[1]);
  }
}

static void round_bf16_(const float *x, int32_t n, uint16_t *out) {
  for (int32_t i = 0; i < n; i++) out[i] = float_to_bf16(x[i]);
}

static void rms_norm_(const float *x, const float *weight, float eps, int32_t n, float *y) {
  vf acc = f_zero();
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) acc = f_fma(f_load(x + i), f_load(x + i), acc);
  float sum = f_sum(acc);
  for (; i < n; i++) sum += x[i] * x[i];
  float inverse = 1.0f / sqrtf(sum / (float)n + eps);
  for (i = 0; i < n; i++) y[i] = x[i] * inverse * weight[i];
}

static void gate_(const float *gate, const float *up, int32_t activation, int32_t n, float *y) {
  if (activation == 0) {
    for (int32_t i = 0; i < n; i++) y[i] = gate[i] / (1.0f + exp_(-gate[i])) * up[i];
    return;
  }
  for (int32_t i = 0; i < n; i++) { /* 0.5 (1 + tanh z) = 1 / (1 + e^-2z) */
    float g = gate[i], z = 1.5957691216f * (g + 0.044715f * g * g * g);
    y[i] = g / (1.0f + exp_(-z)) * up[i];
  }
}

static void store_kv_(const float *x, int32_t type, int32_t n, void *out, float *scale) {
  if (type == CAKE_F32) memcpy(out, x, sizeof(float) * (size_t)n);
  else if (type == CAKE_BF16) round_bf16_(x, n, out);
  else if (type == CAKE_F16) for (int32_t i = 0; i < n; i++) ((uint16_t *)out)[i] = float_to_half(x[i]);
  else {
    float most = largest_(x, n), inverse = most > 1e-36f ? 127.0f / most : 0.0f;
    for (int32_t i = 0; i < n; i++) ((int8_t *)out)[i] = round_(x[i] * inverse);
    *scale = most / 127.0f;
  }
}

static INLINE vf kv_load_(const int type, const void *p, int32_t i) {
  switch (type) {
    case CAKE_F16: return f_half((const uint16_t *)p + i);
    case CAKE_BF16: return f_bf16((const uint16_t *)p + i);
    case CAKE_I8: return f_int(i_i8((const int8_t *)p + i));
    default: return f_load((const float *)p + i);
  }
}

/* Index of (position, head) in the cache, in vectors of head_dim. */
static INLINE int64_t slot_(const attention_task *t, int32_t position) {
  const cake_shape *s = t->shape;
  int64_t block = t->table[position / s->kv_block];
  return (block * s->kv_block + position % s->kv_block) * s->kv_heads + t->kv_head;
}

static INLINE void scores_(const int type, const attention_task *t) {
  const int32_t dim = t->shape->head_dim, count = t->last - t->first + 1;
  const size_t size = type == CAKE_F32 ? 4 : type == CAKE_I8 ? 1 : 2;
  for (int32_t p = 0; p < count; p++) {
    int64_t slot = slot_(t, t->first + p);
    const void *key = (const char *)t->layer->keys + (size_t)(slot * dim) * size;
    float scale = t->shape->scale * (type == CAKE_I8 ? t->layer->key_scale[slot] : 1.0f);
    for (int32_t g = 0; g < t->queries; g++) {
      vf acc = f_zero();
      for (int32_t i = 0; i < dim; i += 16) acc = f_fma(f_load(t->q + g * dim + i), kv_load_(type, key, i), acc);
      t->scores[g * count + p] = f_sum(acc) * scale;
    }
  }
}

static INLINE void softmax_(float *x, int32_t n) {
  float most = -INFINITY;
  for (int32_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
  for (int32_t i = 0; i < n; i++) x[i] = exp_(x[i] - most);
  float sums[16] = {0}, sum = 0;
  int32_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int32_t j = 0; j < 16; j++) sums[j] += x[i + j];
  for (; i < n; i++) sum += x[i];
  for (int32_t j = 0; j < 16; j++) sum += sums[j];
  float inverse = 1.0f / sum;
  for (i = 0; i < n; i++) x[i] *= inverse;
}

static INLINE void mix_(const int type, const attention_task *t) {
  const int32_t dim = t->shape->head_dim, count = t->last - t->first + 1;
  const size_t size = type == CAKE_F32 ? 4 : type == CAKE_I8 ? 1 : 2;
  memset(t->out, 0, sizeof(float) * (size_t)(t->queries * dim));
  for (int32_t p = 0; p < count; p++) {
    int64_t slot = slot_(t, t->first + p);
    const void *value = (const char *)t->layer->values + (size_t)(slot * dim) * size;
    float scale = type == CAKE_I8 ? t->layer->value_scale[slot] : 1.0f;
    for (int32_t g = 0; g < t->queries; g++) {
      vf weight = f_set(t->scores[g * count + p] * scale);
      float *out = t->out + g * dim;
      for (int32_t i = 0; i < dim; i += 16) f_store(out + i, f_fma(weight, kv_load_(type, value, i), f_load(out + i)));
    }
  }
}

static INLINE void attend_type_(const int type, const attention_task *t) {
  scores_(type, t);
  for (int32_t g = 0; g < t->queries; g++) {
    int32_t count = t->last - t->first + 1;
    softmax_(t->scores + g * count, count);
  }
  mix_(type, t);
}

static void attend_(const attention_task *t) {
  switch (t->shape->kv_type) {
    case CAKE_F16: attend_type_(CAKE_F16, t); break;
    case CAKE_BF16: attend_type_(CAKE_BF16, t); break;
    case CAKE_I8: attend_type_(CAKE_I8, t); break;
    default: attend_type_(CAKE_F32, t);
  }
}
