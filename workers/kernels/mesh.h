// The exchange of one epoch: rows to ranks of this host through shared memory (meeting.h), to others over wires
// (wires.h), and results back the same ways. Rows arrive in one order, by the process that owns them and its own order,
// however they came.
//
// One thread makes the calls. Another one ends a call that waits by making the abort event readable; `mesh_leave` then
// hurries those that sleep.
#pragma once
#include "wires.h"

struct Traffic {  // totals, kept in step with mesh_exchange.py
  int64_t rows_sent, sent_within, sent_between, received_within, received_between;
};

struct Mesh {
  Meeting host;
  Wires net;
  Traffic traffic;
  int64_t agreements;
  char* outbox;  // experts and rows, packed for each peer on another host
  int64_t outbox_room;
  int64_t* counts;  // one a process: rows for it, or from it
  char** packed;    // one a process: where its next row stands, or goes
  int32_t* global;  // process of each rank of this host
  int32_t* sockets; // to each rank of this host
};

struct MeshPlan {  // what a mesh is made of, kept in step with mesh_exchange.py
  int64_t size, index, epoch;
  const int32_t* sockets;  // to each process; -1 at `index`
  const int32_t* places;   // of each process in the memory that this one shares; -1: it does not share it
  const int32_t* is_same_host;  // as this process
  char* memory;
  int64_t capacity, row_bytes, spin_ns, timeout_ns, abort_event;
};

// The outcome of a meeting says the place in this host's memory; of that, the process.
inline int64_t of_host(const Mesh& mesh, int64_t outcome) {
  return outcome ? about(outcome & 255, mesh.global[outcome >> 8]) : MET;
}

// Meet on this host, and exchange messages with all others.
inline int64_t round_trip(Mesh& mesh, int64_t start) {
  publish(mesh.host);
  if (int64_t outcome = mesh.net.talk(mesh.host, start)) return outcome;
  for (int64_t rank = 0; rank < mesh.net.size; rank++) {
    const Wire& wire = mesh.net.wires[rank];
    if (!wire.is_far()) continue;
    const int64_t sent = sizeof(Header) + body_bytes(wire.header);
    (wire.is_same_host ? mesh.traffic.sent_within : mesh.traffic.sent_between) += sent;
    (wire.is_same_host ? mesh.traffic.received_within : mesh.traffic.received_between) += wire.message;
  }
  return of_host(mesh, meet(mesh.host, start));
}

// Everybody's work: `all` is [size][2]. `rows_per_token` bounds what the step's dispatches may bring.
inline int64_t agree(Mesh& mesh, int64_t rows_per_token, const int64_t* mine, int64_t* all) {
  const int64_t start = now_ns(), slot = mesh.agreements++ % 2;
  memcpy(mesh.host.member(mesh.host.index).work[slot], mine, 16);
  for (int64_t rank = 0; rank < mesh.net.size; rank++) {
    Wire& wire = mesh.net.wires[rank];
    wire.header.rows = wire.most_rows = 0;
    memcpy(wire.header.work, mine, 16);
  }
  if (int64_t outcome = mesh.net.open(AGREE, 0)) return outcome;
  if (int64_t outcome = round_trip(mesh, start)) return outcome;
  for (int64_t rank = 0; rank < mesh.net.size; rank++) {
    Wire& wire = mesh.net.wires[rank];
    memcpy(all + 2 * rank, wire.is_far() ? wire.arrived().work : mesh.host.member(wire.place).work[slot], 16);
    wire.agreed_rows = (all[2 * rank] + all[2 * rank + 1]) * rows_per_token;
  }
  return MET;
}

