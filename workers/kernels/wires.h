// How ranks of several hosts talk: one TCP connection a pair, one message a direction in every round.
//
// All ranks make the same calls, so in each round everybody sends one message to everybody and receives one. Sending and
// receiving go on at the same time, whatever is ready first: no circle of full socket buffers can hold ranks up. A peer
// may be one round ahead, so what follows its message in the inbox is kept for the next round.
#pragma once
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "meeting.h"

struct Header {  // of every message, as the sender's memory has it: ranks of one gang have one byte order
  uint32_t magic, kind;
  uint64_t epoch, round;
  int64_t rows, row_bytes;  // that follow; a dispatch's experts stand before them, 8 bytes each
  int64_t work[2];          // an agreement's
  int64_t spare;
};
static_assert(sizeof(Header) == 64, "rows begin on a cache line");
enum Kind : uint32_t { AGREE = 1, DISPATCH = 2, COMBINE = 3 };
constexpr uint32_t MAGIC = 0x52415643;
constexpr int64_t INBOX_BYTES = 1 << 14, LONGEST_NAP_MS = 1000;

inline int64_t body_bytes(const Header& header) {
  return header.rows * (header.row_bytes + (header.kind == DISPATCH ? 8 : 0));
}

struct Wire {
  int32_t socket;                  // -1: this rank itself
  int32_t place;                   // its number among the ranks of this host that share memory; -1: it talks over the wire
  int32_t is_same_host;            // which matters to the sums of traffic alone
  Header header;                   // what is sent in this round, and how much of it is
  const char* body;
  int64_t sent;
  char* inbox;                     // what came, and how much of that is the message of this round
  int64_t room, have, message;
  int64_t most_rows;               // that its next message may bring
  int64_t agreed_rows;             // that each of its dispatches may bring in this step

  bool is_far() const { return socket >= 0 && place < 0; }
  bool is_sent() const { return sent == int64_t(sizeof(Header)) + body_bytes(header); }
  bool is_here() const { return message > 0 && have >= message; }
  const Header& arrived() const { return *reinterpret_cast<const Header*>(inbox); }
  const char* arrived_body() const { return inbox + sizeof(Header); }
};

// An outcome about a rank, with the kernel's error number where there is one.
inline int64_t about(int64_t outcome, int64_t rank, int64_t error = 0) { return outcome | rank << 8 | error << 32; }

struct Wires {
  int64_t size, index;
  uint64_t epoch, round;
  Wire* wires;
  pollfd* watched;
  int32_t* whose;

  // Make room in an inbox; what it holds stays.
  static void grow(Wire& wire, int64_t bytes) {
    if (bytes <= wire.room) return;
    wire.room = bytes + INBOX_BYTES;  // for the peer's next message
    wire.inbox = static_cast<char*>(realloc(wire.inbox, wire.room));
  }

  // Whether what has come of a message belongs to this round, and how long it is.
  int64_t inspect(int64_t rank) {
    Wire& wire = wires[rank];
    if (wire.message || wire.have < int64_t(sizeof(Header))) return MET;
    const Header& theirs = wire.arrived();
    if (theirs.magic != MAGIC || theirs.epoch != epoch || theirs.round != round || theirs.kind != wire.header.kind)
      return about(STRANGE, rank);
    if (theirs.rows < 0 || theirs.rows > wire.most_rows) return about(TOO_MANY, rank);
    if (theirs.row_bytes != wire.header.row_bytes) return about(STRANGE, rank);
    wire.message = sizeof(Header) + body_bytes(theirs);
    grow(wire, wire.message);
    return MET;
  }

