/* A job in pieces, done by the threads that torch computes with, or by this one alone. */
#ifndef HEADSTART_TEAM_H
#define HEADSTART_TEAM_H

#include <stdint.h>

typedef void (*parallel_region)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

typedef struct {
  parallel_region region; /* GOMP_parallel of torch's own OpenMP, or none */
  int64_t threads;
} team;

typedef struct {
  void (*piece)(const void *job, int64_t number);
  const void *job;
  int64_t pieces, taken;
} shares;

static void take_pieces(void *data) {
  shares *all = data;
  for (;;) {
    int64_t number = __atomic_fetch_add(&all->taken, 1, __ATOMIC_RELAXED);
    if (number >= all->pieces) return;
    all->piece(all->job, number);
  }
}

static void do_pieces(team who, void (*piece)(const void *, int64_t), const void *job, int64_t pieces) {
  shares all = {piece, job, pieces, 0};
  int64_t threads = who.threads < pieces ? who.threads : pieces;
  if (who.region && threads > 1)
    who.region(take_pieces, &all, (unsigned)threads, 0);
  else
    take_pieces(&all);
}

#endif
