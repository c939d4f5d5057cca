// One attention layer of a step, from the residual stream back to it: norm, q k v, rotation, paged attention, output.
//
// Every row sees the keys from its first visible position (0, or its chunk's start) to its own. Rows of one prompt walk
// them together, block by block, so that a key is fetched and laid out once for all of them; no mask over the context is
// made. Softmax is computed along the way (Milakov and Gimelshein, 2018), in float32; its weights are rounded to the type,
// as torch's are, and their total is that of the rounded ones. How many rows a step or a walk has changes no result.
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

constexpr int64_t MAX_HEAD_DIM = 256, KEYS = 64, QUERIES = 64;  // keys of one block, queries of one walk

INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

// x · cos + swapped(x) · sin: neighbours are the two parts of a complex number.
template <class S>
INLINE void rotate_row(S* x, const float* cos, const float* sin, int64_t n) {
  const i32x16 neighbours = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
  for (int64_t i = 0; i < n; i += 16) {
    f32x16 v = load_at(x, i, n);
    store_at(x, i, n, v * load_at(cos, i, n) + SHUFFLE(v, v, neighbours) * load_at(sin, i, n));
  }
}

// Neighbouring rows of the step that see the same first position of one sequence. They walk its keys together.
struct Run {
  int64_t row, rows;
};

// What one walk works on: its queries (row by row, the heads of one kv head) and the block of keys that it is at, laid out
// so that each lane of the products is one sum. Blocks are KEYS long from the first position seen, wherever the pool has
// them: each query's sums are the same in any run.
template <class S>
struct Walk {
  typedef Lanes<S> L;
  typedef typename L::Vector Vector;
  int64_t dim, wide, deep;    // head dim as it is, in whole f32x16, in whole Vectors
  bool direct;                // values are read once, so they stay where they are
  S ones[2];
  float scale;                // of the products; weights are powers of 2
  const S *pool_k, *pool_v;   // the kv head's part of the pool
  const int64_t* place;       // where in it each key of the block is
  f32x16 total[QUERIES];      // of the weights, lane by lane
  float most[QUERIES];        // the largest product so far, scaled
  alignas(64) float sums[QUERIES * MAX_HEAD_DIM];  // [query, wide]
  alignas(64) S queries[QUERIES * MAX_HEAD_DIM];   // [query, deep]
  alignas(64) S keys[KEYS * MAX_HEAD_DIM];         // [key / 16, deep / per, 16 keys, per]
  alignas(64) S values[KEYS * MAX_HEAD_DIM];       // [key / per, wide, per]

  Walk(const AttentionLayer& layer, int64_t kv_head, int64_t count) : dim(layer.head_dim), place(nullptr) {
    wide = (dim + 15) / 16 * 16;
    deep = (dim + L::count - 1) / L::count * L::count;
    direct = count <= TILE;
    narrow(1.0f, ones[0]);
    ones[1] = ones[0];
    scale = 1.44269504f / __builtin_sqrtf(float(dim));
    pool_k = static_cast<const S*>(layer.keys) + kv_head * dim;
    pool_v = static_cast<const S*>(layer.values) + kv_head * dim;
    for (int64_t q = 0; q < count; q++) total[q] = f32x16{}, most[q] = -1e30f;
    memset(sums, 0, count * wide * sizeof(float));
  }

  // Lays out the block's keys, and values if they are read more than once.
  void take_keys(int64_t count) {
    const int64_t n = dim, span = wide, row = deep;
    for (int64_t first = 0; first < count; first += 16) {
      S* to = keys + first * row;
      int64_t d = 0;
      for (; d + L::count <= n; d += L::count, to += 16 * L::count)
        transpose16([&](int i) { return bits_of<f32x16>(L::load(pool_k + place[first + i] + d)); }, to);
      if (d < n) transpose16([&](int i) { return bits_of<f32x16>(L::load_some(pool_k + place[first + i] + d, n - d)); }, to);
    }
    if (direct) return;
    for (int64_t j = 0; j < count; j += L::per)
      for (int64_t d = 0; d < span; d += 16) {
        Vector pair = value_of(j, j + L::per - 1, d);
        memcpy(values + j * span + d * L::per, &pair, sizeof(pair));
      }
  }
  INLINE Vector value_of(int64_t j, int64_t other, int64_t d) {
    return L::side_by_side(pool_v + place[j], pool_v + place[other], d, dim);
  }

