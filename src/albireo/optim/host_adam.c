/* Adam for tensors in host memory: cast in, step, cast out, in one pass over memory, by a few threads.

   host_kernel_compiled.py compiles this with the machine's own C compiler, and lends it threads: each calls
   host_adam_work, which returns after host_adam_end. Steps are queued with host_adam_submit; threads take slices of
   the oldest that has any left, so that no thread ever waits for another between two steps.

   Every operation on fp32 rounds as torch's fused kernel rounds it, so that both give the same bits. Hence the fused
   multiply-adds in some places and not in others, and the two forms of the second moment: torch's compiler contracts
   the product and the sum in one way in the body of a tensor and in another in its tail. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

/* Without it fmaf is a slow function, and torch's kernel, too, would have other bits. */
#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
#error "this processor has no fused multiply-add"
#endif

#define RING 1024
/* Elements. A block's gradient in fp32 and its weights stay in the first-level cache from cast to cast. */
#define BLOCK 256
/* Elements that a thread takes at a time, a multiple of BLOCK: 2 MB of traffic, long against taking it. */
#define SLICE (64 * 1024)

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { NO_DECAY, L2, DECOUPLED };
enum { BODY, TAIL };

typedef struct {
    float *master, *exp_avg, *exp_avg_sq;
    const void *gradient;
    void *output; /* or NULL */
    int64_t elements;
    int32_t gradient_kind, output_kind, decay;
    float factor;             /* times the gradient; negative to go up the gradient */
    float negative_step_size; /* -lr / (1 - beta1^t) */
    float one_minus_beta1, beta2, one_minus_beta2;
    float root_of_correction; /* sqrt(1 - beta2^t) */
    float eps;
    float decay_value; /* weight decay (L2), or 1 - lr x weight decay (DECOUPLED) */
} step_t;

typedef struct {
    step_t step;
    int64_t next;   /* first element that no thread has taken */
    int64_t active; /* slices that threads are computing */
} entry_t;

typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t work, done;
    int64_t submitted; /* steps ever submitted */
    int64_t taken;     /* steps of which every slice has been taken */
    int64_t finished;  /* steps that are done, as are all before them */
    int32_t ending;
    int32_t body_width; /* elements: the tail is what remains of a tensor beyond a multiple of it */
    int32_t body_form, tail_form;
    entry_t ring[RING];
} pool_t;

/* ---- casts ---- */

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static void from_bfloat16(float *restrict to, const uint16_t *restrict from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = float_of((uint32_t)from[i] << 16);
}

static void to_bfloat16(uint16_t *restrict to, const float *restrict from, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = bits_of(from[i]);
        /* To nearest, ties to even; the addition would turn some NaNs into infinities. */
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        to[i] = (uint16_t)(from[i] != from[i] ? 0x7fc0u : rounded);
    }
}

static void from_float16(float *restrict to, const uint16_t *restrict from, int64_t count) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (; i < count; i++) to[i] = _cvtsh_ss(from[i]);
#else
    for (; i < count; i++) {
        __fp16 half;
        memcpy(&half, from + i, sizeof half);
        to[i] = (float)half;
    }
#endif
}

static void to_float16(uint16_t *restrict to, const float *restrict from, int64_t count) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < count; i++) to[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
#else
    for (; i < count; i++) {
        __fp16 half = (__fp16)from[i];
        memcpy(to + i, &half, sizeof half);
    }
#endif
}

/* ---- the step ---- */

/* Inlined with constants for form and decay: one loop for each. */
static inline __attribute__((always_inline)) void step_as(
    const step_t *step, float *restrict weight, float *restrict average, float *restrict square,
    const float *restrict gradient, int64_t count, const int form, const int decay) {
    const float negative_step_size = step->negative_step_size, beta2 = step->beta2, eps = step->eps;
    const float one_minus_beta2 = step->one_minus_beta2, root = step->root_of_correction;
    const float decay_value = step->decay_value, weight_of_new = step->one_minus_beta1;
    /* Linear interpolation from the end that is nearer, as torch's lerp. */
    const int from_old = fabsf(weight_of_new) < 0.5f;
    const float coefficient = from_old ? weight_of_new : weight_of_new - 1.0f;
    for (int64_t i = 0; i < count; i++) {
        float w = weight[i], m = average[i], v = square[i], g = gradient[i];
        if (decay == L2) g = fmaf(w, decay_value, g);
        if (decay == DECOUPLED) w *= decay_value;
        m = fmaf(coefficient, g - m, from_old ? m : g);
        const float scaled = one_minus_beta2 * g;
        v = form == BODY ? fmaf(scaled, g, v * beta2) : fmaf(v, beta2, scaled * g);
        average[i] = m;
        square[i] = v;
        weight[i] = w + negative_step_size * m / (sqrtf(v) / root + eps);
    }
}

