/* Positions of some sequences through a run of layers in one call, so that nothing but arithmetic is paid for.

   Every thread runs the whole step; a phase hands out its tasks one by one, and a barrier ends it. */
#include <stddef.h>

#include "ops.h"

/* What attends together: one row, or `rows` successive ones of a long run. */
typedef struct {
  int32_t run, row, rows, together;
} attention_part;

#define LONG_RUN 130 /* rows of a run from which they attend together; of shorter ones, guesses, each has what it would have alone */

typedef struct {
  const cake_ops *ops;
  const cake_shape *shape;
  const cake_layer *layers;
  const cake_step *step;
  attention_part *parts; /* in order of the rows */
  int32_t *run_of;       /* [rows] */
  int32_t count, queries, wants_hidden, wants_heads, wants_inner, longest, part_count;
  float *x, *normed, *q, *k, *v, *attended, *gate, *up, *product, *scores;
  activations hidden, heads, inner;
} decode_job;

static int32_t width_q(const cake_shape *s) { return s->heads * s->head_dim; }
static int32_t width_kv(const cake_shape *s) { return s->kv_heads * s->head_dim; }
static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

static void norm_phase(const decode_job *job, cake_worker *worker, const float *weight) {
  const int32_t width = job->shape->hidden;
  int32_t row;
  while ((row = cake_next(worker, job->step->rows)) >= 0) {
    float *normed = job->normed + (int64_t)row * width;
    job->ops->rms_norm(job->x + (int64_t)row * width, weight, job->shape->norm_eps, width, normed);
    cake_prepare(job->ops, job->wants_hidden, normed, row, width, 0, width, &job->hidden);
  }
  cake_barrier(worker);
}

static void add_bias(const float *bias, float *y, int64_t stride, int32_t m, int32_t begin, int32_t end) {
  if (bias == NULL) return;
  for (int32_t i = 0; i < m; i++)
    for (int32_t row = begin; row < end; row++) y[i * stride + row] += bias[row];
}

/* q, k and v as one product of that many rows. */
static void qkv_phase(const decode_job *job, cake_worker *worker, const cake_layer *layer) {
  const cake_matrix *matrices[3] = {&layer->q, &layer->k, &layer->v};
  const float *biases[3] = {layer->q_bias, layer->k_bias, layer->v_bias};
  float *outputs[3] = {job->q, job->k, job->v};
  const int32_t m = job->step->rows;
  int32_t chunk = cake_chunk(worker->pool, layer->q.rows + layer->k.rows + layer->v.rows, m), tasks[3], task;
  for (int i = 0; i < 3; i++) tasks[i] = (matrices[i]->rows + chunk - 1) / chunk;
  while ((task = cake_next(worker, tasks[0] + tasks[1] + tasks[2])) >= 0) {
    int which = task < tasks[0] ? 0 : task < tasks[0] + tasks[1] ? 1 : 2;
    task -= which == 0 ? 0 : which == 1 ? tasks[0] : tasks[0] + tasks[1];
    int32_t rows = matrices[which]->rows, begin = task * chunk, end = smaller(begin + chunk, rows);
    cake_product(job->ops, matrices[which], &job->hidden, m, begin, end, outputs[which], rows);
    add_bias(biases[which], outputs[which], rows, m, begin, end);
  }
  cake_barrier(worker);
}

static void rotate(float *head, const float *cosines, const float *sines, int32_t half) {
  for (int32_t i = 0; i < half; i++) {
    float a = head[i], b = head[i + half];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half] = b * cosines[i] + a * sines[i];
  }
}

static void position_head(const decode_job *job, const float *norm, int32_t row, float *head) {
  const cake_shape *s = job->shape;
  const int32_t half = s->rotary_dim / 2;
  if (norm != NULL) job->ops->rms_norm(head, norm, s->norm_eps, s->head_dim, head);
  rotate(head, job->step->cosines + (int64_t)row * half, job->step->sines + (int64_t)row * half, half);
}

static const int32_t *table_of(const decode_job *job, int32_t run) {
  return job->step->tables + (int64_t)run * job->step->table_stride;
}

static size_t kv_size(int32_t type) { return type == CAKE_F32 ? 4 : type == CAKE_I8 ? 1 : 2; }

/* Floats that a thread needs to attend. */
static int64_t scores_size(const decode_job *job) {
  int64_t alone = (int64_t)job->queries * job->longest, together = cake_rows_scratch(job->ops->lanes, job->shape->head_dim);
  return ((alone > together ? alone : together) + 15) & ~15ll;
}