  // Weights of the block's first `count` keys, from their products with the query.
  __attribute__((noinline)) void weigh(int64_t q, int64_t count, float* scores, S* weights) {
    for (int64_t j = count / 16 * 16; j < KEYS; j += 16)
      store16(scores + j, LANES16 < int32_t(count - j) ? load16(scores + j) : all(-1e30f));
    f32x16 top = load16(scores);
    for (int64_t j = 16; j < KEYS; j += 16) top = larger(top, load16(scores + j));
    const float now = largest(top) * scale;
    if (now > most[q]) {
      f32x16 fade = all(power2(all(most[q] - now))[0]);
      most[q] = now;
      total[q] *= fade;
      for (int64_t d = 0; d < wide; d += 16) store16(sums + q * wide + d, load16(sums + q * wide + d) * fade);
    }
    f32x16 sum = total[q];
    UNROLLED for (int64_t j = 0; j < KEYS; j += L::count) {
      f32x16 weight[L::per];
      for (int64_t i = 0; i < L::per; i++) weight[i] = power2(load16(scores + j + 16 * i) * scale - most[q]);
      Vector rounded = L::narrowed(weight);
      memcpy(weights + j, &rounded, sizeof(rounded));
      sum = L::accumulate(sum, rounded, L::broadcast(ones));
    }
    total[q] = sum;
  }

  template <int T, int V>
  INLINE void scores_of(int64_t q, int64_t first, float (*scores)[KEYS]) {
    f32x16 sum[T][V];
    UNROLLED for (int t = 0; t < T; t++)
      UNROLLED for (int v = 0; v < V; v++) sum[t][v] = f32x16{};
    const S* from = keys + first * deep;
    for (int64_t d = 0; d < dim; d += L::per) {
      Vector key[V];
      UNROLLED for (int v = 0; v < V; v++) key[v] = L::load(from + 16 * (v * deep + d));
      UNROLLED for (int t = 0; t < T; t++) {
        Vector query = L::broadcast(queries + (q + t) * deep + d);
        UNROLLED for (int v = 0; v < V; v++) sum[t][v] = L::accumulate(sum[t][v], key[v], query);
      }
    }
    UNROLLED for (int t = 0; t < T; t++)
      UNROLLED for (int v = 0; v < V; v++) store16(scores[t] + first + 16 * v, sum[t][v]);
  }

  template <int T, int V, bool DIRECT>
  INLINE void add_values(int64_t q, int64_t d, int64_t count, const S (*weights)[KEYS]) {
    f32x16 sum[T][V];
    UNROLLED for (int t = 0; t < T; t++)
      UNROLLED for (int v = 0; v < V; v++) sum[t][v] = load16(sums + (q + t) * wide + d + 16 * v);
    auto add = [&](int64_t i, auto value_at) {
      Vector pair[V];
      UNROLLED for (int v = 0; v < V; v++) pair[v] = value_at(d + 16 * v);
      UNROLLED for (int t = 0; t < T; t++) {
        Vector weight = L::broadcast(weights[t] + i * L::per);
        UNROLLED for (int v = 0; v < V; v++) sum[t][v] = L::accumulate(sum[t][v], pair[v], weight);
      }
    };
    const int64_t whole = count / L::per;
    for (int64_t i = 0; i < whole; i++)
      add(i, [&](int64_t at) {
        return DIRECT ? value_of(i * L::per, (i + 1) * L::per - 1, at) : L::load(values + (i * wide + at) * L::per);
      });
    // Of a last key alone: the next one is not for this row to see.
    if (count % L::per) add(whole, [&](int64_t at) { return value_of(count - 1, count - 1, at); });
    UNROLLED for (int t = 0; t < T; t++)
      UNROLLED for (int v = 0; v < V; v++) store16(sums + (q + t) * wide + d + 16 * v, sum[t][v]);
  }

