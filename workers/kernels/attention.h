// One attention layer of a step, from the residual stream back to it: norm, q k v, rotation, paged attention, output.
//
// Every row is one query. It sees the keys from its first visible position (0, or its chunk's start) to its own, and
// walks them block by block as they lie in the pool: no key is gathered and no mask is made. Softmax is computed along
// the way (Milakov and Gimelshein, 2018), in float32. How many rows a step has changes no result.
#pragma once
#include "parallel.h"
#include "products.h"

struct AttentionLayer {  // kept in step with native.py
  const void *norm, *qkv, *qkv_bias, *out, *out_bias;
  void *keys, *values;  // [blocks, block size, kv heads, head dim]
  int64_t hidden, heads, kv_heads, head_dim, block_size, has_qk_norm;
  double eps;
};

struct AttentionRows {  // kept in step with native.py
  int64_t rows, table_width;
  const int64_t *slot_T, *position_T, *first_T;  // where keys go; own position; first position seen
  const int64_t* sequence_T;                     // row of `tables`
  const int64_t* first_block_S;                  // blocks of the sequence that were given back
  const int32_t* tables_SM;                      // the sequence's blocks from there on
  const float *cos_TD, *sin_TD;                  // rotation, or null; sin with its sign: -, +, -, +, …
  const float* temperature_T;                    // what multiplies the query, or null
};

enum { MAX_HEAD_DIM = 256, KEYS = 16 };

// x · cos + swapped(x) · sin: neighbours are the two parts of a complex number.
template <class S>
INLINE void rotate_row(S* x, const float* cos, const float* sin, int64_t n) {
  const i32x16 neighbours = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
  for (int64_t i = 0; i < n; i += 16) {
    f32x16 v = load_at(x, i, n);
    store_at(x, i, n, v * load_at(cos, i, n) + SHUFFLE(v, v, neighbours) * load_at(sin, i, n));
  }
}

// G query heads that share a kv head. `q` and `out` are [G, head dim].
template <int G, class S>
INLINE void attend(const AttentionLayer& layer, const AttentionRows& rows, int64_t row, int64_t kv_head, const S* q, S* out) {
  const int64_t dim = layer.head_dim, size = layer.block_size, stride = layer.kv_heads * dim;
  const int32_t* table = rows.tables_SM + rows.sequence_T[row] * rows.table_width - rows.first_block_S[rows.sequence_T[row]];
  const S* keys = static_cast<const S*>(layer.keys) + kv_head * dim;
  const S* values = static_cast<const S*>(layer.values) + kv_head * dim;
  const float scale = 1.0f / __builtin_sqrtf(float(dim));
  const S* query[G];
  float most[G], total[G];
  alignas(64) float sums[G][MAX_HEAD_DIM];
  for (int g = 0; g < G; g++) {
    query[g] = q + g * dim;
    most[g] = -1e30f;
    total[g] = 0;
    for (int64_t d = 0; d < dim; d += 16) store16(sums[g] + d, f32x16{});
  }
  for (int64_t position = rows.first_T[row]; position <= rows.position_T[row];) {
    int64_t offset = position % size;
    int64_t count = size - offset;
    if (count > rows.position_T[row] - position + 1) count = rows.position_T[row] - position + 1;
    if (count > KEYS) count = KEYS;
    int64_t place = (int64_t(table[position / size]) * size + offset) * stride;
    position += count;
    alignas(64) float scores[G][KEYS];
    float out4[G][4];
    int64_t key = 0;
    for (; key + 4 <= count; key += 4) {
      rows_by_4<G, false>(query, keys + place + key * stride, stride, dim, out4);
      for (int g = 0; g < G; g++) memcpy(scores[g] + key, out4[g], sizeof(out4[g]));
    }
    for (; key < count; key++) {
      rows_by_1<G>(query, keys + place + key * stride, dim, out4);
      for (int g = 0; g < G; g++) scores[g][key] = out4[g][0];
    }
    for (int g = 0; g < G; g++) {
      for (int64_t pad = count; pad < KEYS; pad++) scores[g][pad] = -1e30f;
      f32x16 score = load16(scores[g]) * scale;
      float now = largest(score);
      if (now > most[g]) {
        float fade = exp16(all(most[g] - now))[0];
        most[g] = now;
        total[g] *= fade;
        for (int64_t d = 0; d < dim; d += 16) store16(sums[g] + d, load16(sums[g] + d) * fade);
      }
      f32x16 weight = exp16(score - most[g]);
      weight = score > -1e27f ? weight : f32x16{};
      total[g] += sum(weight);
      store16(scores[g], weight);
    }
    int64_t d = 0;
    for (; d + 64 <= dim; d += 64) {
      f32x16 part[G][4];
      for (int g = 0; g < G; g++)
        for (int i = 0; i < 4; i++) part[g][i] = load16(sums[g] + d + 16 * i);
      for (key = 0; key < count; key++) {
        f32x16 value[4];
        for (int i = 0; i < 4; i++) value[i] = load16(values + place + key * stride + d + 16 * i);
        for (int g = 0; g < G; g++)
          for (int i = 0; i < 4; i++) part[g][i] += scores[g][key] * value[i];
      }
      for (int g = 0; g < G; g++)
        for (int i = 0; i < 4; i++) store16(sums[g] + d + 16 * i, part[g][i]);
    }
    for (; d < dim; d += 16)
      for (int g = 0; g < G; g++) {
        f32x16 part = load16(sums[g] + d);
        for (key = 0; key < count; key++) part += scores[g][key] * load_at(values + place + key * stride, d, dim);
        store16(sums[g] + d, part);
      }
  }
  for (int g = 0; g < G; g++)
    for (int64_t d = 0; d < dim; d += 16) store_at(out + g * dim, d, dim, load16(sums[g] + d) / total[g]);
}

