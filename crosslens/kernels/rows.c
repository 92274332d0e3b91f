/* Row gathers of a sparse code, for the CPU. Plain C99: the compiler makes the vectors.
 *
 * A ragged list of pairs is three arrays: pairs of item i are at starts[i] … starts[i+1]-1 of `index`
 * (a row of `table`) and `weight`. Each function does the items [first, last) and nothing else, so
 * that threads can share a call; sums run in the order of the pairs, so that they are the same
 * however the items were shared out.
 *
 * TABLE is how a table is stored: 16 for bfloat16 (as its bits), 32 for float32. This file is
 * compiled once for each.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define NAMED(name) JOIN(name, TABLE)

#if TABLE == 16
typedef uint16_t element;
typedef int16_t key;
static inline float value(uint16_t bits) {
  union { uint32_t bits; float value; } it = {(uint32_t)bits << 16};
  return it.value;
}
#else
typedef float element;
typedef int32_t key;
static inline float value(float it) { return it; }
#endif

typedef int64_t i64;
typedef int32_t i32;

/* Eight rows at a time, so that the sums are loaded and stored an eighth as often. */
#define EIGHT(T) T(0) T(1) T(2) T(3) T(4) T(5) T(6) T(7)
#define ROW(m) const element *restrict r##m = table + (i64)index[p + m] * width; \
  const float w##m = weight[p + m];
#define WEIGHED(m) + w##m * value(r##m[j])

static void weighed_sum(const i32 *index, const float *weight, i64 n, const element *table, i64 width,
                        float *restrict out) {
  memset(out, 0, width * sizeof(float));
  i64 p = 0;
  for (; p + 8 <= n; p += 8) {
    EIGHT(ROW)
    for (i64 j = 0; j < width; j++) out[j] += 0.0f EIGHT(WEIGHED);
  }
  for (; p < n; p++) {
    ROW(0)
    for (i64 j = 0; j < width; j++) out[j] += w0 * value(r0[j]);
  }
}

/* out[i, :] = sum of weight · table[index, :] over the pairs of item i. */
void NAMED(bag_sum)(const i64 *starts, const i32 *index, const float *weight, const element *table,
                    i64 width, float *out, i64 first, i64 last) {
  for (i64 i = first; i < last; i++)
    weighed_sum(index + starts[i], weight + starts[i], starts[i + 1] - starts[i], table, width,
                out + i * width);
}

/* out[p] = rows[i, :] · table[index[p], :] for each pair p of item i. */
void NAMED(products)(const i64 *starts, const i32 *index, const float *rows, const element *table,
                     i64 width, float *out, i64 first, i64 last) {
  for (i64 i = first; i < last; i++) {
    const float *restrict row = rows + i * width;
    i64 p = starts[i];
    for (; p + 4 <= starts[i + 1]; p += 4) {
      const element *restrict a = table + (i64)index[p] * width;
      const element *restrict b = table + (i64)index[p + 1] * width;
      const element *restrict c = table + (i64)index[p + 2] * width;
      const element *restrict d = table + (i64)index[p + 3] * width;
      float sa = 0, sb = 0, sc = 0, sd = 0;
      for (i64 j = 0; j < width; j++) {
        sa += row[j] * value(a[j]);
        sb += row[j] * value(b[j]);
        sc += row[j] * value(c[j]);
        sd += row[j] * value(d[j]);
      }
      out[p] = sa, out[p + 1] = sb, out[p + 2] = sc, out[p + 3] = sd;
    }
    for (; p < starts[i + 1]; p++) {
      const element *restrict a = table + (i64)index[p] * width;
      float sum = 0;
      for (i64 j = 0; j < width; j++) sum += row[j] * value(a[j]);
      out[p] = sum;
    }
  }
}

/* What only changes the length of a weight row is taken out of its gradient. */
static void project(const float *restrict weights, float *restrict gradient, i64 width) {
  float along = 0, square = 0;
  for (i64 j = 0; j < width; j++) {
    along += gradient[j] * weights[j];
    square += weights[j] * weights[j];
  }
  const float share = square > 0 ? along / square : 0;
  for (i64 j = 0; j < width; j++) gradient[j] -= share * weights[j];
}

/* Squared length of each row's gradient (bag_sum, projected where `weights` is given).
 * Returns 0, or 1 where there is no memory. */
int NAMED(row_squares)(const i64 *starts, const i32 *index, const float *weight,
                       const element *table, i64 width, const float *weights, float *out, i64 first,
                       i64 last) {
  float *restrict g = malloc(width * sizeof(float));
  if (!g) return 1;
  for (i64 i = first; i < last; i++) {
    const i64 n = starts[i + 1] - starts[i];
    out[i] = 0;
    if (!n) continue;
    weighed_sum(index + starts[i], weight + starts[i], n, table, width, g);
    if (weights) project(weights + i * width, g, width);
    float square = 0;
    for (i64 j = 0; j < width; j++) square += g[j] * g[j];
    out[i] = square;
  }
  free(g);
  return 0;
}