  template <int T>
  void meet_tile(int64_t q, int64_t count) {
    alignas(64) float scores[T][KEYS];
    alignas(64) S weights[T][KEYS];
    int64_t j = 0, d = 0;
    for (; j + 32 < count; j += 64) scores_of<T, 4>(q, j, scores);
    for (; j < count; j += 16) scores_of<T, 1>(q, j, scores);
    for (int t = 0; t < T; t++) weigh(q + t, count, scores[t], weights[t]);
    if (direct) {
      for (; d + 64 <= dim; d += 64) add_values<T, 4, true>(q, d, count, weights);
      for (; d < wide; d += 16) add_values<T, 1, true>(q, d, count, weights);
    }
    for (; d + 64 <= wide; d += 64) add_values<T, 4, false>(q, d, count, weights);
    for (; d < wide; d += 16) add_values<T, 1, false>(q, d, count, weights);
  }
  // Queries `first` to `last` - 1 take in the block's first `count` keys.
  void meet(int64_t first, int64_t last, int64_t count) {
    int some;
    for (int64_t q = first; q < last; q += some) {
      int64_t left = last - q, tiles = (left + TILE - 1) / TILE;
      some = int((left + tiles - 1) / tiles);
      switch (some) {
        case 1: meet_tile<1>(q, count); break;
        case 2: meet_tile<2>(q, count); break;
        case 3: meet_tile<3>(q, count); break;
        case 4: meet_tile<4>(q, count); break;
        case 5: meet_tile<5>(q, count); break;
        default: meet_tile<TILE>(q, count);
      }
    }
  }
};

