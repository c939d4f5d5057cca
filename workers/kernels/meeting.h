// How ranks of one host meet: rounds over shared memory, where rows are read where their owner wrote them.
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

struct Meeting {
  char* memory;
  int64_t size, index, capacity, room;  // ranks that meet here; this one; rows a rank may dispatch; bytes there are for a row
  int64_t spin_ns, timeout_ns;
  int32_t abort_event;   // readable: the caller wants no more
  const int32_t* peers;  // a socket to each rank, over which nothing comes but its end; -1: nobody watches it

  Member& member(int64_t rank) const { return reinterpret_cast<Member*>(memory)[rank]; }
  // A rank's slab: experts and processes of its rows, the rows, and what comes back for them.
  char* slab(int64_t rank) const { return memory + (size * sizeof(Member) + 4095) / 4096 * 4096 + rank * slab_bytes(); }
  int64_t slab_bytes() const { return (capacity * (16 + 2 * room) + 4095) / 4096 * 4096; }
  int64_t* experts(int64_t rank) const { return reinterpret_cast<int64_t*>(slab(rank)); }
  int64_t* processes(int64_t rank) const { return experts(rank) + capacity; }
  char* rows(int64_t rank) const { return slab(rank) + 16 * capacity; }
  char* results(int64_t rank) const { return rows(rank) + capacity * room; }
  // Whether a rank has come as far as this one. It may leave then: nobody waits for it any more.
  bool is_there(int64_t rank) const {
    return int32_t(__atomic_load_n(&member(rank).round, __ATOMIC_ACQUIRE) - member(index).round) >= 0;
  }
};

constexpr int64_t MET = 0, TIMED_OUT = 1, GIVEN_UP = 2, PEER_LOST = 3, TOO_MANY = 4, STRANGE = 5, NOBODY = 6;
constexpr int64_t LOOK_AROUND_NS = 5000000;

inline int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000ll + time.tv_nsec;
}

inline void wake(uint32_t* round) { syscall(SYS_futex, round, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }

inline void publish(const Meeting& meeting) {
  Member& mine = meeting.member(meeting.index);
  __atomic_store_n(&mine.round, mine.round + 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&mine.sleepers, __ATOMIC_SEQ_CST)) wake(&mine.round);
}

// Nobody shall wait for this rank any more, nor it for anybody. From any thread.
inline void leave(const Meeting& meeting) {
  __atomic_store_n(&meeting.member(meeting.index).has_left, 1, __ATOMIC_SEQ_CST);
  for (int64_t rank = 0; rank < meeting.size; rank++) wake(&meeting.member(rank).round);
}

inline bool is_readable(int32_t descriptor) {
  pollfd watch = {descriptor, POLLIN, 0};
  return descriptor >= 0 && poll(&watch, 1, 0) > 0;
}

// Until every rank is in this one's round. Returns one of these outcomes, and above its lowest 8 bits the rank that it is about.
inline int64_t meet(const Meeting& meeting, int64_t start) {
  const uint32_t round = meeting.member(meeting.index).round;
  for (int64_t rank = 0; rank < meeting.size; rank++) {
    Member& peer = meeting.member(rank);
    while (!meeting.is_there(rank)) {
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
      if (meeting.is_there(rank)) break;
      if (is_readable(meeting.abort_event)) return GIVEN_UP;
      for (int64_t other = 0; other < meeting.size; other++)
        // Looked at again last: it may have come and then left.
        if ((meeting.member(other).has_left || is_readable(meeting.peers[other])) && !meeting.is_there(other))
          return PEER_LOST | other << 8;
      if (now_ns() - start > meeting.timeout_ns) return TIMED_OUT | rank << 8;
    }
  }
  return MET;
}
