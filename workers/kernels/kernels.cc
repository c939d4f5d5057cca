// What Python calls (workers/native.py), once for each element type. With no scratch memory a function returns how many
// bytes of it a call would need.
#include "feed_forward.h"
#include "mesh.h"

#define FOR_TYPE(S, suffix)                                                                                              \
  extern "C" int64_t attention_##suffix(const AttentionLayer* layer, const AttentionRows* rows, S* x, void* memory,      \
                                        int threads) {                                                                   \
    return attention<S>(*layer, *rows, x, memory, threads);                                                              \
  }                                                                                                                      \
  extern "C" int64_t dense_##suffix(const DenseLayer* layer, int64_t tokens, const S* input, const S* routed,            \
                                    int64_t top_k, S* x, void* memory, int threads) {                                    \
    return dense<S>(*layer, tokens, input, routed, top_k, x, memory, threads);                                           \
  }                                                                                                                      \
  extern "C" int64_t route_##suffix(const RouterLayer* layer, int64_t tokens, const S* x, S* normed, S* scaled,          \
                                    int64_t* expert, void* memory, int threads) {                                        \
    return route<S>(*layer, tokens, x, normed, scaled, expert, memory, threads);                                         \
  }                                                                                                                      \
  extern "C" int64_t experts_##suffix(const ExpertLayer* layer, int64_t rows, const S* x, const int64_t* expert_S, S* y, \
                                      void* memory, int threads) {                                                       \
    return experts<S>(*layer, rows, x, expert_S, y, memory, threads);                                                    \
  }                                                                                                                      \
  extern "C" void norm_##suffix(const S* x, const S* weight, double eps, int64_t rows, int64_t n, S* to) {               \
    for (int64_t row = 0; row < rows; row++) rms_norm_row(x + row * n, weight, float(eps), n, to + row * n);             \
  }                                                                                                                      \
  extern "C" void logits_##suffix(const S* x, const S* w, int64_t rows, int64_t n, int64_t k, float* to, int threads) {  \
    parallel(threads, [&](Team team) {                                                                                   \
      Share share(n, 16, team);                                                                                          \
      product<S>(0, rows, [&](int64_t t) { return x + t * k; }, w, share.first, share.last, k,                           \
                 [&](int64_t t, int64_t row, int count, const float* sums) {                                             \
                   memcpy(to + t * n + row, sums, count * sizeof(float));                                                \
                 });                                                                                                     \
    });                                                                                                                  \
  }

FOR_TYPE(float, float32)
FOR_TYPE(bf16, bfloat16)

// ---- the exchange between ranks (workers/mesh_exchange.py) --------------------------------------------------------
// Everything that waits returns an outcome; see `about` in wires.h.

extern "C" int64_t mesh_bytes(int64_t ranks, int64_t capacity, int64_t row_bytes) {  // of the memory one host's ranks share
  const Meeting host = {nullptr, ranks, 0, capacity, row_bytes, 0, 0, -1, nullptr};
  return host.slab(ranks) - host.memory;
}
extern "C" Mesh* mesh_new(const MeshPlan* plan) { return new_mesh(*plan); }
extern "C" void mesh_free(Mesh* mesh) { free_mesh(mesh); }
extern "C" void mesh_leave(const Mesh* mesh) { leave(mesh->host); }
extern "C" const Traffic* mesh_traffic(const Mesh* mesh) { return &mesh->traffic; }
extern "C" int64_t mesh_results(const Mesh* mesh) {  // where this rank's results begin
  return mesh->host.results(mesh->host.index) - mesh->host.memory;
}
extern "C" int64_t mesh_agree(Mesh* mesh, int64_t rows_per_token, const int64_t* mine, int64_t* all) {
  return is_readable(mesh->host.abort_event) ? GIVEN_UP : agree(*mesh, rows_per_token, mine, all);
}
extern "C" int64_t mesh_dispatch(Mesh* mesh, int64_t rows, int64_t row_bytes, const char* x, const int64_t* process,
                                 const int64_t* expert, char* x_S, int64_t* expert_S, int64_t* owner_S, int64_t* place_S,
                                 int64_t room, int64_t* taken) {
  if (is_readable(mesh->host.abort_event)) return GIVEN_UP;
  return dispatch(*mesh, rows, row_bytes, x, process, expert, x_S, expert_S, owner_S, place_S, room, taken);
}
extern "C" int64_t mesh_combine(Mesh* mesh, int64_t count, int64_t row_bytes, const char* y_S, const int64_t* owner_S,
                                const int64_t* place_S, int64_t rows, const int64_t* process) {
  if (is_readable(mesh->host.abort_event)) return GIVEN_UP;
  return combine(*mesh, count, row_bytes, y_S, owner_S, place_S, rows, process);
}
