/* y = a*gelu(b), [a, b] = x: rows of 2*width numbers into rows of width. */
#ifndef HEADSTART_GATE_H
#define HEADSTART_GATE_H

#include "exponential.h"
#include "numbers.h"
#include "team.h"

typedef struct {
  team who;
  const void *x;
  void *y;
  int64_t rows, width;
  int32_t type;
} gate;

static void gate_piece(const void *job, int64_t row) {
  const gate *a = job;
  float room[CHUNK], other[CHUNK], made[CHUNK];
  for (int64_t i = 0; i < a->width; i += CHUNK) {
    const int64_t some = chunk_of(i, a->width), at = 2 * row * a->width + i;
    const float *x = as_floats(a->x, a->type, at, some, room);
    const float *b = as_floats(a->x, a->type, at + a->width, some, other);
    float *y = a->type == FLOAT32 ? (float *)a->y + row * a->width + i : made;
    const int64_t left = some % LANES, whole = some - left;
    for (int64_t j = 0; j < whole; j += LANES) store(y + j, load(x + j, LANES) * gelu(load(b + j, LANES)), LANES);
    if (left) store(y + whole, load(x + whole, left) * gelu(load(b + whole, left)), left);
    if (y == made) store_scaled(a->y, a->type, row * a->width + i, made, 1.0f, some);
  }
}

#endif
