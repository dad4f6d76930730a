/* Threads that help the caller through the phases of one call and sleep between calls.

   A thread that waits spins for some tens of microseconds, since the phases of a decode step are that short, and then sleeps.
   An idle pool costs nothing, and where processors are taken by others the caller goes on alone. */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* madvise */
#include <sys/mman.h>
#endif
#include <stdatomic.h>
#include <stdlib.h>

#include "ops.h"

#if defined(_WIN32)
#include <malloc.h>
#include <windows.h>
typedef SRWLOCK lock_t;
typedef CONDITION_VARIABLE signal_t;
typedef HANDLE thread_t;
#define lock_make(l) InitializeSRWLock(l)
#define lock_take(l) AcquireSRWLockExclusive(l)
#define lock_give(l) ReleaseSRWLockExclusive(l)
#define signal_make(s) InitializeConditionVariable(s)
#define signal_wait(s, l) SleepConditionVariableSRW(s, l, INFINITE, 0)
#define signal_all(s) WakeAllConditionVariable(s)
#else
#include <pthread.h>
typedef pthread_mutex_t lock_t;
typedef pthread_cond_t signal_t;
typedef pthread_t thread_t;
#define lock_make(l) pthread_mutex_init(l, NULL)
#define lock_take(l) pthread_mutex_lock(l)
#define lock_give(l) pthread_mutex_unlock(l)
#define signal_make(s) pthread_cond_init(s, NULL)
#define signal_wait(s, l) pthread_cond_wait(s, l)
#define signal_all(s) pthread_cond_broadcast(s)
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define relax() _mm_pause()
#elif defined(__aarch64__) && !defined(_MSC_VER)
#define relax() __asm__ __volatile__("yield")
#else
#define relax() ((void)0)
#endif

#define SPINS 1500
#define LINE 64

typedef struct {
  cake_worker worker;
  thread_t thread;
} helper;

struct cake_pool {
  atomic_uint job; /* counts calls; helpers wait for it to change */
  char pad0[LINE];
  atomic_ullong ticket; /* phase << 32 | its next task */
  atomic_int done;      /* tasks of the phase */
  char pad1[LINE];
  atomic_uint phase;  /* for those who wait for its end */
  atomic_uint open;   /* the job that may be joined, 0: none */
  atomic_uint inside; /* helpers that have joined */
  atomic_uint left;   /* counts helpers that have left */
  char pad2[LINE];
  atomic_uint sleepers;
  lock_t lock;
  signal_t signal;
  cake_work work; /* NULL: helpers end */
  void *argument;
  int32_t threads;
  helper *helpers;
  char *scratch;
  int64_t scratch_bytes;
};

/* Until `word` is no longer `old`. A sleeper announces itself before it looks again, so a change is never missed. */
static void await_change(cake_pool *pool, atomic_uint *word, unsigned old) {
  for (int i = 0; i < SPINS; i++) {
    if (atomic_load_explicit(word, memory_order_acquire) != old) return;
    relax();
  }
  lock_take(&pool->lock);
  atomic_fetch_add(&pool->sleepers, 1);
  while (atomic_load(word) == old) signal_wait(&pool->signal, &pool->lock);
  atomic_fetch_sub(&pool->sleepers, 1);
  lock_give(&pool->lock);
}

static void change(cake_pool *pool, atomic_uint *word) {
  atomic_fetch_add(word, 1);
  if (atomic_load(&pool->sleepers) == 0) return;
  lock_take(&pool->lock);
  signal_all(&pool->signal);
  lock_give(&pool->lock);
}

/* A helper joins first and then looks whether the job is still open; the caller closes it first and then looks who is inside. */
static void help(helper *self) {
  cake_pool *pool = self->worker.pool;
  for (unsigned job = 0;;) {
    await_change(pool, &pool->job, job);
    job = atomic_load(&pool->job);
    atomic_fetch_add(&pool->inside, 1);
    int joined = atomic_load(&pool->open) == job;
    int ends = joined && pool->work == NULL;
    if (joined && !ends) {
      self->worker.phase = 0;
      pool->work(pool->argument, &self->worker);
    }
    atomic_fetch_sub(&pool->inside, 1);
    change(pool, &pool->left);
    if (ends) return;
  }
}