// Pack rows for other hosts, one run a peer: experts, then rows.
inline int64_t pack(Mesh& mesh, int64_t rows, int64_t bytes, const char* x, const int64_t* process, const int64_t* expert) {
  const int64_t size = mesh.net.size;
  memset(mesh.counts, 0, size * sizeof(int64_t));
  for (int64_t row = 0; row < rows; row++) {
    if (process[row] < 0 || process[row] >= size) return about(NOBODY, row);
    mesh.counts[process[row]]++;
  }
  int64_t far_rows = 0;
  for (int64_t rank = 0; rank < size; rank++) {
    const int64_t count = mesh.counts[rank];
    if (mesh.net.wires[rank].is_far())
      far_rows += count;
    else if (rank != mesh.net.index)
      mesh.traffic.sent_within += count * (bytes + 8);
  }
  mesh.traffic.rows_sent += rows - mesh.counts[mesh.net.index];
  if (far_rows * (bytes + 8) > mesh.outbox_room) {
    mesh.outbox_room = far_rows * (bytes + 8);
    mesh.outbox = static_cast<char*>(realloc(mesh.outbox, mesh.outbox_room));
  }
  char* at = mesh.outbox;
  for (int64_t rank = 0; rank < size; rank++) {
    Wire& wire = mesh.net.wires[rank];
    if (!wire.is_far()) continue;
    wire.body = mesh.packed[rank] = at;
    at += mesh.counts[rank] * (bytes + 8);
    wire.header.rows = mesh.counts[rank];
    wire.most_rows = wire.agreed_rows;
    mesh.counts[rank] = 0;
  }
  for (int64_t row = 0; row < rows; row++) {
    const Wire& wire = mesh.net.wires[process[row]];
    if (!wire.is_far()) continue;
    const int64_t number = mesh.counts[process[row]]++;
    char* run = mesh.packed[process[row]];
    memcpy(run + number * 8, expert + row, 8);
    memcpy(run + wire.header.rows * 8 + number * bytes, x + row * bytes, bytes);
  }
  return MET;
}

// Send row r to process[r], and take what comes for this one: of each row its expert, its owner and its place there.
// `room`: for how many; `*taken`: how many.
inline int64_t dispatch(Mesh& mesh, int64_t rows, int64_t bytes, const char* x, const int64_t* process,
                        const int64_t* expert, char* x_S, int64_t* expert_S, int64_t* owner_S, int64_t* place_S,
                        int64_t room, int64_t* taken) {
  const int64_t start = now_ns(), me = mesh.net.index;
  const Meeting& host = mesh.host;
  if (int64_t outcome = pack(mesh, rows, bytes, x, process, expert)) return outcome;
  memcpy(host.experts(host.index), expert, rows * 8);
  memcpy(host.processes(host.index), process, rows * 8);
  for (int64_t row = 0; row < rows; row++)
    if (!mesh.net.wires[process[row]].is_far())
      memcpy(host.rows(host.index) + row * host.room, x + row * bytes, bytes);
  host.member(host.index).rows = rows;
  if (int64_t outcome = mesh.net.open(DISPATCH, bytes)) return outcome;
  if (int64_t outcome = round_trip(mesh, start)) return outcome;
  int64_t count = 0;
  for (int64_t rank = 0; rank < mesh.net.size; rank++) {
    const Wire& wire = mesh.net.wires[rank];
    const int64_t first = count;
    if (wire.is_far()) {
      const int64_t came = wire.arrived().rows;
      if (count + came > room) return about(TOO_MANY, rank);
      memcpy(expert_S + count, wire.arrived_body(), came * 8);
      memcpy(x_S + count * bytes, wire.arrived_body() + came * 8, came * bytes);
      for (int64_t row = 0; row < came; row++) {
        owner_S[count] = rank;
        place_S[count++] = row;
      }
      continue;
    }
    for (int64_t row = 0; row < host.member(wire.place).rows; row++)
      if (host.processes(wire.place)[row] == me) {
        if (count == room) return about(TOO_MANY, rank);
        memcpy(x_S + count * bytes, host.rows(wire.place) + row * host.room, bytes);
        expert_S[count] = host.experts(wire.place)[row];
        owner_S[count] = rank;
        place_S[count++] = row;
      }
    if (rank != me) mesh.traffic.received_within += (count - first) * (bytes + 8);
  }
  *taken = count;
  return MET;
}