/* Adam (Kingma & Ba 2015) as torch.optim.Adam computes it. */
struct adam {
  float lr, beta2, eps;
  float fresh1, fresh2; /* 1 - beta1, 1 - beta2: rounded once, not twice */
  float scale;   /* on the gradient: what clipping leaves */
  float bias1;   /* 1 - beta1^step */
  float bias2;   /* sqrt(1 - beta2^step) */
  i64 step;      /* of this call, from 1 */
  i64 projected; /* 1: as in `project` */
  i64 half;      /* 1: the moments are bfloat16 */
  i64 salt;      /* of this step's hashes */
};

static void widened(const uint16_t *restrict from, float *restrict to, i64 width) {
  for (i64 j = 0; j < width; j++) {
    union { uint32_t bits; float value; } it = {(uint32_t)from[j] << 16};
    to[j] = it.value;
  }
}

static inline uint16_t half_of(float from, uint32_t drawn) {
  union { float value; uint32_t bits; } it = {from};
  const uint32_t odd = from == from ? it.bits : it.bits | 0x400000; /* NaN stays one */
  return (uint16_t)(((it.bits & 0x7F800000) == 0x7F800000 ? odd : it.bits + drawn) >> 16);
}

/* Moments as bfloat16, up or down by a hash (Wellons's lowbias32) of place and salt, whose lower half
 * is for the second moment and upper half for the first: functional.adam.rounded. */
static void keep(const float *restrict square, uint16_t *restrict square_to,
                 const float *restrict mean, uint16_t *restrict mean_to, i64 width,
                 uint32_t place) {
  for (i64 j = 0; j < width; j++) {
    uint32_t hash = place + (uint32_t)j;
    hash = (hash ^ (hash >> 16)) * 0x7FEB352Du;
    hash = (hash ^ (hash >> 15)) * 0x846CA68Bu;
    hash ^= hash >> 16;
    square_to[j] = half_of(square[j], hash & 0xFFFF);
    if (mean_to) mean_to[j] = half_of(mean[j], hash >> 16);
  }
}

#define TILE 512 /* numbers whose widened moments stay in the nearest cache */

/* A step of the weights from `at` on and of their moments, by their gradient. */
static void move(const struct adam *how, const float *restrict gradient, float decay, i64 at, i64 width,
                 float *weights, void *mean, void *square) {
  const float lr = how->lr / how->bias1, over = 1.0f / how->bias2, eps = how->eps;
  const float fresh1 = how->fresh1, fresh2 = how->fresh2, scale = how->scale;
  float wide_square[TILE], wide_mean[TILE];
  for (i64 start = 0; start < width; start += TILE) {
    const i64 n = start + TILE < width ? TILE : width - start, here = at + start;
    uint16_t *half_square = how->half ? (uint16_t *)square + here : NULL;
    uint16_t *half_mean = how->half && mean ? (uint16_t *)mean + here : NULL;
    const float *restrict g = gradient + start;
    float *restrict w = weights + here;
    float *restrict v = how->half ? wide_square : (float *)square + here;
    float *restrict m = how->half || !mean ? wide_mean : (float *)mean + here;
    if (half_square) widened(half_square, v, n);
    if (half_mean) widened(half_mean, m, n);
    if (mean) {
      for (i64 j = 0; j < n; j++) {
        const float it = g[j] * scale;
        m[j] += fresh1 * (it - m[j]);
        v[j] = decay * v[j] + fresh2 * it * it;
        w[j] -= lr * m[j] / (sqrtf(v[j]) * over + eps);
      }
    } else {
      for (i64 j = 0; j < n; j++) {
        const float it = g[j] * scale;
        v[j] = decay * v[j] + fresh2 * it * it;
        w[j] -= lr * it / (sqrtf(v[j]) * over + eps);
      }
    }
    if (half_square) keep(v, half_square, m, half_mean, n, (uint32_t)here + (uint32_t)how->salt);
  }
}

/* One step for each weight row from its pairs: sum, clip, Adam, and the copy in the table's format,
 * while the row is in the cache.
 *
 * Without `mean` (beta1 = 0) a row without pairs would not move, only its second moment would decay:
 * `seen` holds the step at which each row was last touched, and the decay is made up for when it is
 * next. Returns 0, or 1 where there is no memory. */
int NAMED(adam_rows)(const struct adam *how, const i64 *starts, const i32 *index,
                     const float *weight, const element *table, i64 width, float *weights,
                     void *mean, void *square, i32 *seen, element *copy, i64 first, i64 last) {
  float *restrict g = malloc(width * sizeof(float));
  if (!g) return 1;
  for (i64 i = first; i < last; i++) {
    const i64 n = starts[i + 1] - starts[i];
    const float *restrict w = weights + i * width;
    element *restrict c = copy ? copy + i * width : NULL;
    float decay = how->beta2;
    if (!mean) {
      if (!n) continue;
      decay = powf(how->beta2, (float)(how->step - seen[i]));
      seen[i] = (i32)how->step;
    }
    weighed_sum(index + starts[i], weight + starts[i], n, table, width, g);
    if (how->projected) project(w, g, width);
    move(how, g, decay, i * width, width, weights, mean, square);
#if TABLE == 16
    if (c)
      for (i64 j = 0; j < width; j++) {
        union { float value; uint32_t bits; } it = {w[j]};
        /* To nearest, ties to even. NaN stays NaN: its high bits do. */
        const uint32_t up = it.bits + 0x7FFF + ((it.bits >> 16) & 1);
        c[j] = (uint16_t)((it.value == it.value ? up : it.bits | 0x400000) >> 16);
      }
#else
    if (c) memcpy(c, w, width * sizeof(float));
#endif
  }
  free(g);
  return 0;
}

