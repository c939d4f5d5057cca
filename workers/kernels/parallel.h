// Threads of one call: OpenMP's pool, which torch uses too, so that a process never has two.
#pragma once
#include <omp.h>
#include <stdint.h>

struct Team {
  int thread, threads;
  void wait() const {
    if (threads > 1) {
#pragma omp barrier
    }
  }
};

template <class Body>
inline void parallel(int threads, Body body) {
  if (threads <= 1) {
    body(Team{0, 1});
    return;
  }
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// Items that threads take in turn, `grain` at a time: for work of uneven size.
struct Queue {
  int64_t next;
  int64_t take(int64_t grain) { return __atomic_fetch_add(&next, grain, __ATOMIC_RELAXED); }
};

// Of `n` items in whole blocks, those of one thread.
struct Share {
  int64_t first, last;
  Share(int64_t n, int64_t block, Team team) {
    int64_t blocks = (n + block - 1) / block;
    first = blocks * team.thread / team.threads * block;
    last = blocks * (team.thread + 1) / team.threads * block;
    if (first > n) first = n;
    if (last > n) last = n;
  }
};

// Memory of one call, handed out piece by piece. With no memory it only counts.
struct Scratch {
  char* memory;
  int64_t used;
  explicit Scratch(void* at) : memory(static_cast<char*>(at)), used(0) {}
  template <class T>
  T* take(int64_t count) {
    int64_t at = used;
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return memory ? reinterpret_cast<T*>(memory + at) : nullptr;
  }
};
