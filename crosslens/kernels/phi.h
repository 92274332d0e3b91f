/* Nonlinearities of neurons, for what the compiler is to make vectors of. */
#ifndef CROSSLENS_PHI_H
#define CROSSLENS_PHI_H
#include <math.h>
#include <stdint.h>

/* So that arguments which choose among code are constants where it runs, however much code that is. */
#define INLINE static inline __attribute__((always_inline))

typedef int64_t i64;
typedef int32_t i32;

enum kind { RELU, RELU2, SILU, GELU, GELU_TANH };

/* e^x for x <= 0, to 1e-7 of itself down to e^-87. */
static inline float power(float x) {
  x = x > -87.0f ? x : -87.0f;
  const float whole = rintf(x * 1.44269504f); /* of powers of two; ln 2 in two parts */
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float it = 1.9875691500e-4f;
  it = it * rest + 1.3981999507e-3f;
  it = it * rest + 8.3334519073e-3f;
  it = it * rest + 4.1665795894e-2f;
  it = it * rest + 1.6666665459e-1f;
  it = it * rest + 5.0000001201e-1f;
  it = it * rest * rest + rest + 1.0f;
  union { i32 bits; float value; } two = {((i32)whole + 127) << 23};
  return it * two.value;
}

static inline float sigmoid(float x) {
  const float small = power(-fabsf(x));
  return (x > 0 ? 1.0f : small) / (1.0f + small);
}

/* The normal distribution below x, to 1e-7 (Abramowitz and Stegun 7.1.26). */
static inline float normal(float x) {
  const float t = 1.0f / (1.0f + 0.23164189f * fabsf(x));
  float it = 1.061405429f;
  it = it * t - 1.453152027f;
  it = it * t + 1.421413741f;
  it = it * t - 0.284496736f;
  it = it * t + 0.254829592f;
  const float beyond = 0.5f * it * t * power(-0.5f * x * x);
  return x > 0 ? 1.0f - beyond : beyond;
}

static inline float phi(enum kind kind, float x) {
  const float open = 0.5f * (x + fabsf(x)); /* exactly; a choice would become a branch */
  switch (kind) {
    case RELU: return open;
    case RELU2: return open * open;
    case SILU: return x * sigmoid(x);
    case GELU: return x * normal(x);
    default: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
  }
}

/* One call for each kind, so that loops within have no choice to make. */
#define OF_KIND(kind, CALL) \
  switch (kind) { \
    case RELU: CALL(RELU); break; \
    case RELU2: CALL(RELU2); break; \
    case SILU: CALL(SILU); break; \
    case GELU: CALL(GELU); break; \
    default: CALL(GELU_TANH); \
  }

/* phi(x) for |x| <= NEAR, in fewer steps: phi(x) - x/2 is even, and is interpolated over its square at
 * six of Chebyshev's places, to 1e-9 of itself before rounding. */
#define NEAR 1.0f
static inline float phi_near(enum kind kind, float x) {
  static const float terms[][6] = {
    [SILU] = {0.2499999999f, -0.02083332758f, 0.002083265665f, -2.105204085e-4f, 2.077521684e-5f,
              -1.614261253e-6f},
    [GELU] = {0.3989422801f, -0.06649036057f, 0.009973328481f, -0.001186343989f, 1.135022962e-4f,
              -7.660538161e-6f},
    [GELU_TANH] = {0.3989422804f, -0.06681947415f, 0.01020152442f, -0.00124291392f,
                   1.176563416e-4f, -7.082527568e-6f},
  };
  if (kind == RELU || kind == RELU2) return phi(kind, x);
  const float *c = terms[kind], t = x * x;
  return 0.5f * x + t * (c[0] + t * (c[1] + t * (c[2] + t * (c[3] + t * (c[4] + t * c[5])))));
}

#endif