/* Rotates queries and keys, and writes keys and values into the cache. */
static void cache_phase(const decode_job *job, cake_worker *worker, const cake_layer *layer) {
  const cake_shape *s = job->shape;
  const int32_t dim = s->head_dim;
  int32_t task;
  while ((task = cake_next(worker, job->step->rows * s->kv_heads)) >= 0) {
    int32_t row = task / s->kv_heads, head = task % s->kv_heads, position = job->step->positions[row];
    float *q = job->q + (int64_t)row * width_q(s) + head * job->queries * dim;
    float *k = job->k + (int64_t)row * width_kv(s) + head * dim, *v = job->v + (int64_t)row * width_kv(s) + head * dim;
    for (int32_t i = 0; i < job->queries; i++) position_head(job, layer->q_norm, row, q + i * dim);
    position_head(job, layer->k_norm, row, k);
    int64_t block = table_of(job, job->run_of[row])[position / s->kv_block];
    int64_t slot = (block * s->kv_block + position % s->kv_block) * s->kv_heads + head;
    size_t at = (size_t)(slot * dim) * kv_size(s->kv_type);
    int scaled = s->kv_type == CAKE_I8;
    job->ops->store_kv(k, s->kv_type, dim, (char *)layer->keys + at, scaled ? layer->key_scale + slot : NULL);
    job->ops->store_kv(v, s->kv_type, dim, (char *)layer->values + at, scaled ? layer->value_scale + slot : NULL);
  }
  cake_barrier(worker);
}

/* A task is a part and a group of heads that share their keys, or a single head where there are too few groups to go round. */
static void attention_phase(const decode_job *job, cake_worker *worker, const cake_layer *layer) {
  const cake_shape *s = job->shape;
  const int32_t dim = s->head_dim, groups = job->part_count * s->kv_heads;
  const int split = groups < 4 * cake_threads(worker->pool) && dim % 32 == 0 && !job->parts[0].together;
  const int32_t queries = split ? 1 : job->queries, per_part = s->heads / queries;
  float *scratch = job->scores + worker->index * scores_size(job);
  int32_t task;
  while ((task = cake_next(worker, job->part_count * per_part)) >= 0) {
    const attention_part *part = &job->parts[task / per_part];
    int32_t head = task % per_part * queries;
    int64_t at = (int64_t)part->row * width_q(s) + head * dim;
    attention_task t = {s, layer, table_of(job, part->run), head / job->queries, queries, job->step->positions[part->row],
                        part->rows, job->q + at, job->attended + at, width_q(s), scratch};
    if (part->together) job->ops->attend_rows(&t);
    else job->ops->attend(&t);
    for (int32_t i = 0; i < part->rows; i++)
      cake_prepare(job->ops, job->wants_heads, t.out + i * t.stride, part->row + i, width_q(s), head * dim, queries * dim, &job->heads);
  }
  cake_barrier(worker);
}

/* x += W * a + bias */
static void residual_phase(const decode_job *job, cake_worker *worker, const cake_matrix *w, const float *bias, const activations *a) {
  const int32_t m = job->step->rows, width = job->shape->hidden, chunk = cake_chunk(worker->pool, width, m);
  int32_t task;
  while ((task = cake_next(worker, (width + chunk - 1) / chunk)) >= 0) {
    int32_t begin = task * chunk, end = smaller(begin + chunk, width);
    cake_product(job->ops, w, a, m, begin, end, job->product, width);
    add_bias(bias, job->product, width, m, begin, end);
    for (int32_t i = 0; i < m; i++)
      for (int64_t at = (int64_t)i * width + begin; at < (int64_t)i * width + end; at++) job->x[at] += job->product[at];
  }
  cake_barrier(worker);
}

static void gate_phase(const decode_job *job, cake_worker *worker, const cake_layer *layer) {
  const int32_t m = job->step->rows, width = job->shape->inner, chunk = cake_chunk(worker->pool, width, m);
  int32_t task;
  while ((task = cake_next(worker, (width + chunk - 1) / chunk)) >= 0) {
    int32_t begin = task * chunk, end = smaller(begin + chunk, width);
    cake_product(job->ops, &layer->gate, &job->hidden, m, begin, end, job->gate, width);
    cake_product(job->ops, &layer->up, &job->hidden, m, begin, end, job->up, width);
    add_bias(layer->gate_bias, job->gate, width, m, begin, end);
    add_bias(layer->up_bias, job->up, width, m, begin, end);
    for (int32_t i = 0; i < m; i++) {
      float *gate = job->gate + (int64_t)i * width + begin;
      job->ops->gate(gate, job->up + (int64_t)i * width + begin, job->shape->activation, end - begin, gate);
      cake_prepare(job->ops, job->wants_inner, gate, i, width, begin, end - begin, &job->inner);
    }
  }
  cake_barrier(worker);
}

