/* What pairs of members do to neurons, for the CPU. Plain C99: the compiler makes the vectors.
 *
 * A neuron gives value · phi(gate); without a gate the value is 1, and phi acts on what there is.
 * Lists are as in rows.c, and so is the share [first, last) of a call; tables have `width` columns.
 */
#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "phi.h"

/* ---- how much of each value each gate lets through, for all members of a row ---- */

/* What goes into a branch: of latents, and of what is there on each row beside them. */
struct branch {
  const float *table, *always, *error;
};

/* Neurons at a time: what members bring to them stays in the second cache. */
#define TILE 512
#define LANES 16
/* Members whose products are summed together, in registers. */
#define ACROSS 6
#define DOWN 4
#define MULTIPLE 12 /* of both */

/* One row's members at some neurons; both [members, TILE], zero from n to a whole LANES. */
struct tile {
  float *gate, *value, *sum, *whole;
  i64 n;
};

static void bring(const float *restrict from, float weight, i64 n, float *restrict to) {
  for (i64 j = 0; j < n; j++) to[j] = weight * from[j];
  for (i64 j = n; j % LANES; j++) to[j] = 0;
}

static void bring_all(const struct branch *it, const i32 *index, const float *weight, i64 n_latents,
                      i64 row, i64 width, i64 start, i64 n, float *to) {
  for (i64 m = 0; m < n_latents; m++)
    bring(it->table + (i64)index[m] * width + start, weight[m], n, to + m * TILE);
  bring(it->always + row * width + start, 1, n, to + n_latents * TILE);
  bring(it->error + row * width + start, 1, n, to + (n_latents + 1) * TILE);
  for (i64 m = n_latents + 2; m % MULTIPLE; m++) bring(to, 0, n, to + m * TILE);
}

/* sum = what all bring; returns what the sizes of latents alone are in product, weighed. */
static float add_up(struct tile *it, i64 n_latents, const float *restrict w) {
  float *restrict sum = it->sum, *restrict values = it->whole, product = 0;
  float sizes[TILE] = {0};
  memset(sum, 0, it->n * sizeof(float));
  memset(values, 0, it->n * sizeof(float));
  for (i64 m = 0; m < n_latents + 2; m++) {
    float *restrict gate = it->gate + m * TILE, *restrict value = it->value + m * TILE;
    const float counts = m < n_latents;
    for (i64 j = 0; j < it->n; j++) {
      value[j] = fabsf(value[j]);
      sum[j] += gate[j];
      sizes[j] += counts * fabsf(gate[j]);
      values[j] += counts * value[j];
    }
  }
  for (i64 j = 0; j < it->n; j++) product += w[j] * sizes[j] * values[j];
  return product;
}

/* Each gate becomes w |phi(sum) - phi(sum - gate)|. */
static inline void hold(enum kind kind, struct tile *it, i64 members, const float *restrict w) {
  float *restrict sum = it->sum, *restrict whole = it->whole;
  for (i64 j = 0; j < it->n; j++) whole[j] = phi(kind, sum[j]);
  for (i64 m = 0; m < members; m++) {
    float *restrict gate = it->gate + m * TILE;
    for (i64 j = 0; j < it->n; j++) gate[j] = w[j] * fabsf(whole[j] - phi(kind, sum[j] - gate[j]));
  }
}

static void multiply(const float *restrict value, const float *restrict gate, i64 n,
                     float *restrict out, i64 wide) {
  float sums[ACROSS][DOWN][LANES] = {{{0}}};
  for (i64 j = 0; j < n; j += LANES)
    for (int a = 0; a < ACROSS; a++)
      for (int b = 0; b < DOWN; b++)
        for (int v = 0; v < LANES; v++)
          sums[a][b][v] += value[a * TILE + j + v] * gate[b * TILE + j + v];
  for (int a = 0; a < ACROSS; a++)
    for (int b = 0; b < DOWN; b++)
      for (int v = 0; v < LANES; v++) out[a * wide + b] += sums[a][b][v];
}

/* Both ways together; the two that are beside latents come last, whatever the number of these. */
static void put(const float *square, i64 wide, i64 members, i64 most, float *restrict out) {
  memset(out, 0, most * most * sizeof(float));
  for (i64 a = 0; a < members; a++)
    for (i64 b = 0; b < members; b++) {
      const i64 i = a < members - 2 ? a : most - members + a;
      const i64 j = b < members - 2 ? b : most - members + b;
      out[i * most + j] = square[a * wide + b] + square[b * wide + a];
    }
}

/* out[i] [most, most]: sum over neurons of w |value_a| |phi(sum) - phi(sum - gate_b)|, either way
 * together, for all members a and b of row rows[i]. alone[i]: sum of w (sum of latents' |value|)
 * (sum of latents' |gate|). Returns 0, or 1 where there is no memory. */