template <class S>
void attend_group(const AttentionLayer& layer, const AttentionRows& rows, int64_t row, int64_t kv_head, const S* q, S* out) {
  const int64_t group = layer.heads / layer.kv_heads, dim = layer.head_dim;
  for (int64_t done = 0; done < group;) {
    switch (group - done) {
      case 1: attend<1>(layer, rows, row, kv_head, q + done * dim, out + done * dim); done += 1; break;
      case 2: attend<2>(layer, rows, row, kv_head, q + done * dim, out + done * dim); done += 2; break;
      case 3: case 5: attend<3>(layer, rows, row, kv_head, q + done * dim, out + done * dim); done += 3; break;
      default: attend<4>(layer, rows, row, kv_head, q + done * dim, out + done * dim); done += 4;
    }
  }
}

// Rows of q, k, v as they are used: rotated and normed, or with temperature; k and v stored.
template <class S>
INLINE void prepare_row(const AttentionLayer& layer, const AttentionRows& rows, int64_t row, S* qkv) {
  const int64_t dim = layer.head_dim, turned = layer.heads + layer.kv_heads;
  if (rows.cos_TD) {
    for (int64_t head = 0; head < turned; head++) {
      S* x = qkv + head * dim;
      rotate_row(x, rows.cos_TD + row * dim, rows.sin_TD + row * dim, dim);
      if (layer.has_qk_norm) rms_norm_row<S>(x, nullptr, float(layer.eps), dim, x);
    }
  } else if (rows.temperature_T) {
    for (int64_t i = 0; i < layer.heads * dim; i += 16)
      store_at(qkv, i, layer.heads * dim, load_at(qkv, i, layer.heads * dim) * rows.temperature_T[row]);
  }
  int64_t place = rows.slot_T[row] * layer.kv_heads * dim, size = layer.kv_heads * dim;
  memcpy(static_cast<S*>(layer.keys) + place, qkv + layer.heads * dim, size * sizeof(S));
  memcpy(static_cast<S*>(layer.values) + place, qkv + turned * dim, size * sizeof(S));
}

// One linear layer: y[t] = round(w x[t] + bias), then + add[t] where there is one (y may be add).
template <class S>
INLINE void linear(Team team, int64_t tokens, const S* x, const S* w, const S* bias, int64_t n_size, int64_t k_size, const S* add, S* y) {
  Share share(n_size, 16, team);
  product<S>(0, tokens, [&](int64_t t) { return x + t * k_size; }, w, share.first, share.last, k_size,
             [&](int64_t t, int64_t n, int count, const float* sums) {
               for (int r = 0; r < count; r++) {
                 float value = sums[r] + (bias ? widen(bias[n + r]) : 0.0f);
                 if (add) value = rounded<S>(value) + widen(add[t * n_size + n + r]);
                 narrow(value, y[t * n_size + n + r]);
               }
             });
}

template <class S>
int64_t attention(const AttentionLayer& layer, const AttentionRows& rows, S* x, void* memory, int threads) {
  const int64_t tokens = rows.rows, hidden = layer.hidden, dim = layer.head_dim;
  const int64_t width = (layer.heads + 2 * layer.kv_heads) * dim, out_width = layer.heads * dim;
  Scratch scratch(memory);
  Queue* queue = scratch.take<Queue>(1);
  S* normed = scratch.take<S>(tokens * hidden);
  S* qkv = scratch.take<S>(tokens * width);
  S* out = scratch.take<S>(tokens * out_width);
  if (!memory) return scratch.used;
  queue->next = 0;
  parallel(threads, [&](Team team) {
    Share share(tokens, 1, team);
    for (int64_t t = share.first; t < share.last; t++)
      rms_norm_row(x + t * hidden, static_cast<const S*>(layer.norm), float(layer.eps), hidden, normed + t * hidden);
    team.wait();
    linear<S>(team, tokens, normed, static_cast<const S*>(layer.qkv), static_cast<const S*>(layer.qkv_bias), width, hidden, nullptr, qkv);
    team.wait();
    for (int64_t t = share.first; t < share.last; t++) prepare_row(layer, rows, t, qkv + t * width);
    team.wait();
    const int64_t group = layer.heads / layer.kv_heads * dim, items = tokens * layer.kv_heads;
    const int64_t grain = tokens > 64 ? 8 : 1;
    for (int64_t start; (start = queue->take(grain)) < items;)
      for (int64_t item = start; item < start + grain && item < items; item++) {
        int64_t row = item / layer.kv_heads, kv_head = item % layer.kv_heads;
        attend_group<S>(layer, rows, row, kv_head, qkv + row * width + kv_head * group, out + row * out_width + kv_head * group);
      }
    team.wait();
    linear<S>(team, tokens, out, static_cast<const S*>(layer.out), static_cast<const S*>(layer.out_bias), hidden, out_width, x, x);
  });
  return 0;
}
