/* A job in pieces, done by the threads that torch computes with, or by this one alone. */
#ifndef HEADSTART_TEAM_H
#define HEADSTART_TEAM_H

#include <stdint.h>

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct {
  void (*region)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
  int (*number)(void);
  int (*size)(void);
} openmp; /* GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the library that torch has */

typedef struct {
  const openmp *runtime; /* or none */
  int64_t threads;
} team;

typedef struct {
  const openmp *runtime;
  void (*piece)(const void *job, int64_t number);
  const void *job;
  int64_t pieces;
} shares;

/* Each thread the same neighbouring pieces in every row: what it wrote is in its own cache. */
static void do_own_share(void *data) {
  const shares *all = data;
  const int64_t own = all->runtime->number(), size = all->runtime->size();
  const int64_t end = all->pieces * (own + 1) / size;
  for (int64_t number = all->pieces * own / size; number < end; number++) all->piece(all->job, number);
}

static void do_pieces(team who, void (*piece)(const void *, int64_t), const void *job, int64_t pieces) {
  const int64_t threads = least(who.threads, pieces);
  if (who.runtime && threads > 1) {
    shares all = {who.runtime, piece, job, pieces};
    who.runtime->region(do_own_share, &all, (unsigned)threads, 0);
    return;
  }
  for (int64_t number = 0; number < pieces; number++) piece(job, number);
}

/* Images of `count` elements are cut into pieces, which are worked on in chunks. */
enum { CHUNK = 1024 /* which the first cache holds */, PIECE = 16 * CHUNK };

typedef struct {
  int64_t image, begin, end;
} piece;

static int64_t pieces_of(int64_t count) { return (count + PIECE - 1) / PIECE; }

static piece piece_of(int64_t number, int64_t count) {
  const int64_t each = pieces_of(count), begin = number % each * PIECE;
  return (piece){number / each, begin, least(begin + PIECE, count)};
}

static int64_t chunk_of(int64_t start, int64_t end) { return least(end - start, CHUNK); }

#endif
