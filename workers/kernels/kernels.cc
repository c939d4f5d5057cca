// What Python calls (workers/native.py), once for each element type. With no scratch memory a function returns how many
// bytes of it a call would need.
#include "feed_forward.h"
#include "meeting.h"

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

extern "C" int64_t meeting_bytes(const Meeting* meeting) {
  return meeting->slab(meeting->size) - meeting->memory;
}
extern "C" int64_t meeting_results(const Meeting* meeting) {  // where this rank's results begin
  return meeting->results(meeting->index) - meeting->memory;
}
extern "C" int64_t meeting_agree(const Meeting* meeting, int64_t number, const int64_t* mine, int64_t* all) {
  return agree(*meeting, number, mine, all);
}
extern "C" int64_t meeting_dispatch(const Meeting* meeting, int64_t rows, const char* x, const int64_t* process,
                                    const int64_t* expert, char* x_S, int64_t* expert_S, int64_t* owner_S,
                                    int64_t* place_S, int64_t room, int64_t* taken) {
  return dispatch(*meeting, rows, x, process, expert, x_S, expert_S, owner_S, place_S, room, taken);
}
extern "C" int64_t meeting_combine(const Meeting* meeting, int64_t count, const char* y_S, const int64_t* owner_S,
                                   const int64_t* place_S) {
  return combine(*meeting, count, y_S, owner_S, place_S);
}
extern "C" void meeting_leave(const Meeting* meeting) { leave(*meeting); }
