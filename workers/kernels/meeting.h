// How ranks of one host meet: rounds over shared memory, and rows that are read where their owner wrote them.
//
// Every rank has a round counter. To publish, it writes and then counts on; to wait, it waits until the counters of all
// have come as far as its own. Waiting spins a little and then sleeps in the kernel (futex), and wakes now and then to see
// whether a peer died, the caller gave up, or time is over.
#pragma once
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct Member {  // one a rank, at the beginning of the memory
  uint32_t round, sleepers;
  int64_t work[2][2];  // what it told in the last two agreements
  int64_t rows;        // rows it dispatched last
  int32_t has_left;
  char rest[128 - 52];
};
static_assert(sizeof(Member) == 128, "two cache lines: neighbours do not share one");

struct Meeting {  // kept in step with shared_exchange.py
  char* memory;
  int64_t size, index, capacity, room;  // ranks; this one; rows a rank may dispatch; bytes there are for a row
  int64_t row_bytes;                    // bytes of this dispatch's rows
  int64_t spin_ns, timeout_ns;
  const int32_t* given_up;  // not 0: the caller wants no more
  const int32_t* peers;     // pidfd of each rank, -1: nobody watches it

  Member& member(int64_t rank) const { return reinterpret_cast<Member*>(memory)[rank]; }
  // A rank's slab: experts and processes of its rows, the rows, and what comes back for them.
  char* slab(int64_t rank) const { return memory + (size * sizeof(Member) + 4095) / 4096 * 4096 + rank * slab_bytes(); }
  int64_t slab_bytes() const { return (capacity * (16 + 2 * room) + 4095) / 4096 * 4096; }
  int64_t* experts(int64_t rank) const { return reinterpret_cast<int64_t*>(slab(rank)); }
  int64_t* processes(int64_t rank) const { return experts(rank) + capacity; }
  char* rows(int64_t rank) const { return slab(rank) + 16 * capacity; }
  char* results(int64_t rank) const { return rows(rank) + capacity * room; }
};

enum Outcome { MET = 0, TIMED_OUT = 1, GIVEN_UP = 2, PEER_LOST = 3, TOO_MANY = 4 };
enum { LOOK_AROUND_NS = 5000000 };

inline int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000ll + time.tv_nsec;
}

inline void publish(const Meeting& meeting) {
  Member& mine = meeting.member(meeting.index);
  __atomic_store_n(&mine.round, mine.round + 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&mine.sleepers, __ATOMIC_SEQ_CST))
    syscall(SYS_futex, &mine.round, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

// Nobody shall wait for this rank any more.
inline void leave(const Meeting& meeting) {
  Member& mine = meeting.member(meeting.index);
  __atomic_store_n(&mine.has_left, 1, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, &mine.round, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

inline bool is_lost(int32_t pidfd) {
  pollfd watch = {pidfd, POLLIN, 0};
  return pidfd >= 0 && poll(&watch, 1, 0) > 0;
}

// Until every rank is in this one's round. Returns an Outcome, and above its lowest 8 bits the rank that it is about.
inline int64_t meet(const Meeting& meeting) {
  const uint32_t round = meeting.member(meeting.index).round;
  int64_t start = 0;
  for (int64_t rank = 0; rank < meeting.size; rank++) {
    Member& peer = meeting.member(rank);
    auto is_there = [&] { return int32_t(__atomic_load_n(&peer.round, __ATOMIC_ACQUIRE) - round) >= 0; };
    for (int tries = 0; !is_there(); tries++) {
      if (!start) start = now_ns();
      if (now_ns() - start < meeting.spin_ns) {
#if defined(__x86_64__)
        for (int i = 0; i < 20; i++) __builtin_ia32_pause();
#endif
        continue;
      }
      uint32_t seen = __atomic_load_n(&peer.round, __ATOMIC_SEQ_CST);
      __atomic_fetch_add(&peer.sleepers, 1, __ATOMIC_SEQ_CST);
      timespec nap = {0, LOOK_AROUND_NS};
      if (int32_t(seen - round) < 0) syscall(SYS_futex, &peer.round, FUTEX_WAIT, seen, &nap, nullptr, 0);
      __atomic_fetch_sub(&peer.sleepers, 1, __ATOMIC_SEQ_CST);
      if (is_there()) break;
      if (__atomic_load_n(meeting.given_up, __ATOMIC_ACQUIRE)) return GIVEN_UP;
      for (int64_t other = 0; other < meeting.size; other++)
        if (meeting.member(other).has_left || is_lost(meeting.peers[other])) return PEER_LOST | other << 8;
      if (now_ns() - start > meeting.timeout_ns) return TIMED_OUT | rank << 8;
    }
  }
  return MET;
}

// Everybody's work: `all` is [size][2].
inline int64_t agree(const Meeting& meeting, int64_t number, const int64_t* mine, int64_t* all) {
  memcpy(meeting.member(meeting.index).work[number % 2], mine, 16);
  publish(meeting);
  int64_t outcome = meet(meeting);
  for (int64_t rank = 0; rank < meeting.size; rank++) memcpy(all + 2 * rank, meeting.member(rank).work[number % 2], 16);
  return outcome;
}

// Lay out this rank's rows for all to read, wait for the others' and take those for this one: of each its expert, its
// owner and its place there. `room`: for how many; `*taken`: how many.
inline int64_t dispatch(const Meeting& meeting, int64_t rows, const char* x, const int64_t* process, const int64_t* expert,
                        char* x_S, int64_t* expert_S, int64_t* owner_S, int64_t* place_S, int64_t room, int64_t* taken) {
  const int64_t me = meeting.index, bytes = meeting.row_bytes;
  memcpy(meeting.experts(me), expert, rows * 8);
  memcpy(meeting.processes(me), process, rows * 8);
  for (int64_t row = 0; row < rows; row++) memcpy(meeting.rows(me) + row * meeting.room, x + row * bytes, bytes);
  meeting.member(me).rows = rows;
  publish(meeting);
  if (int64_t outcome = meet(meeting)) return outcome;
  int64_t count = 0;
  for (int64_t rank = 0; rank < meeting.size; rank++)
    for (int64_t row = 0; row < meeting.member(rank).rows; row++)
      if (meeting.processes(rank)[row] == me) {
        if (count == room) return TOO_MANY | rank << 8;
        memcpy(x_S + count * bytes, meeting.rows(rank) + row * meeting.room, bytes);
        expert_S[count] = meeting.experts(rank)[row];
        owner_S[count] = rank;
        place_S[count++] = row;
      }
  *taken = count;
  return MET;
}

// Write results where their owners look for them, and wait for this rank's own, which come in its own order.
// Nobody writes them again before this rank dispatches again.
inline int64_t combine(const Meeting& meeting, int64_t count, const char* y_S, const int64_t* owner_S, const int64_t* place_S) {
  for (int64_t s = 0; s < count; s++)
    memcpy(meeting.results(owner_S[s]) + place_S[s] * meeting.room, y_S + s * meeting.row_bytes, meeting.row_bytes);
  publish(meeting);
  return meet(meeting);
}
