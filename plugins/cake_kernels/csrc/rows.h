/* What is done row by row between the products: quantising, norms, gates, storing in the cache. Included once an instruction set. */
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

/* The same in f32. */
static void round_wide_(const float *x, int32_t n, void *out) {
  for (int32_t i = 0; i < n; i++) ((float *)out)[i] = bf16_to_float(float_to_bf16(x[i]));
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