  int64_t push(int64_t rank) {
    Wire& wire = wires[rank];
    while (!wire.is_sent()) {
      int64_t in_body = wire.sent - int64_t(sizeof(Header));
      iovec parts[2];
      int count = 0;
      if (in_body < 0) parts[count++] = {reinterpret_cast<char*>(&wire.header) + wire.sent, size_t(-in_body)};
      int64_t done = in_body < 0 ? 0 : in_body;
      if (int64_t rest = body_bytes(wire.header) - done)
        parts[count++] = {const_cast<char*>(wire.body) + done, size_t(rest)};
      msghdr message = {};
      message.msg_iov = parts;
      message.msg_iovlen = count;
      ssize_t bytes = sendmsg(wire.socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (bytes >= 0)
        wire.sent += bytes;
      else if (errno == EAGAIN || errno == EWOULDBLOCK)
        return MET;
      else if (errno != EINTR)
        return about(PEER_LOST, rank, errno);
    }
    return MET;
  }

  int64_t pull(int64_t rank) {
    Wire& wire = wires[rank];
    while (!wire.is_here()) {
      int64_t asked = wire.room - wire.have;
      ssize_t bytes = recv(wire.socket, wire.inbox + wire.have, asked, MSG_DONTWAIT);
      if (bytes > 0) {
        wire.have += bytes;
        if (int64_t outcome = inspect(rank)) return outcome;
        if (bytes < asked) return MET;  // that was all there is by now
      } else if (bytes == 0) {
        return about(PEER_LOST, rank);
      } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
        return MET;
      } else if (errno != EINTR) {
        return about(PEER_LOST, rank, errno);
      }
    }
    return MET;
  }

  // What was used in the last round goes; what came behind it may be this round's message already.
  int64_t open(uint32_t kind, int64_t row_bytes) {
    round++;
    for (int64_t rank = 0; rank < size; rank++) {
      Wire& wire = wires[rank];
      if (!wire.is_far()) continue;
      wire.have -= wire.message;
      if (wire.have) memmove(wire.inbox, wire.inbox + wire.message, wire.have);
      wire.message = wire.sent = 0;
      Header header = {MAGIC, kind, epoch, round, wire.header.rows, row_bytes, {wire.header.work[0], wire.header.work[1]}, 0};
      wire.header = header;
      if (int64_t outcome = inspect(rank)) return outcome;
    }
    return MET;
  }

  // Until every peer has this rank's message of the round and this rank theirs. Ranks of `host` are only watched: they
  // must not die meanwhile.
  int64_t talk(const Meeting& host, int64_t start) {
    for (int64_t rank = 0; rank < size; rank++)
      if (wires[rank].is_far())
        if (int64_t outcome = push(rank)) return outcome;
    for (;;) {
      nfds_t count = 0;
      int64_t waits_for = -1;
      whose[count] = -1;
      watched[count++] = {host.abort_event, POLLIN, 0};
      for (int64_t rank = 0; rank < size; rank++) {
        const Wire& wire = wires[rank];
        if (wire.socket < 0) continue;
        bool is_far = wire.place < 0;
        short events = is_far ? (wire.is_here() ? 0 : POLLIN) | (wire.is_sent() ? 0 : POLLOUT)
                              : (host.is_there(wire.place) ? 0 : POLLIN);
        if (!events) continue;
        if (is_far) waits_for = rank;
        whose[count] = rank;
        watched[count++] = {wire.socket, events, 0};
      }
      if (waits_for < 0) return MET;
      int64_t passed = now_ns() - start;
      int64_t left_ms = (host.timeout_ns - passed + 999999) / 1000000;
      int nap = passed < host.spin_ns ? 0 : int(left_ms < LONGEST_NAP_MS ? (left_ms > 0 ? left_ms : 0) : LONGEST_NAP_MS);
      int ready = poll(watched, count, nap);
      if (ready > 0 && watched[0].revents) return GIVEN_UP;
      if (ready < 0 && errno != EINTR) return about(PEER_LOST, waits_for, errno);
      if (ready <= 0) {
        if (now_ns() - start > host.timeout_ns) return about(TIMED_OUT, waits_for);
        continue;
      }
      for (nfds_t i = 1; i < count; i++) {
        const short events = watched[i].revents;
        const int64_t rank = whose[i];
        if (!events) continue;
        if (wires[rank].place >= 0) {
          if (!host.is_there(wires[rank].place)) return about(PEER_LOST, rank);
          continue;
        }
        if (events & (POLLOUT | POLLERR | POLLHUP))
          if (int64_t outcome = push(rank)) return outcome;
        if (events & (POLLIN | POLLERR | POLLHUP))
          if (int64_t outcome = pull(rank)) return outcome;
      }
    }
  }
};