static void step_block(const step_t *step, int64_t begin, int64_t count, const float *gradient, int form) {
    float *weight = step->master + begin, *average = step->exp_avg + begin, *square = step->exp_avg_sq + begin;
    switch (step->decay * 2 + form) {
    case NO_DECAY * 2 + BODY: step_as(step, weight, average, square, gradient, count, BODY, NO_DECAY); break;
    case NO_DECAY * 2 + TAIL: step_as(step, weight, average, square, gradient, count, TAIL, NO_DECAY); break;
    case L2 * 2 + BODY: step_as(step, weight, average, square, gradient, count, BODY, L2); break;
    case L2 * 2 + TAIL: step_as(step, weight, average, square, gradient, count, TAIL, L2); break;
    case DECOUPLED * 2 + BODY: step_as(step, weight, average, square, gradient, count, BODY, DECOUPLED); break;
    default: step_as(step, weight, average, square, gradient, count, TAIL, DECOUPLED); break;
    }
}

static const float *cast_in(const step_t *step, int64_t begin, int64_t count, float *scratch) {
    if (step->gradient_kind == FLOAT32) {
        const float *gradient = (const float *)step->gradient + begin;
        if (step->factor == 1.0f) return gradient;
        for (int64_t i = 0; i < count; i++) scratch[i] = gradient[i] * step->factor;
        return scratch;
    }
    const uint16_t *gradient = (const uint16_t *)step->gradient + begin;
    if (step->gradient_kind == BFLOAT16) from_bfloat16(scratch, gradient, count);
    else from_float16(scratch, gradient, count);
    if (step->factor != 1.0f)
        for (int64_t i = 0; i < count; i++) scratch[i] *= step->factor;
    return scratch;
}

static void cast_out(const step_t *step, int64_t begin, int64_t count) {
    const float *weight = step->master + begin;
    if (step->output == NULL) return;
    if (step->output_kind == FLOAT32) memcpy((float *)step->output + begin, weight, count * sizeof(float));
    else if (step->output_kind == BFLOAT16) to_bfloat16((uint16_t *)step->output + begin, weight, count);
    else to_float16((uint16_t *)step->output + begin, weight, count);
}

static void step_slice(const pool_t *pool, const step_t *step, int64_t begin, int64_t end) {
    float scratch[BLOCK];
    for (int64_t at = begin; at < end; at += BLOCK) {
        int64_t count = end - at < BLOCK ? end - at : BLOCK;
        /* Slices begin at multiples of the width, so only the last block of a tensor has a tail. */
        int64_t body = count - count % pool->body_width;
        const float *gradient = cast_in(step, at, count, scratch);
        if (body) step_block(step, at, body, gradient, pool->body_form);
        if (count > body) step_block(step, at + body, count - body, gradient + body, pool->tail_form);
        cast_out(step, at, count);
    }
}

/* ---- threads ---- */

pool_t *host_adam_begin(int32_t body_width, int32_t body_form, int32_t tail_form) {
    pool_t *pool = calloc(1, sizeof *pool);
    if (pool == NULL) return NULL;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->body_width = body_width;
    pool->body_form = body_form;
    pool->tail_form = tail_form;
    return pool;
}

/* Returns 0 if there is no room: wait for the oldest first. */
int32_t host_adam_submit(pool_t *pool, const step_t *step) {
    pthread_mutex_lock(&pool->mutex);
    int32_t room = pool->submitted - pool->finished < RING;
    if (room) {
        entry_t *entry = &pool->ring[pool->submitted++ % RING];
        entry->step = *step;
        entry->next = entry->active = 0;
        pthread_cond_broadcast(&pool->work);
    }
    pthread_mutex_unlock(&pool->mutex);
    return room;
}

/* Blocks until the first `count` steps ever submitted are done; returns how many are. */
int64_t host_adam_wait(pool_t *pool, int64_t count) {
    pthread_mutex_lock(&pool->mutex);
    while (pool->finished < count) pthread_cond_wait(&pool->done, &pool->mutex);
    int64_t finished = pool->finished;
    pthread_mutex_unlock(&pool->mutex);
    return finished;
}

/* The body of a thread: computes until the end has been announced and nothing is left. */
void host_adam_work(pool_t *pool) {
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (pool->taken == pool->submitted && !pool->ending) pthread_cond_wait(&pool->work, &pool->mutex);
        if (pool->taken == pool->submitted) break;
        entry_t *entry = &pool->ring[pool->taken % RING];
        int64_t begin = entry->next, end = begin + SLICE;
        if (end >= entry->step.elements) {
            end = entry->step.elements;
            pool->taken++;
        }
        entry->next = end;
        entry->active++;
        pthread_mutex_unlock(&pool->mutex);
        step_slice(pool, &entry->step, begin, end);
        pthread_mutex_lock(&pool->mutex);
        entry->active--;
        int64_t before = pool->finished;
        while (pool->finished < pool->taken && pool->ring[pool->finished % RING].active == 0) pool->finished++;
        if (pool->finished != before) pthread_cond_broadcast(&pool->done);
    }
    pthread_mutex_unlock(&pool->mutex);
}

void host_adam_end(pool_t *pool) {
    pthread_mutex_lock(&pool->mutex);
    pool->ending = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
}

/* After all threads have returned. */
void host_adam_free(pool_t *pool) {
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->done);
    free(pool);
}