int gating(const i64 *rows, const i64 *starts, const i32 *index, const float *weight,
           const struct branch *gates, const struct branch *values, i64 width, const float *w,
           i64 kind, i64 most, float *out, float *alone, i64 first, i64 last) {
  const i64 wide = (most + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
  float *room = malloc((2 * wide + 2) * TILE * sizeof(float));
  float *square = malloc(wide * wide * sizeof(float));
  struct tile it = {room, room + wide * TILE, room + 2 * wide * TILE, room + (2 * wide + 1) * TILE, 0};
  for (i64 i = first; room && square && i < last; i++) {
    const i64 row = rows[i], start = starts[row], n_latents = starts[row + 1] - start;
    const i64 members = n_latents + 2;
    memset(square, 0, wide * wide * sizeof(float));
    alone[i] = 0;
    for (i64 at = 0; at < width; at += TILE) {
      it.n = at + TILE < width ? TILE : width - at;
      bring_all(gates, index + start, weight + start, n_latents, row, width, at, it.n, it.gate);
      bring_all(values, index + start, weight + start, n_latents, row, width, at, it.n, it.value);
      alone[i] += add_up(&it, n_latents, w + at);
#define HOLD(KIND) hold(KIND, &it, members, w + at)
      OF_KIND(kind, HOLD)
      for (i64 a = 0; a < members; a += ACROSS)
        for (i64 b = 0; b < members; b += DOWN)
          multiply(it.value + a * TILE, it.gate + b * TILE, it.n, square + a * wide + b, wide);
    }
    put(square, wide, members, most, out + i * most * most);
  }
  const int failed = !room || !square;
  free(room);
  free(square);
  return failed;
}

/* ---- what a row's members share of its interaction, without a gate ---- */

/* Values become their parts above 0, gates w times those below over the larger of both sums. For
 * RELU2 both become sizes, where the sum of all is above 0 only; returns the sum of w ((sum of
 * latents' sizes) squared less that below 0). */
static inline float share_out(enum kind kind, struct tile *it, i64 n_latents,
                              const float *restrict w) {
  float *restrict above = it->sum, *restrict below = it->whole, square = 0;
  memset(above, 0, it->n * sizeof(float));
  memset(below, 0, it->n * sizeof(float));
  for (i64 m = 0; m < n_latents + 2; m++) {
    float *restrict gate = it->gate + m * TILE, *restrict value = it->value + m * TILE;
    if (m == n_latents)
      for (i64 j = 0; j < it->n; j++) square += w[j] * above[j] * (above[j] + 2 * below[j]);
    for (i64 j = 0; j < it->n; j++) {
      const float size = fabsf(value[j]), p = 0.5f * (size + value[j]), q = size - p;
      above[j] += p;
      below[j] += q;
      value[j] = kind == RELU2 ? size : p;
      gate[j] = kind == RELU2 ? size : q;
    }
  }
  for (i64 j = 0; j < it->n; j++) {
    const float more = above[j] > below[j] ? above[j] : below[j];
    const float least = w[j] > 1 ? FLT_MIN * w[j] : FLT_MIN; /* what w can be divided by */
    if (kind == RELU2) above[j] = above[j] > below[j] ? w[j] : 0;
    else above[j] = w[j] / (more > least ? more : least);
  }
  for (i64 m = 0; m < n_latents + 2; m++) {
    float *restrict gate = it->gate + m * TILE;
    for (i64 j = 0; j < it->n; j++) gate[j] *= above[j];
  }
  return square;
}

/* Adds the sum of w times the smaller of two sizes where the signs are opposite. */
static void couple(const float *restrict first, const float *restrict second,
                   const float *restrict w, i64 n, float *restrict out, i64 wide) {
  float sums[DOWN][DOWN][LANES] = {{{0}}};
  for (i64 j = 0; j < n; j += LANES)
    for (int a = 0; a < DOWN; a++)
      for (int b = 0; b < DOWN; b++)
        for (int v = 0; v < LANES; v++) {
          const float x = first[a * TILE + j + v], y = second[b * TILE + j + v];
          const float twice = fabsf(x - y) - fabsf(x + y);
          sums[a][b][v] += w[j + v] * (twice > 0 ? twice : 0);
        }
  for (int a = 0; a < DOWN; a++)
    for (int b = 0; b < DOWN; b++)
      for (int v = 0; v < LANES; v++) out[a * wide + b] += 0.5f * sums[a][b][v];
}

/* shared[i], coupled[i] [most, most]: of all members a and b of row rows[i] the sum over neurons of
 * w (p_a q_b + q_a p_b) / max(P, Q), p and q what they bring above and below 0, and of w min(|y_a|,
 * |y_b|) where the signs are opposite. For RELU2 shared is 2 w |y_a y_b| where the sum is above 0,
 * coupled is left alone, and squares[i] is what `share_out` returns. Returns 0, or 1 where there is
 * no memory. */
int sharing(const i64 *rows, const i64 *starts, const i32 *index, const float *weight,
            const struct branch *values, i64 width, const float *w, i64 kind, i64 most,
            float *shared, float *coupled, float *squares, i64 first, i64 last) {
  const i64 wide = (most + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
  float *room = calloc((2 * wide + 3) * TILE, sizeof(float));
  float *square = malloc(2 * wide * wide * sizeof(float));
  struct tile it = {room, room + wide * TILE, room + 2 * wide * TILE, room + (2 * wide + 1) * TILE, 0};
  float *weights = room + (2 * wide + 2) * TILE; /* to a whole LANES */
  for (i64 i = first; room && square && i < last; i++) {
    const i64 row = rows[i], start = starts[row], n_latents = starts[row + 1] - start;
    const i64 members = n_latents + 2;
    float *couples = square + wide * wide;
    memset(square, 0, 2 * wide * wide * sizeof(float));
    squares[i] = 0;
    for (i64 at = 0; at < width; at += TILE) {
      it.n = at + TILE < width ? TILE : width - at;
      bring(w + at, 1, it.n, weights);
      bring_all(values, index + start, weight + start, n_latents, row, width, at, it.n, it.value);
      for (i64 m = 0; m < members || m % MULTIPLE; m++) bring(weights, 0, it.n, it.gate + m * TILE);
      for (i64 a = 0; a < members && kind != RELU2; a += DOWN)
        for (i64 b = a; b < members; b += DOWN)
          couple(it.value + a * TILE, it.value + b * TILE, weights, it.n,
                 couples + a * wide + b, wide);
#define SHARE_OUT(KIND) squares[i] += share_out(KIND, &it, n_latents, weights)
      if (kind == RELU2) SHARE_OUT(RELU2);
      else SHARE_OUT(RELU);
      for (i64 a = 0; a < members; a += ACROSS)
        for (i64 b = 0; b < members; b += DOWN)
          multiply(it.value + a * TILE, it.gate + b * TILE, it.n, square + a * wide + b, wide);
    }
    put(square, wide, members, most, shared + i * most * most);
    for (i64 a = 0; a < members; a++) memset(couples + a * wide, 0, (a + 1) * sizeof(float));
    if (kind != RELU2) put(couples, wide, members, most, coupled + i * most * most);
  }
  const int failed = !room || !square;
  free(room);
  free(square);
  return failed;
}

/* ---- mixed differences of pairs on rows, in several contexts ---- */

/* What two latents bring to gates and values. */
struct pair {
  float *gate1, *gate2, *value1, *value2;
};

/* What the latent of an entry brings; to no branch, nothing. */
static void bring_one(const struct branch *it, const i32 *index, const float *weight, i64 entry,
                      i64 width, float *restrict to) {
  if (!it) memset(to, 0, width * sizeof(float));
  else {
    const float *restrict from = it->table + (i64)index[entry] * width, a = weight[entry];
    for (i64 j = 0; j < width; j++) to[j] = a * from[j];
  }
}

/* out: sums of w |d| and of w d, d the mixed difference where the row stands at (gate, value) with
 * as much of the two latents in it as in1 and in2 say; then of w |value1 through what the second
 * does to the gate|, and the other way. A point without a value has a value of 1. */
static inline void mixed(enum kind kind, const float *restrict gate, const float *restrict value,
                         float in1, float in2, const struct pair *two, const float *restrict w,
                         i64 width, float *restrict out) {
  const float *restrict g1 = two->gate1, *restrict g2 = two->gate2;
  const float *restrict u1 = two->value1, *restrict u2 = two->value2;
  float size = 0, sum = 0, first = 0, second = 0;
  for (i64 j = 0; j < width; j++) {
    const float c = gate[j] - in1 * g1[j] - in2 * g2[j];
    const float u = value ? value[j] - in1 * u1[j] - in2 * u2[j] : 1;
    const float one = phi(kind, c + g1[j]), other = phi(kind, c + g2[j]), none = phi(kind, c);
    const float by_second = phi(kind, c + g1[j] + g2[j]) - one;
    const float by_first = by_second + (one - other);
    const float a = u1[j] * by_second, b = u2[j] * by_first;
    const float d = a + b + (by_second - other + none) * u;
    size += w[j] * fabsf(d), sum += w[j] * d;
    first += w[j] * fabsf(a), second += w[j] * fabsf(b);
  }
  out[0] = size, out[1] = sum, out[2] = first, out[3] = second;
}

/* out: dominance of the first, of the second, ratio times the sum of w, reach. */
static void compare(const struct pair *two, const float *restrict largest, const float *restrict w,
                    i64 width, float *restrict out) {
  float first = 0, second = 0, ratio = 0, reach = 0;
  for (i64 j = 0; j < width; j++) {
    const float a = fabsf(two->gate1[j]), b = fabsf(two->gate2[j]);
    const float less = a < b ? a : b, more = a < b ? b : a;
    first += a >= largest[j] ? w[j] * b : 0;
    second += b >= largest[j] ? w[j] * a : 0;
    ratio += w[j] * (less / (more > FLT_MIN ? more : FLT_MIN));
    reach += w[j] * less;
  }
  out[0] = first, out[1] = second, out[2] = ratio, out[3] = reach;
}

static void find_largest(const float *table, const i32 *index, const float *weight, i64 start,
                         i64 stop, i64 width, float *restrict to) {
  memset(to, 0, width * sizeof(float));
  for (i64 e = start; e < stop; e++) {
    const float *restrict from = table + (i64)index[e] * width, a = weight[e];
    for (i64 j = 0; j < width; j++) {
      const float size = fabsf(a * from[j]);
      to[j] = size > to[j] ? size : to[j];
    }
  }
}

/* Who is in each context: bytes [contexts, entries] and, for the error, [contexts, places]. */
struct inside {
  const uint8_t *entry, *error;
  i64 contexts, entries, places;
};

/* Where a row stands in each context [contexts, width]: what is always on, and who is in. */
static void stand(const struct branch *it, const struct inside *in, const i32 *index,
                  const float *weight, i64 start, i64 stop, i64 place, i64 width, float *to) {
  for (i64 c = 0; c < in->contexts; c++) {
    const float *restrict always = it->always + place * width;
    const float *restrict error = it->error + place * width;
    const float with = in->error[c * in->places + place];
    float *restrict point = to + c * width;
    for (i64 j = 0; j < width; j++) point[j] = always[j] + with * error[j];
  }
  for (i64 e = start; e < stop; e++)
    for (i64 c = 0; c < in->contexts; c++) {
      const float *restrict from = it->table + (i64)index[e] * width, a = weight[e];
      float *restrict point = to + c * width;
      if (in->entry[c * in->entries + e])
        for (i64 j = 0; j < width; j++) point[j] += a * from[j];
    }
}

/* Meetings of two entries on a row, those of one row one after another: out[q] holds `mixed` of each
 * context, then `compare`. row[q] is the row's number among the lists', place[q] among those that the
 * branches tell what is beside latents on. Without a gate `values` is NULL. Returns 0, or 1 where
 * there is no memory. */
int in_context(const i64 *row, const i64 *place, const i64 *entry1, const i64 *entry2,
               const i64 *starts, const i32 *index, const float *weight, const struct branch *gates,
               const struct branch *values, const struct inside *in, i64 width, const float *w,
               i64 kind, float *out, i64 first, i64 last) {
  const i64 contexts = in->contexts;
  float *room = malloc((5 + 2 * contexts) * width * sizeof(float));
  if (!room) return 1;
  const struct pair two = {room, room + width, room + 2 * width, room + 3 * width};
  float *largest = room + 4 * width, *gate = room + 5 * width, *value = gate + contexts * width;
  for (i64 q = first; q < last; q++) {
    const i64 start = starts[row[q]], stop = starts[row[q] + 1];
    bring_one(gates, index, weight, entry1[q], width, two.gate1);
    bring_one(gates, index, weight, entry2[q], width, two.gate2);
    bring_one(values, index, weight, entry1[q], width, two.value1);
    bring_one(values, index, weight, entry2[q], width, two.value2);
    if (q == first || row[q] != row[q - 1]) {
      find_largest(gates->table, index, weight, start, stop, width, largest);
      stand(gates, in, index, weight, start, stop, place[q], width, gate);
      if (values) stand(values, in, index, weight, start, stop, place[q], width, value);
    }
    float *to = out + q * (contexts + 1) * 4;
    for (i64 c = 0; c < contexts; c++) {
      const uint8_t *entry = in->entry + c * in->entries;
      const float in1 = entry[entry1[q]], in2 = entry[entry2[q]];
      const float *at = values ? value + c * width : NULL;
#define MIXED(KIND) mixed(KIND, gate + c * width, at, in1, in2, &two, w, width, to + 4 * c)
      OF_KIND(kind, MIXED)
    }
    compare(&two, largest, w, width, to + 4 * contexts);
  }
  free(room);
  return 0;
}
