// Feed-forward layers of a step: dense, and the mixture of experts in its three parts (route, experts, shared expert).
#pragma once
#include "attention.h"

struct DenseLayer {  // kept in step with native.py
  const void *norm, *gate_up, *down;  // norm: null where the input is normed already
  int64_t hidden, inner;
  double eps;
};

struct RouterLayer {  // kept in step with native.py
  const void *norm, *router;
  int64_t hidden, experts, top_k;
  double eps;
};

struct ExpertLayer {  // kept in step with native.py
  const void *gate_up, *down;  // [slots, 2 · inner, hidden], [slots, hidden, inner]
  const int64_t* slot_E;       // where an expert lies; -1: not here
  int64_t* tokens_E;           // rows each has computed
  int64_t experts, hidden, inner;
};

// x += mlp(input) + Σ routed; the input is norm(x) where no other is given.
template <class S>
int64_t dense(const DenseLayer& layer, int64_t tokens, const S* input, const S* routed, int64_t top_k, S* x, void* memory, int threads) {
  const int64_t hidden = layer.hidden, inner = layer.inner;
  Scratch scratch(memory);
  S* normed = scratch.take<S>(tokens * hidden);
  S* gate_up = scratch.take<S>(tokens * 2 * inner);
  S* mixed = scratch.take<S>(tokens * inner);
  if (!memory) return scratch.used;
  parallel(threads, [&](Team team) {
    Share share(tokens, 1, team);
    const S* from = input;
    if (!from) {
      for (int64_t t = share.first; t < share.last; t++)
        rms_norm_row(x + t * hidden, static_cast<const S*>(layer.norm), float(layer.eps), hidden, normed + t * hidden);
      from = normed;
      team.wait();
    }
    linear<S>(team, tokens, from, static_cast<const S*>(layer.gate_up), nullptr, 2 * inner, hidden, nullptr, gate_up);
    team.wait();
    for (int64_t t = share.first; t < share.last; t++) swiglu_row(gate_up + t * 2 * inner, inner, mixed + t * inner);
    team.wait();
    Share rows(hidden, 16, team);
    product<S>(0, tokens, [&](int64_t t) { return mixed + t * inner; }, static_cast<const S*>(layer.down), rows.first, rows.last, inner,
               [&](int64_t t, int64_t n, int count, const float* sums) {
                 for (int r = 0; r < count; r++) {
                   float value = rounded<S>(sums[r]);
                   if (routed) {
                     float sum = 0;
                     for (int64_t k = 0; k < top_k; k++) sum += widen(routed[(t * top_k + k) * hidden + n + r]);
                     value = rounded<S>(value + rounded<S>(sum));
                   }
                   S& to = x[t * hidden + n + r];
                   narrow(widen(to) + value, to);
                 }
               });
  });
  return 0;
}

// normed = norm(x); of each row the experts with the largest logits, and the row times their sigmoid scores.
template <class S>
int64_t route(const RouterLayer& layer, int64_t tokens, const S* x, S* normed, S* scaled, int64_t* expert, void* memory, int threads) {
  const int64_t hidden = layer.hidden, experts = layer.experts;
  Scratch scratch(memory);
  S* logits = scratch.take<S>(tokens * experts);
  if (!memory) return scratch.used;
  parallel(threads, [&](Team team) {
    Share share(tokens, 1, team);
    for (int64_t t = share.first; t < share.last; t++)
      rms_norm_row(x + t * hidden, static_cast<const S*>(layer.norm), float(layer.eps), hidden, normed + t * hidden);
    team.wait();
    linear<S>(team, tokens, normed, static_cast<const S*>(layer.router), nullptr, experts, hidden, nullptr, logits);
    team.wait();
    for (int64_t t = share.first; t < share.last; t++)
      for (int64_t k = 0; k < layer.top_k; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
          bool taken = false;
          for (int64_t earlier = 0; earlier < k; earlier++) taken |= expert[t * layer.top_k + earlier] == e;
          if (!taken && (best < 0 || widen(logits[t * experts + e]) > widen(logits[t * experts + best]))) best = e;
        }
        expert[t * layer.top_k + k] = best;
        float score = rounded<S>(1.0f / (1.0f + exp16(all(-widen(logits[t * experts + best])))[0]));
        S* to = scaled + (t * layer.top_k + k) * hidden;
        for (int64_t i = 0; i < hidden; i += 16) store_at(to, i, hidden, load_at(normed + t * hidden, i, hidden) * score);
      }
  });
  return 0;
}

