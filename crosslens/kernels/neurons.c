/* How far neurons are from treating what goes into them one by one, for the CPU. The compiler
 * makes the vectors.
 *
 * A neuron gives value * phi(gate); without a gate, phi(value). Lists are as in rows.c; tables have
 * `width` columns. A call's share [first, last) is of groups of so many rows, whose sums are told
 * together.
 */
#include <string.h>

#include "phi.h"

/* Neurons at a time: what goes into them stays in the first cache, and their columns of the tables
 * in the second while a group's rows go by. */
#define BLOCK 128

/* What goes into a branch: per unit of a latent's strength; of the biases, with and without the
 * norm's scalar; on each row, of the coder's error. */
struct branch {
  const float *table, *moving, *fixed, *error;
};

/* reach: of each latent, the largest of what phi acts on. through: what parts of a row do to it by
 * way of the norm's scalar. */
struct rows {
  const i64 *starts;
  const i32 *index;
  const float *weight, *reach, *scalar, *through, *w;
  const struct branch *value, *gate;
  i64 n, width, group;
};

/* What a row's latents bring to some neurons: sums with and without signs, and of what each gives
 * alone. */
struct latents {
  float value[BLOCK], value_size[BLOCK], gate[BLOCK], gate_size[BLOCK], apart[BLOCK];
};

enum sum { INTERACTION, MASS, OUTPUT, OF_ERROR, WITHOUT_ERROR, MEDIATED, DIRECT, SUMS };

INLINE void bring(enum kind kind, int gated, int near, float a, const float *restrict value,
                  const float *restrict gate, i64 n, struct latents *restrict it) {
  for (i64 j = 0; j < n; j++) {
    const float u = a * value[j], g = gated ? a * gate[j] : u;
    const float alone = near ? phi_near(kind, g) : phi(kind, g);
    it->value[j] += u;
    it->value_size[j] += fabsf(u);
    if (gated) {
      it->gate[j] += g;
      it->gate_size[j] += fabsf(g);
    }
    it->apart[j] += gated ? u * alone : alone;
  }
}

INLINE void bring_all(enum kind kind, int gated, const struct rows *by, i64 row, i64 at,
                      i64 n, struct latents *restrict it) {
  memset(it, 0, sizeof *it);
  for (i64 e = by->starts[row]; e < by->starts[row + 1]; e++) {
    const float a = by->weight[e];
    const i64 from = (i64)by->index[e] * by->width + at;
    const float *value = by->value->table + from, *gate = gated ? by->gate->table + from : value;
    if (fabsf(a) * by->reach[by->index[e]] <= NEAR) bring(kind, gated, 1, a, value, gate, n, it);
    else bring(kind, gated, 0, a, value, gate, n, it);
  }
}

/* The interaction: phi(each) summed less phi(sum); where gated the other way round. Without a gate
 * relu's is min(P, Q), which loses nothing to rounding. */
INLINE float between(enum kind kind, int gated, float whole, float apart, float total,
                     float size) {
  if (kind == RELU && !gated) return 0.5f * (size - fabsf(total));
  return gated ? whole - apart : apart - whole;
}

/* The most that contributions of these sizes could make. */
INLINE float most(enum kind kind, int gated, float value, float gate) {
  return (kind == RELU2 ? gate * gate : gate) * (gated ? value : 1);
}

/* One row at some neurons, with biases and then with the error too: adds to the neurons' sums, and to
 * the row's, weighed. Names end in u for the value, in g for what phi acts on. */