// `heads` query heads of one kv head, in each row of the run. `q` and `out` are their places in its first row.
template <class S>
void attend(const AttentionLayer& layer, const AttentionRows& rows, Run run, int64_t kv_head, int64_t heads, const S* q,
            int64_t q_stride, S* out, int64_t out_stride) {
  const int64_t dim = layer.head_dim, size = layer.block_size, stride = layer.kv_heads * dim, queries = run.rows * heads;
  const int64_t sequence = rows.sequence_T[run.row], own = rows.position_T[run.row], end = own + run.rows;
  const int32_t* table = rows.tables_SM + sequence * rows.table_width - rows.first_block_S[sequence];
  Walk<S> walk(layer, kv_head, queries);
  for (int64_t i = 0; i < queries; i++) {
    S* to = walk.queries + i * walk.deep;
    memcpy(to, q + i / heads * q_stride + i % heads * dim, dim * sizeof(S));
    if (dim % Lanes<S>::per) to[dim] = S{};
  }
  // Where the keys of a block are. They are asked for at once: memory has them ready when the block before is done.
  int64_t places[2][KEYS];
  auto find = [&](int64_t position, int64_t count, int64_t* place) {
    int64_t j = 0;
    for (int64_t block = position / size, offset = position % size; j < count; block++, offset = 0) {
      int64_t at = (int64_t(table[block]) * size + offset) * stride;
      for (int64_t next = smaller_of(j + size - offset, count); j < next; j++, at += stride) {
        place[j] = at;
        for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(S))) {
          __builtin_prefetch(walk.pool_k + at + d, 0, 2);
          __builtin_prefetch(walk.pool_v + at + d, 0, 2);
        }
      }
    }
    for (; j % 16; j++) place[j] = place[j - 1];  // of no weight, but of numbers
  };
  int64_t position = rows.first_T[run.row], turn = 0;
  find(position, smaller_of(end - position, KEYS), places[0]);
  for (; position < end; position += KEYS, turn ^= 1) {
    if (position + KEYS < end) find(position + KEYS, smaller_of(end - position - KEYS, KEYS), places[!turn]);
    walk.place = places[turn];
    walk.take_keys(smaller_of(end - position, KEYS));
    if (position + KEYS <= own + 1) walk.meet(0, queries, KEYS);
    else for (int64_t row = 0; row < run.rows; row++) {  // not all rows see all of these keys
      int64_t seen = smaller_of(own + row + 1 - position, KEYS);
      if (seen > 0) walk.meet(row * heads, (row + 1) * heads, seen);
    }
  }
  for (int64_t i = 0; i < queries; i++) {
    float total = sum(walk.total[i]);
    S* to = out + i / heads * out_stride + i % heads * dim;
    for (int64_t d = 0; d < dim; d += 16) store_at(to, d, dim, load16(walk.sums + i * walk.wide + d) / total);
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

// The step's rows as runs, those with most keys first: what is taken last must not be what takes longest.
struct Runs {
  Run* run;
  int64_t count;

  static int64_t keys_of(const AttentionRows& rows, int64_t row) { return rows.position_T[row] - rows.first_T[row] + 1; }
  static bool follows(const AttentionRows& rows, int64_t row) {
    return rows.sequence_T[row] == rows.sequence_T[row - 1] && rows.first_T[row] == rows.first_T[row - 1] &&
           rows.position_T[row] == rows.position_T[row - 1] + 1;
  }

  // No run is more than half of a thread's share of the keys, unless it is one row.
  Runs(const AttentionRows& rows, int64_t most_rows, int64_t kv_heads, int threads, Run* to, Run* memory) : run(to), count(0) {
    int64_t keys = 0, start[65] = {};
    for (int64_t row = 0; row < rows.rows; row++) keys += keys_of(rows, row);
    const int64_t share = keys * kv_heads / (2 * threads) + 1;
    for (int64_t row = 0, next; row < rows.rows; row = next) {
      int64_t cost = keys_of(rows, row);
      for (next = row + 1; next < rows.rows && follows(rows, next); next++) cost += keys_of(rows, next);
      int64_t parts = (next - row + most_rows - 1) / most_rows;
      if (parts < (cost + share - 1) / share) parts = (cost + share - 1) / share;
      if (parts > next - row) parts = next - row;
      for (int64_t part = 0; part < parts; part++) {
        int64_t first = row + (next - row) * part / parts;
        memory[count++] = {first, row + (next - row) * (part + 1) / parts - first};
      }
    }
    const auto bits = [&](int64_t i) { return __builtin_clzll(memory[i].rows * keys_of(rows, memory[i].row)); };
    for (int64_t i = 0; i < count; i++) start[bits(i) + 1]++;
    for (int i = 0; i < 64; i++) start[i + 1] += start[i];
    for (int64_t i = 0; i < count; i++) to[start[bits(i)]++] = memory[i];
  }
};

template <class S>
int64_t attention(const AttentionLayer& layer, const AttentionRows& rows, S* x, void* memory, int threads) {
  const int64_t tokens = rows.rows, hidden = layer.hidden, dim = layer.head_dim;
  const int64_t width = (layer.heads + 2 * layer.kv_heads) * dim, out_width = layer.heads * dim;
  Scratch scratch(memory);
  Queue* queue = scratch.take<Queue>(1);
  S* normed = scratch.take<S>(tokens * hidden);
  S* qkv = scratch.take<S>(tokens * width);
  S* out = scratch.take<S>(tokens * out_width);
  Run* memory_R = scratch.take<Run>(2 * tokens);
  if (!memory) return scratch.used;
  const int64_t group = layer.heads / layer.kv_heads, heads = smaller_of(group, QUERIES);
  const Runs runs(rows, QUERIES / heads, layer.kv_heads, threads, memory_R, memory_R + tokens);
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
    const int64_t items = runs.count * layer.kv_heads;
    for (int64_t item; (item = queue->take(1)) < items;) {
      Run run = runs.run[item / layer.kv_heads];
      int64_t kv_head = item % layer.kv_heads;
      for (int64_t done = 0; done < group; done += heads) {
        int64_t some = smaller_of(heads, group - done), at = (kv_head * group + done) * dim;
        attend<S>(layer, rows, run, kv_head, some, qkv + run.row * width + at, width, out + run.row * out_width + at, out_width);
      }
    }
    team.wait();
    linear<S>(team, tokens, out, static_cast<const S*>(layer.out), static_cast<const S*>(layer.out_bias), hidden, out_width, x, x);
  });
  return 0;
}