// y[s] = expert_S[s] of x[s]. Rows of an expert are computed together, so that its weights are read once.
// Returns an expert that is not here, or -1.
template <class S>
int64_t experts(const ExpertLayer& layer, int64_t rows, const S* x, const int64_t* expert_S, S* y, void* memory, int threads) {
  const int64_t hidden = layer.hidden, inner = layer.inner;
  Scratch scratch(memory);
  Queue* queue = scratch.take<Queue>(2);
  int64_t* first_E = scratch.take<int64_t>(layer.experts + 1);
  int64_t* group_G = scratch.take<int64_t>(layer.experts);
  int64_t* order = scratch.take<int64_t>(rows);
  S* gate_up = scratch.take<S>(rows * 2 * inner);
  S* mixed = scratch.take<S>(rows * inner);
  if (!memory) return scratch.used;
  for (int64_t e = 0; e <= layer.experts; e++) first_E[e] = 0;
  for (int64_t s = 0; s < rows; s++) {
    if (layer.slot_E[expert_S[s]] < 0) return expert_S[s];
    first_E[expert_S[s] + 1]++;
  }
  int64_t groups = 0;
  for (int64_t e = 0; e < layer.experts; e++) {
    if (first_E[e + 1]) group_G[groups++] = e;
    layer.tokens_E[e] += first_E[e + 1];
    first_E[e + 1] += first_E[e];
  }
  for (int64_t s = rows - 1; s >= 0; s--) order[--first_E[expert_S[s] + 1]] = s;  // moves each end to its start:
  for (int64_t e = 0; e < layer.experts; e++) first_E[e] = first_E[e + 1];        // shift them back
  first_E[layer.experts] = rows;
  queue[0].next = queue[1].next = 0;
  parallel(threads, [&](Team team) {
    const int64_t up_blocks = (2 * inner + ROW_BLOCK - 1) / ROW_BLOCK, down_blocks = (hidden + ROW_BLOCK - 1) / ROW_BLOCK;
    // Neighbouring blocks of one expert together: memory is read in long runs.
    const int64_t grain = groups >= 4 * team.threads ? up_blocks : 1, down_grain = groups >= 4 * team.threads ? down_blocks : 1;
    for (int64_t start; (start = queue[0].take(grain)) < groups * up_blocks;)
      for (int64_t item = start; item < start + grain && item < groups * up_blocks; item++) {
        int64_t e = group_G[item / up_blocks], n0 = item % up_blocks * ROW_BLOCK;
        const S* w = static_cast<const S*>(layer.gate_up) + layer.slot_E[e] * 2 * inner * hidden;
        product<S>(first_E[e], first_E[e + 1], [&](int64_t s) { return x + order[s] * hidden; }, w, n0,
                   n0 + ROW_BLOCK < 2 * inner ? n0 + ROW_BLOCK : 2 * inner, hidden,
                   [&](int64_t s, int64_t n, int count, const float* sums) {
                     for (int r = 0; r < count; r++) narrow(sums[r], gate_up[s * 2 * inner + n + r]);
                   });
      }
    team.wait();
    Share share(rows, 1, team);
    for (int64_t s = share.first; s < share.last; s++) swiglu_row(gate_up + s * 2 * inner, inner, mixed + s * inner);
    team.wait();
    for (int64_t start; (start = queue[1].take(down_grain)) < groups * down_blocks;)
      for (int64_t item = start; item < start + down_grain && item < groups * down_blocks; item++) {
        int64_t e = group_G[item / down_blocks], n0 = item % down_blocks * ROW_BLOCK;
        const S* w = static_cast<const S*>(layer.down) + layer.slot_E[e] * hidden * inner;
        product<S>(first_E[e], first_E[e + 1], [&](int64_t s) { return mixed + s * inner; }, w, n0,
                   n0 + ROW_BLOCK < hidden ? n0 + ROW_BLOCK : hidden, inner,
                   [&](int64_t s, int64_t n, int count, const float* sums) {
                     for (int r = 0; r < count; r++) narrow(sums[r], y[order[s] * hidden + n + r]);
                   });
      }
  });
  return -1;
}