static void decode_work(void *argument, cake_worker *worker) {
  const decode_job *job = argument;
  for (int32_t i = 0; i < job->count; i++) {
    const cake_layer *layer = &job->layers[i];
    norm_phase(job, worker, layer->attention_norm);
    qkv_phase(job, worker, layer);
    cache_phase(job, worker, layer);
    attention_phase(job, worker, layer);
    residual_phase(job, worker, &layer->o, layer->o_bias, &job->heads);
    norm_phase(job, worker, layer->mlp_norm);
    gate_phase(job, worker, layer);
    residual_phase(job, worker, &layer->down, layer->down_bias, &job->inner);
  }
}

static void collect_wants(decode_job *job) {
  for (int32_t i = 0; i < job->count; i++) {
    const cake_layer *l = &job->layers[i];
    job->wants_hidden |= cake_want(l->q.type) | cake_want(l->k.type) | cake_want(l->v.type) | cake_want(l->gate.type) |
                         cake_want(l->up.type);
    job->wants_heads |= cake_want(l->o.type);
    job->wants_inner |= cake_want(l->down.type);
  }
}

/* Deals memory out in lines of 64 bytes; with NULL it only counts. */
static char *take(char **at, int64_t bytes) {
  char *here = *at;
  *at += (bytes + 63) / 64 * 64;
  return here;
}

static int64_t lay_out(decode_job *job, int32_t threads, char *memory) {
  const cake_shape *s = job->shape;
  const int64_t m = job->step->rows, size = sizeof(float);
  char *at = memory;
  job->normed = (float *)take(&at, m * s->hidden * size);
  job->product = (float *)take(&at, m * s->hidden * size);
  job->q = (float *)take(&at, m * width_q(s) * size);
  job->k = (float *)take(&at, m * width_kv(s) * size);
  job->v = (float *)take(&at, m * width_kv(s) * size);
  job->attended = (float *)take(&at, m * width_q(s) * size);
  job->gate = (float *)take(&at, m * s->inner * size);
  job->up = (float *)take(&at, m * s->inner * size);
  job->scores = (float *)take(&at, threads * scores_size(job) * size);
  job->parts = (attention_part *)take(&at, m * (int64_t)sizeof(attention_part));
  job->run_of = (int32_t *)take(&at, m * (int64_t)sizeof(int32_t));
  const int32_t rows = job->step->rows;
  job->hidden = cake_activations(job->wants_hidden, job->normed, s->hidden, rows, s->hidden,
                                 take(&at, cake_activation_bytes(job->wants_hidden, rows, s->hidden)));
  job->heads = cake_activations(job->wants_heads, job->attended, width_q(s), rows, width_q(s),
                                take(&at, cake_activation_bytes(job->wants_heads, rows, width_q(s))));
  job->inner = cake_activations(job->wants_inner, job->gate, s->inner, rows, s->inner,
                                take(&at, cake_activation_bytes(job->wants_inner, rows, s->inner)));
  return at - memory;
}

static void make_parts(decode_job *job) {
  const int32_t most = job->ops->lanes / job->queries;
  for (int32_t run = 0, row = 0; run < job->step->runs; run++) {
    const int32_t stop = row + job->step->lengths[run], together = stop - row >= LONG_RUN && most > 1;
    while (row < stop) {
      attention_part part = {run, row, together ? smaller(most, stop - row) : 1, together};
      for (int32_t i = 0; i < part.rows; i++) job->run_of[row++] = run;
      job->parts[job->part_count++] = part;
    }
  }
}

int32_t cake_decode(cake_pool *pool, const cake_shape *shape, const cake_layer *layers, int32_t count, const cake_step *step,
                    float *x) {
  static char nowhere[64];
  decode_job job = {0};
  job.ops = cake_current_ops();
  job.shape = shape;
  job.layers = layers;
  job.step = step;
  job.count = count;
  job.x = x;
  job.queries = shape->heads / shape->kv_heads;
  for (int32_t i = 0; i < step->rows; i++)
    if (step->positions[i] >= job.longest) job.longest = step->positions[i] + 1;
  collect_wants(&job);
  char *memory = cake_scratch(pool, lay_out(&job, cake_threads(pool), nowhere));
  if (memory == NULL) return -1;
  lay_out(&job, cake_threads(pool), memory);
  make_parts(&job);
  cake_run(pool, decode_work, &job);
  return 0;
}
