// Dense products: rows of x [T, K] by rows of weights [N, K].
//
// Sixteen weight rows stay in the nearest cache while all tokens pass, four at a time; with few tokens each weight is read
// once, in the order it lies in memory, which is all that such a product can do.
#pragma once
#include "vectors.h"

enum { ROW_BLOCK = 64, CACHED_ROWS = 16, TILE = 6 };  // TILE tokens by 4 rows: 24 sums in 32 registers

template <bool AHEAD, class S>
INLINE void tile_of(int tokens, const S* const* x, const S* w, int64_t k_size, float (*out)[4], int64_t ahead) {
  switch (tokens) {
    case 1: rows_by_4<1, AHEAD>(x, w, k_size, k_size, out, ahead); break;
    case 2: rows_by_4<2, AHEAD>(x, w, k_size, k_size, out, ahead); break;
    case 3: rows_by_4<3, AHEAD>(x, w, k_size, k_size, out, ahead); break;
    case 4: rows_by_4<4, AHEAD>(x, w, k_size, k_size, out, ahead); break;
    case 5: rows_by_4<5, AHEAD>(x, w, k_size, k_size, out, ahead); break;
    default: rows_by_4<TILE, AHEAD>(x, w, k_size, k_size, out, ahead);
  }
}
template <class S>
void tile(int tokens, const S* const* x, const S* w, int64_t k_size, float (*out)[4], int64_t ahead) {
  if (ahead)
    tile_of<true>(tokens, x, w, k_size, out, ahead);
  else
    tile_of<false>(tokens, x, w, k_size, out, 0);
}

// For tokens `first` to `last` - 1 and weight rows `n0` to `n1` - 1: emit(token, row, count, sums).
// rows_of(t): where token t's row begins.
template <class S, class RowsOf, class Emit>
INLINE void product(int64_t first, int64_t last, RowsOf rows_of, const S* w, int64_t n0, int64_t n1, int64_t k_size, Emit emit) {
  const int64_t passes = (last - first + TILE - 1) / TILE;
  const int64_t ahead = passes == 1 ? 8192 : CACHED_ROWS * k_size * int64_t(sizeof(S));
  for (int64_t block = n0; block < n1; block += CACHED_ROWS) {
    int64_t block_end = block + CACHED_ROWS < n1 ? block + CACHED_ROWS : n1;
    int some;
    int64_t pass = 0;
    for (int64_t t = first; t < last; t += some, pass++) {
      const S* x[TILE];
      float out[TILE][4];
      int64_t left = last - t, tiles = (left + TILE - 1) / TILE;
      some = int((left + tiles - 1) / tiles);  // 8 tokens as 4 and 4, not as 6 and 2
      for (int i = 0; i < some; i++) x[i] = rows_of(t + i);
      int64_t n = block;
      for (; n + 4 <= block_end; n += 4) {
        const S* rows = w + n * k_size;
        // Each pass over the block asks for its part of the next one, so that memory never rests.
        tile(some, x, rows, k_size, out, (n - block) / 4 % passes == pass ? ahead : 0);
        for (int i = 0; i < some; i++) emit(t + i, n, 4, out[i]);
      }
      for (; n < block_end; n++)
        for (int i = 0; i < some; i++) {
          rows_by_1<1>(x + i, w + n * k_size, k_size, out);
          emit(t + i, n, 1, out[0]);
        }
    }
  }
}

// weight · round(x · rsqrt(mean(x²) + eps)): rounded to the type before the weight, as Llama 4 does.
template <class S>
INLINE void rms_norm_row(const S* x, const S* weight, float eps, int64_t n, S* to) {
  f32x16 squares = {};
  for (int64_t i = 0; i < n; i += 16) {
    f32x16 v = load_at(x, i, n);
    squares += v * v;
  }
  float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(n) + eps);
  for (int64_t i = 0; i < n; i += 16) {
    S stored[16];
    store16(stored, load_at(x, i, n) * scale);
    f32x16 normed = load16(stored);
    store_at(to, i, n, weight ? normed * load_at(weight, i, n) : normed);
  }
}

INLINE f32x16 silu(f32x16 x) { return x / (1.0f + exp16(-x)); }

// to = silu(gate) · up, rounded to the type where a model in that type rounds.
template <class S>
INLINE void swiglu_row(const S* gate_up, int64_t inner, S* to) {
  for (int64_t i = 0; i < inner; i += 16) {
    S stored[16];
    store16(stored, silu(load_at(gate_up, i, inner)));
    store_at(to, i, inner, load16(stored) * load_at(gate_up + inner, i, inner));
  }
}
