/* Operations on a CPU that torch computes in many calls or with a copy. Built by build.py; the ops' cpu.py call it.

All arrays are contiguous unless a stride is given; strides count elements. Nothing is kept between calls. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define CHUNK 32 /* tokens of a block that are widened at once: keys and values of 128 numbers stay in a core's cache */
#define PARALLEL_FROM 262144 /* numbers: 40 us of one thread's work; waking the others costs up to 100 on busy cores */
#define MOST_VECTORS 32 /* of 16 numbers, in a head */
const int32_t most_head_dim = 16 * MOST_VECTORS;

enum { DONE, NO_MEMORY, NO_SUCH_BLOCK }; /* what a function answers; see build.py */

typedef float v16 __attribute__((vector_size(64)));
typedef float v4 __attribute__((vector_size(16)));
typedef float v16_anywhere __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t bf16;

static inline float widen(bf16 x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 narrow(float f) /* to nearest, ties to even; NaN stays NaN */
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? (bf16)(bits >> 16 | 0x40) : (bf16)rounded;
}

static inline v16 load16_f32(const float *from) { return *(const v16_anywhere *)from; }

static inline v16 load16_bf16(const bf16 *from)
{
#ifdef __AVX512F__ /* gcc makes six instructions of the general form */
    return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
    return (v16)(__builtin_convertvector(*(const u16x16 *)from, u32x16) << 16);
#endif
}

/* The sums of four vectors. Each step adds neighbours of two vectors, so that four cost little more than one alone. */
static inline v4 totals(v16 a, v16 b, v16 c, v16 d)
{
#define EVEN 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define ODD 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else /* gcc has the other name from version 12 on only */
#define PICK(a, b, ...) __builtin_shuffle(a, b, (i32x16){__VA_ARGS__})
#endif
    const v16 ab = PICK(a, b, EVEN) + PICK(a, b, ODD);
    const v16 cd = PICK(c, d, EVEN) + PICK(c, d, ODD);
    const union { v16 whole; v4 quarters[4]; } x = {PICK(ab, cd, LOW) + PICK(ab, cd, HIGH)};
    return (x.quarters[0] + x.quarters[2]) + (x.quarters[1] + x.quarters[3]);
}

/* e^x for x <= 0, NaN for NaN: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2]; relative error below 2e-7. */
static inline float exponential(float x)
{
    const float low = x < -87.0f ? -87.0f : x;
    const float n = (low * 1.44269504f + 12582912.0f) - 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
    const float r = (low - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t bits = (uint32_t)((int32_t)(n == n ? n : 0.0f) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

struct attention { /* of one step and layer; see build.py, which holds the same structure */
    const int64_t *blocks, *first_block, *ends, *rows; /* of sequence s: its blocks begin at first_block[s] */
    int64_t sequences, query_stride, num_blocks, block_tokens, window; /* window 0: none */
    const float *sinks; /* [heads] or NULL */
    int32_t heads, kv_heads, head_dim;
    float scaling, softcap; /* softcap 0: none */
};

struct kv_shape {
    int64_t tokens, heads, head_dim, num_blocks, block_tokens, k_stride, v_stride;
};

struct heads { /* what a thread keeps of the KV heads that it works on, `group` query heads for each */
    v16 *query, *sum;    /* [query heads][V]: scaled queries, weighted values */
    v16 *keys, *values;  /* [CHUNK][V] */
    float *weight;       /* [CHUNK] */
    float *top, *total;  /* [query heads]: the largest score so far, the sum of weights */
    int group, head_dim;
    float softcap;
};

static size_t scratch_vectors(const struct attention *a, int kv_heads, int V)
{
    const size_t queries = (size_t)kv_heads * (a->heads / a->kv_heads);
    return 2 * queries * V + 2 * CHUNK * V + (CHUNK + 2 * queries + 15) / 16;
}

static struct heads arrange(const struct attention *a, int kv_heads, int V, v16 *scratch)
{
    const int group = a->heads / a->kv_heads, queries = kv_heads * group;
    struct heads h = {.group = group, .head_dim = a->head_dim, .softcap = a->softcap};
    h.query = scratch;
    h.sum = h.query + queries * V;
    h.keys = h.sum + queries * V;
    h.values = h.keys + CHUNK * V;
    h.weight = (float *)(h.values + CHUNK * V);
    h.top = h.weight + CHUNK;
    h.total = h.top + queries;
    return h;
}

#define T float
#define WIDEN(x) (x)
#define LOAD16(from) load16_f32(from)
#define NARROW(x) (x)
#define NAME(x) x##_f32
#include "attention.inc"
#include "rows.inc"
#undef T
#undef WIDEN
#undef LOAD16
#undef NARROW
#undef NAME

#define T bf16
#define WIDEN(x) widen(x)
#define LOAD16(from) load16_bf16(from)
#define NARROW(x) narrow(x)
#define NAME(x) x##_bf16
#include "attention.inc"
#include "rows.inc"

#include "linear.inc"