INLINE void tell(enum kind kind, int gated, const struct rows *by, i64 row, i64 at, i64 n,
                 const struct latents *restrict it, float (*restrict sums)[BLOCK],
                 float *restrict made, float *restrict mass) {
  const struct branch *value = by->value, *gate = gated ? by->gate : by->value;
  const float *restrict fixed_u = value->fixed + at, *restrict fixed_g = gate->fixed + at;
  const float *restrict moving_u = value->moving + at, *restrict moving_g = gate->moving + at;
  const float *restrict error_u = value->error + row * by->width + at;
  const float *restrict error_g = gate->error + row * by->width + at;
  const float *restrict w = by->w + at;
  const float scalar = by->scalar[row], through = by->through[row];
  float all_made = 0, all_mass = 0;
  for (i64 j = 0; j < n; j++) {
    const float norm_u = scalar * moving_u[j], norm_g = scalar * moving_g[j];
    const float always_u = norm_u + fixed_u[j], always_g = norm_g + fixed_g[j];
    float u = it->value[j] + always_u, u_size = it->value_size[j] + fabsf(always_u);
    float g = gated ? it->gate[j] + always_g : u;
    float g_size = gated ? it->gate_size[j] + fabsf(always_g) : u_size;
    float apart = it->apart[j] + (gated ? always_u : 1) * phi(kind, always_g);
    float whole = (gated ? u : 1) * phi(kind, g);
    const float known = between(kind, gated, whole, apart, u, u_size);

    u += error_u[j], u_size += fabsf(error_u[j]);
    g = gated ? g + error_g[j] : u, g_size = gated ? g_size + fabsf(error_g[j]) : u_size;
    apart += (gated ? error_u[j] : 1) * phi(kind, error_g[j]);
    whole = (gated ? u : 1) * phi(kind, g);
    const float full = between(kind, gated, whole, apart, u, u_size);
    const float could = most(kind, gated, u_size, g_size);

    float mediated = fabsf(u - fixed_u[j]), direct = u_size - fabsf(always_u) + fabsf(norm_u);
    if (gated) {
      mediated += fabsf(g - fixed_g[j]);
      direct += g_size - fabsf(always_g) + fabsf(norm_g);
    }
    sums[INTERACTION][j] += fabsf(full);
    sums[MASS][j] += could;
    sums[OUTPUT][j] += fabsf(whole) + fabsf(apart);
    sums[OF_ERROR][j] += fabsf(full - known);
    sums[WITHOUT_ERROR][j] += fabsf(known);
    sums[MEDIATED][j] += through * mediated;
    sums[DIRECT][j] += direct;
    all_made += w[j] * fabsf(full);
    all_mass += w[j] * could;
  }
  *made += all_made;
  *mass += all_mass;
}

INLINE void tell_group(enum kind kind, int gated, const struct rows *by, i64 group,
                       float *restrict sums, float *restrict made, float *restrict mass) {
  const i64 start = group * by->group, end = start + by->group, stop = end < by->n ? end : by->n;
  struct latents it;
  float block[SUMS][BLOCK];
  for (i64 at = 0; at < by->width; at += BLOCK) {
    const i64 n = at + BLOCK <= by->width ? BLOCK : by->width - at;
    memset(block, 0, sizeof block);
    for (i64 row = start; row < stop; row++) {
      if (n == BLOCK) { /* loops of a length that the compiler knows */
        bring_all(kind, gated, by, row, at, BLOCK, &it);
        tell(kind, gated, by, row, at, BLOCK, &it, block, made + row, mass + row);
      } else {
        bring_all(kind, gated, by, row, at, n, &it);
        tell(kind, gated, by, row, at, n, &it, block, made + row, mass + row);
      }
    }
    for (i64 i = 0; i < SUMS; i++)
      memcpy(sums + i * by->width + at, block[i], n * sizeof(float));
  }
}

/* sums [groups, SUMS, width]; made and mass [rows], zero before. Without a gate `gate` is NULL. */
void neurons(const i64 *starts, const i32 *index, const float *weight, const float *reach,
             const float *scalar, const float *through, const float *w, const struct branch *value,
             const struct branch *gate, i64 n, i64 width, i64 in_group, i64 kind, float *sums,
             float *made, float *mass, i64 first, i64 last) {
  const struct rows by = {starts, index, weight, reach, scalar, through, w,
                          value, gate, n, width, in_group};
  for (i64 group = first; group < last; group++) {
    float *to = sums + group * SUMS * width;
#define TELL_GROUP(KIND) \
  if (gate) tell_group(KIND, 1, &by, group, to, made, mass); \
  else tell_group(KIND, 0, &by, group, to, made, mass)
    OF_KIND(kind, TELL_GROUP)
  }
}