// Results of the taken rows go to their owners; this rank's own end in its results in its own order. Nobody writes them
// again before this rank dispatches again.
inline int64_t combine(Mesh& mesh, int64_t count, int64_t bytes, const char* y_S, const int64_t* owner_S,
                       const int64_t* place_S, int64_t rows, const int64_t* process) {
  const int64_t start = now_ns(), me = mesh.net.index;
  const Meeting& host = mesh.host;
  memset(mesh.counts, 0, mesh.net.size * sizeof(int64_t));
  for (int64_t row = 0; row < rows; row++) mesh.counts[process[row]]++;
  for (int64_t rank = 0; rank < mesh.net.size; rank++) {
    mesh.net.wires[rank].header.rows = 0;
    mesh.net.wires[rank].most_rows = mesh.counts[rank];
  }
  for (int64_t s = 0; s < count; s++) {
    Wire& wire = mesh.net.wires[owner_S[s]];
    if (wire.is_far()) {
      // Rows of one owner stand together.
      if (!wire.header.rows++) wire.body = y_S + s * bytes;
    } else {
      memcpy(host.results(wire.place) + place_S[s] * host.room, y_S + s * bytes, bytes);
      if (owner_S[s] != me) mesh.traffic.sent_within += bytes;
    }
  }
  if (int64_t outcome = mesh.net.open(COMBINE, bytes)) return outcome;
  if (int64_t outcome = round_trip(mesh, start)) return outcome;
  for (int64_t rank = 0; rank < mesh.net.size; rank++) {
    Wire& wire = mesh.net.wires[rank];
    if (!wire.is_far()) {
      if (rank != me) mesh.traffic.received_within += mesh.counts[rank] * bytes;
    } else {
      if (wire.arrived().rows != mesh.counts[rank]) return about(STRANGE, rank);
      mesh.packed[rank] = const_cast<char*>(wire.arrived_body());
    }
  }
  for (int64_t row = 0; row < rows; row++)
    if (mesh.net.wires[process[row]].is_far()) {
      memcpy(host.results(host.index) + row * host.room, mesh.packed[process[row]], bytes);
      mesh.packed[process[row]] += bytes;
    }
  return MET;
}

inline Mesh* new_mesh(const MeshPlan& plan) {
  Mesh* mesh = static_cast<Mesh*>(calloc(1, sizeof(Mesh)));
  const int64_t size = plan.size;
  mesh->counts = static_cast<int64_t*>(calloc(size, sizeof(int64_t)));
  mesh->packed = static_cast<char**>(calloc(size, sizeof(char*)));
  mesh->global = static_cast<int32_t*>(calloc(size, sizeof(int32_t)));
  mesh->sockets = static_cast<int32_t*>(calloc(size, sizeof(int32_t)));
  Wires& net = mesh->net;
  net.size = size, net.index = plan.index, net.epoch = plan.epoch;
  net.wires = static_cast<Wire*>(calloc(size, sizeof(Wire)));
  net.watched = static_cast<pollfd*>(calloc(size + 1, sizeof(pollfd)));
  net.whose = static_cast<int32_t*>(calloc(size + 1, sizeof(int32_t)));
  int64_t here = 0;
  for (int64_t rank = 0; rank < size; rank++) {
    Wire& wire = net.wires[rank];
    wire.socket = plan.sockets[rank], wire.place = plan.places[rank], wire.is_same_host = plan.is_same_host[rank];
    if (wire.is_far()) Wires::grow(wire, 1);
    if (wire.place < 0) continue;
    mesh->global[wire.place] = rank;
    mesh->sockets[wire.place] = wire.socket;
    here++;
  }
  Meeting host = {plan.memory, here, plan.places[plan.index], plan.capacity, plan.row_bytes,
                  plan.spin_ns, plan.timeout_ns, int32_t(plan.abort_event), mesh->sockets};
  mesh->host = host;
  return mesh;
}

inline void free_mesh(Mesh* mesh) {
  for (int64_t rank = 0; rank < mesh->net.size; rank++) free(mesh->net.wires[rank].inbox);
  void* parts[] = {mesh->counts, mesh->packed, mesh->global, mesh->sockets, mesh->net.wires,
                   mesh->net.watched, mesh->net.whose, mesh->outbox, mesh};
  for (void* part : parts) free(part);
}