#define MOST ((key)(((uint64_t)1 << (TABLE - 1)) - 1))
#if TABLE == 16
#define INFINITE ((key)0x7F80)
#else
#define INFINITE ((key)0x7F800000)
#endif

/* Integers in the order of the numbers; of their sizes where `absolute`. Both zeros are 0, and a NaN
 * of either sign is above all. */
static void order(const key *restrict row, i64 width, int absolute, key *restrict keys) {
  for (i64 j = 0; j < width; j++) {
    const key size = row[j] & MOST, sign = absolute ? 0 : row[j] >> (TABLE - 1);
    const key it = (key)((size ^ sign) - sign);
    keys[j] = size > INFINITE ? MOST : it;
  }
}

#define BLOCK 64

/* How many are at least `cut`. */
static i64 count_from(const key *keys, i64 width, key cut) {
  i64 n = 0;
  for (i64 j = 0; j < width; j += 8192) { /* few enough for a 16-bit count in each vector lane */
    const i64 end = j + 8192 < width ? j + 8192 : width;
    key some = 0;
    key parts[BLOCK] = {0};
    i64 i = j;
    for (; i + BLOCK <= end; i += BLOCK)
      for (i64 m = 0; m < BLOCK; m++) parts[m] += keys[i + m] >= cut;
    for (; i < end; i++) some += keys[i] >= cut;
    for (i64 m = 0; m < BLOCK; m++) n += parts[m];
    n += some;
  }
  return n;
}

/* The k largest of each row, ascending by place, at out[row · k]; counts[row] of them. Of equal
 * numbers at the cut the first come in. With `positive`, none that is 0 or less.
 * Returns 0, or 1 where there is no memory. */
int NAMED(largest)(const key *rows, i64 width, i64 k, int absolute, int positive, i32 *out,
                   i64 *counts, i64 first, i64 last) {
  key *restrict keys = malloc(width * sizeof(key));
  if (!keys) return 1;
  for (i64 i = first; i < last; i++) {
    order(rows + i * width, width, absolute, keys);
    /* The largest cut that at least k numbers reach. */
    i64 low = positive ? 1 : -(i64)MOST, high = MOST;
    i64 enough = count_from(keys, width, (key)low);
    while (low < high && enough > k) {
      const i64 middle = low + (high - low + 1) / 2;
      const i64 n = count_from(keys, width, (key)middle);
      if (n >= k) low = middle, enough = n;
      else high = middle - 1;
    }
    const key cut = (key)low;
    i64 ties = k; /* how many equal to the cut may come in */
    if (enough > k && cut < MOST) ties = k - count_from(keys, width, (key)(cut + 1));
    i32 *to = out + i * k;
    i64 n = 0;
    for (i64 j = 0; j < width; j += BLOCK) {
      const i64 end = j + BLOCK < width ? j + BLOCK : width;
      int any = 0;
      for (i64 m = j; m < end; m++) any |= keys[m] >= cut;
      if (!any) continue;
      for (i64 m = j; m < end && n < k; m++)
        if (keys[m] > cut || (keys[m] == cut && ties-- > 0)) to[n++] = (i32)m;
    }
    counts[i] = n;
  }
  free(keys);
  return 0;
}

/* How many of each row are above the bar of their column. */
void NAMED(count_above)(const element *rows, i64 width, const float *bar, i64 *counts, i64 first,
                        i64 last) {
  for (i64 i = first; i < last; i++) {
    const element *restrict row = rows + i * width;
    i32 n = 0;
    for (i64 j = 0; j < width; j++) n += !(value(row[j]) <= bar[j]);
    counts[i] = n;
  }
}

/* Their places, ascending, from out[starts[row]] on. */
void NAMED(places_above)(const element *rows, i64 width, const float *bar, const i64 *starts,
                         i32 *out, i64 first, i64 last) {
  for (i64 i = first; i < last; i++) {
    const element *restrict row = rows + i * width;
    i32 *to = out + starts[i];
    for (i64 j = 0; j < width; j += BLOCK) {
      const i64 end = j + BLOCK < width ? j + BLOCK : width;
      int any = 0;
      for (i64 m = j; m < end; m++) any |= !(value(row[m]) <= bar[m]);
      if (!any) continue;
      for (i64 m = j; m < end; m++)
        if (!(value(row[m]) <= bar[m])) *to++ = (i32)m;
    }
  }
}
