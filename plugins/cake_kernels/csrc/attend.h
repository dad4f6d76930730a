/* Attention over the cache: of one position, or of many positions of a sequence. Included once an instruction set. */

#define LANES (16 * ATTEND_VECTORS)

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

/* The first position that `position` attends to. */
static INLINE int32_t first_(const attention_task *t, int32_t position) {
  int32_t window = t->layer->window;
  return window > 0 && position >= window ? position - window + 1 : 0;
}

static INLINE void scores_(const int type, const attention_task *t, int32_t first) {
  const int32_t dim = t->shape->head_dim, count = t->position - first + 1;
  const size_t size = type == CAKE_F32 ? 4 : type == CAKE_I8 ? 1 : 2;
  for (int32_t p = 0; p < count; p++) {
    int64_t slot = slot_(t, first + p);
    const void *key = (const char *)t->layer->keys + (size_t)(slot * dim) * size;
    float scale = t->shape->scale * (type == CAKE_I8 ? t->layer->key_scale[slot] : 1.0f);
    for (int32_t g = 0; g < t->queries; g++) {
      vf acc = f_zero();
      for (int32_t i = 0; i < dim; i += 16) acc = f_fma(f_load(t->q + g * dim + i), kv_load_(type, key, i), acc);
      t->scratch[g * count + p] = f_sum(acc) * scale;
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

static INLINE void mix_(const int type, const attention_task *t, int32_t first) {
  const int32_t dim = t->shape->head_dim, count = t->position - first + 1;
  const size_t size = type == CAKE_F32 ? 4 : type == CAKE_I8 ? 1 : 2;
  memset(t->out, 0, sizeof(float) * (size_t)(t->queries * dim));
  for (int32_t p = 0; p < count; p++) {
    int64_t slot = slot_(t, first + p);
    const void *value = (const char *)t->layer->values + (size_t)(slot * dim) * size;
    float scale = type == CAKE_I8 ? t->layer->value_scale[slot] : 1.0f;
    for (int32_t g = 0; g < t->queries; g++) {
      vf weight = f_set(t->scratch[g * count + p] * scale);
      float *out = t->out + g * dim;
      for (int32_t i = 0; i < dim; i += 16) f_store(out + i, f_fma(weight, kv_load_(type, value, i), f_load(out + i)));
    }
  }
}

static INLINE void attend_type_(const int type, const attention_task *t) {
  const int32_t first = first_(t, t->position), count = t->position - first + 1;
  scores_(type, t, first);
  for (int32_t g = 0; g < t->queries; g++) softmax_(t->scratch + g * count, count);
  mix_(type, t, first);
}

/* Many positions at once. A lane is one query, from all heads of all positions; nothing is summed across lanes, so a row's
   result does not depend on which rows are beside it. */
typedef struct {
  float *queries, *keys, *values, *scores, *out; /* [dim, LANES], [KEYS, dim], [KEYS, dim], [KEYS, LANES], [dim, LANES] */
  float most[LANES], sum[LANES], factor[LANES];
  int32_t first[LANES], last[LANES];             /* positions that a lane attends to */
} lanes_;

static INLINE void start_lanes_(const attention_task *t, lanes_ *l) {
  const int32_t dim = t->shape->head_dim, used = t->rows * t->queries;
  l->queries = t->scratch;
  l->out = l->queries + dim * LANES;
  l->keys = l->out + dim * LANES;
  l->values = l->keys + dim * ATTEND_KEYS;
  l->scores = l->values + dim * ATTEND_KEYS;
  for (int32_t i = 0; i < LANES; i++) {
    int32_t own = i < used ? i : used - 1, row = own / t->queries; /* lanes left over repeat the last one */
    const float *q = t->q + row * t->stride + own % t->queries * dim;
    for (int32_t d = 0; d < dim; d++) l->queries[d * LANES + i] = q[d] * t->shape->scale;
    l->last[i] = t->position + row;
    l->first[i] = first_(t, l->last[i]);
    l->most[i] = -3e38f;
    l->sum[i] = 0;
  }
  memset(l->out, 0, sizeof(float) * (size_t)(dim * LANES));
}

/* `count` vectors from position `from` on in f32, and zeros up to ATTEND_KEYS. */
static INLINE void widen_kv_(const int type, const attention_task *t, const void *pool, const float *scales, int32_t from,
                             int32_t count, float *out) {
  const int32_t dim = t->shape->head_dim;
  const size_t size = type == CAKE_F32 ? 4 : type == CAKE_I8 ? 1 : 2;
  for (int32_t p = 0; p < count; p++, out += dim) {
    int64_t slot = slot_(t, from + p);
    const void *own = (const char *)pool + (size_t)(slot * dim) * size;
    vf scale = f_set(type == CAKE_I8 ? scales[slot] : 1.0f);
    for (int32_t i = 0; i < dim; i += 16) {
      vf x = kv_load_(type, own, i);
      f_store(out + i, type == CAKE_I8 ? f_mul(x, scale) : x);
    }
  }
  memset(out, 0, sizeof(float) * (size_t)((ATTEND_KEYS - count) * dim));
}

static INLINE void lane_scores_(const lanes_ *l, int32_t dim) {
  for (int32_t k = 0; k < ATTEND_KEYS; k += 4) {
    vf acc[4][ATTEND_VECTORS];
    UNROLL for (int j = 0; j < 4; j++) UNROLL for (int v = 0; v < ATTEND_VECTORS; v++) acc[j][v] = f_zero();
    const float *keys = l->keys + k * dim, *queries = l->queries;
    for (int32_t d = 0; d < dim; d++, queries += LANES) {
      UNROLL for (int j = 0; j < 4; j++) {
        vf key = f_set(keys[j * dim + d]);
        UNROLL for (int v = 0; v < ATTEND_VECTORS; v++) acc[j][v] = f_fma(key, f_load(queries + 16 * v), acc[j][v]);
      }
    }
    UNROLL for (int j = 0; j < 4; j++)
      UNROLL for (int v = 0; v < ATTEND_VECTORS; v++) f_store(l->scores + (k + j) * LANES + 16 * v, acc[j][v]);
  }
}

/* Scores become weights under the largest score so far; `factor` is what that takes from all that came before. */
static INLINE void lane_weights_(lanes_ *l, int32_t from) {
  float most[LANES];
  memcpy(most, l->most, sizeof most);
  for (int32_t k = 0; k < ATTEND_KEYS; k++) {
    float *x = l->scores + k * LANES;
    for (int32_t i = 0; i < LANES; i++) {
      x[i] = from + k < l->first[i] || from + k > l->last[i] ? -3e38f : x[i];
      most[i] = x[i] > most[i] ? x[i] : most[i];
    }
  }
  for (int32_t i = 0; i < LANES; i++) {
    l->factor[i] = exp_(l->most[i] - most[i]);
    l->most[i] = most[i];
    l->sum[i] *= l->factor[i];
  }
  for (int32_t k = 0; k < ATTEND_KEYS; k++) {
    float *x = l->scores + k * LANES;
    for (int32_t i = 0; i < LANES; i++) {
      x[i] = exp_(x[i] - most[i]);
      l->sum[i] += x[i];
    }
  }
}

static INLINE void lane_mix_(const lanes_ *l, int32_t dim) {
  for (int32_t d = 0; d < dim; d += 4) {
    vf acc[4][ATTEND_VECTORS];
    UNROLL for (int j = 0; j < 4; j++) UNROLL for (int v = 0; v < ATTEND_VECTORS; v++)
      acc[j][v] = f_mul(f_load(l->out + (d + j) * LANES + 16 * v), f_load(l->factor + 16 * v));
    const float *values = l->values + d, *weights = l->scores;
    for (int32_t k = 0; k < ATTEND_KEYS; k++, weights += LANES, values += dim) {
      UNROLL for (int j = 0; j < 4; j++) {
        vf value = f_set(values[j]);
        UNROLL for (int v = 0; v < ATTEND_VECTORS; v++) acc[j][v] = f_fma(value, f_load(weights + 16 * v), acc[j][v]);
      }
    }
    UNROLL for (int j = 0; j < 4; j++)
      UNROLL for (int v = 0; v < ATTEND_VECTORS; v++) f_store(l->out + (d + j) * LANES + 16 * v, acc[j][v]);
  }
}

static INLINE void attend_rows_type_(const int type, const attention_task *t) {
  const int32_t dim = t->shape->head_dim, last = t->position + t->rows - 1;
  lanes_ l;
  start_lanes_(t, &l);
  for (int32_t from = l.first[0]; from <= last; from += ATTEND_KEYS) {
    int32_t count = last - from + 1 < ATTEND_KEYS ? last - from + 1 : ATTEND_KEYS;
    widen_kv_(type, t, t->layer->keys, t->layer->key_scale, from, count, l.keys);
    widen_kv_(type, t, t->layer->values, t->layer->value_scale, from, count, l.values);
    lane_scores_(&l, dim);
    lane_weights_(&l, from);
    lane_mix_(&l, dim);
  }
  for (int32_t i = 0; i < t->rows * t->queries; i++) {
    float *out = t->out + i / t->queries * t->stride + i % t->queries * dim, inverse = 1.0f / l.sum[i];
    for (int32_t d = 0; d < dim; d++) out[d] = l.out[d * LANES + i] * inverse;
  }
}

#define FOR_CACHE(NAME)                                                        \
  static void NAME(const attention_task *t) {                                  \
    switch (t->shape->kv_type) {                                               \
      case CAKE_F16: NAME##type_(CAKE_F16, t); break;                          \
      case CAKE_BF16: NAME##type_(CAKE_BF16, t); break;                        \
      case CAKE_I8: NAME##type_(CAKE_I8, t); break;                            \
      default: NAME##type_(CAKE_F32, t);                                       \
    }                                                                          \
  }
FOR_CACHE(attend_)
FOR_CACHE(attend_rows_)
#undef FOR_CACHE