#if defined(_WIN32)
static DWORD WINAPI helper_main(void *self) {
  help(self);
  return 0;
}
static int start(helper *h) {
  h->thread = CreateThread(NULL, 0, helper_main, h, 0, NULL);
  return h->thread != NULL;
}
static void join(helper *h) {
  WaitForSingleObject(h->thread, INFINITE);
  CloseHandle(h->thread);
}
#else
static void *helper_main(void *self) {
  help(self);
  return NULL;
}
static int start(helper *h) { return pthread_create(&h->thread, NULL, helper_main, h) == 0; }
static void join(helper *h) { pthread_join(h->thread, NULL); }
#endif

cake_pool *cake_pool_new(int32_t threads) {
  cake_pool *pool = calloc(1, sizeof(cake_pool));
  if (pool == NULL) return NULL;
  lock_make(&pool->lock);
  signal_make(&pool->signal);
  pool->threads = 1;
  if (threads > 1) pool->helpers = calloc((size_t)threads, sizeof(helper));
  for (int32_t i = 1; i < threads && pool->helpers != NULL; i++) {
    helper *h = &pool->helpers[i];
    h->worker.pool = pool;
    h->worker.index = i;
    if (!start(h)) break; /* fewer threads are slower, not wrong */
    pool->threads = i + 1;
  }
  return pool;
}

static void release(char *memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  free(memory);
#endif
}

static void announce(cake_pool *pool, cake_work work, void *argument) {
  pool->work = work;
  pool->argument = argument;
  atomic_store(&pool->done, 0);
  atomic_store(&pool->ticket, 0);
  atomic_store(&pool->phase, 0);
  unsigned job = atomic_load(&pool->job) + 1;
  if (job == 0) { /* 0 stands for none: go round it */
    atomic_store(&pool->job, 0);
    job = 1;
  }
  atomic_store(&pool->open, job);
  change(pool, &pool->job);
}

void cake_pool_free(cake_pool *pool) {
  if (pool == NULL) return;
  announce(pool, NULL, NULL);
  for (int32_t i = 1; i < pool->threads; i++) join(&pool->helpers[i]);
  free(pool->helpers);
  release(pool->scratch);
  free(pool);
}

int32_t cake_threads(const cake_pool *pool) { return pool->threads; }

void cake_run(cake_pool *pool, cake_work work, void *argument) {
  cake_worker caller = {pool, 0, 0, 0};
  announce(pool, work, argument);
  work(argument, &caller);
  atomic_store(&pool->open, 0);
  for (;;) {
    unsigned left = atomic_load(&pool->left);
    if (atomic_load(&pool->inside) == 0) return;
    await_change(pool, &pool->left, left);
  }
}

/* The phase cannot end while a task is held, so nobody else touches `done` between its last task and the next phase. */
static void finish(cake_worker *worker, int32_t tasks) {
  cake_pool *pool = worker->pool;
  worker->holds = 0;
  if (atomic_fetch_add(&pool->done, 1) + 1 < tasks) return;
  atomic_store(&pool->done, 0);
  atomic_store(&pool->ticket, (unsigned long long)(worker->phase + 1) << 32);
  change(pool, &pool->phase);
}

int32_t cake_next(cake_worker *worker, int32_t tasks) {
  cake_pool *pool = worker->pool;
  if (worker->holds) finish(worker, tasks);
  unsigned long long ticket = atomic_load(&pool->ticket);
  do {
    if (ticket >> 32 != worker->phase || (int32_t)(uint32_t)ticket >= tasks) return -1;
  } while (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket + 1));
  worker->holds = 1;
  return (int32_t)(uint32_t)ticket;
}

void cake_barrier(cake_worker *worker) {
  cake_pool *pool = worker->pool;
  unsigned phase;
  while ((phase = atomic_load(&pool->phase)) <= worker->phase) await_change(pool, &pool->phase, phase);
  worker->phase++;
}

char *cake_scratch(cake_pool *pool, int64_t bytes) {
  if (bytes <= pool->scratch_bytes) return pool->scratch;
  release(pool->scratch);
  bytes = (bytes + 4095) / 4096 * 4096;
#if defined(_WIN32)
  pool->scratch = _aligned_malloc((size_t)bytes, LINE);
#else
  pool->scratch = aligned_alloc(LINE, (size_t)bytes);
#endif
  pool->scratch_bytes = pool->scratch == NULL ? 0 : bytes;
  return pool->scratch;
}

void cake_use_large_pages(void *memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, start = ((uintptr_t)memory + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)memory + (uintptr_t)bytes) / page * page;
  if (end > start) madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}
