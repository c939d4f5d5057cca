// Vectors of 16 floats, the two element types, and the one product everything is made of: rows by rows.
//
// For any processor GCC knows: its vector extensions, which the compiler splits where the machine's registers are narrower.
// Where AVX-512 has bfloat16 dot products they are used; elsewhere bfloat16 is widened, which is exact.
//
// Every output is one sum over K in one fixed order, whatever the number of rows that are computed beside it: results do
// not depend on the batch.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));

#define LANES16 (i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})

struct bf16 {
  uint16_t bits;
};

#define INLINE inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

template <class To, class From>
INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- one element ---------------------------------------------------------------------------------------------------

INLINE float widen(float value) { return value; }
INLINE float widen(bf16 value) { return bits_of<float>(uint32_t(value.bits) << 16); }
INLINE void narrow(float value, float& to) { to = value; }
INLINE void narrow(float value, bf16& to) {  // to nearest, ties to even
  uint32_t bits = bits_of<uint32_t>(value);
  to.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
template <class S>
INLINE float rounded(float value) {
  S stored;
  narrow(value, stored);
  return widen(stored);
}

// ---- sixteen elements ----------------------------------------------------------------------------------------------

INLINE f32x16 all(float value) { return value - f32x16{}; }
INLINE f32x16 load16(const float* from) {
  f32x16 value;
  memcpy(&value, from, sizeof(value));
  return value;
}
INLINE f32x16 load16(const bf16* from) {
  u16x16 bits;
  memcpy(&bits, from, sizeof(bits));
  return bits_of<f32x16>(__builtin_convertvector(bits, u32x16) << 16);
}
INLINE void store16(float* to, f32x16 value) { memcpy(to, &value, sizeof(value)); }
INLINE void store16(bf16* to, f32x16 value) {
  u32x16 bits = bits_of<u32x16>(value);
  u16x16 narrowed = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16x16);
  memcpy(to, &narrowed, sizeof(narrowed));
}
template <class S>
INLINE f32x16 load_some(const S* from, int64_t count) {  // the first `count` of 16, the rest 0
  S some[16] = {};
  memcpy(some, from, count * sizeof(S));
  return load16(some);
}
template <class S>
INLINE void store_some(S* to, f32x16 value, int64_t count) {
  S some[16];
  store16(some, value);
  memcpy(to, some, count * sizeof(S));
}
// for (i of 16 elements each, the last ones fewer) { load(…), store(…) }
template <class S>
INLINE f32x16 load_at(const S* from, int64_t i, int64_t n) {
  return i + 16 <= n ? load16(from + i) : load_some(from + i, n - i);
}
template <class S>
INLINE void store_at(S* to, int64_t i, int64_t n, f32x16 value) {
  if (i + 16 <= n)
    store16(to + i, value);
  else
    store_some(to + i, value, n - i);
}
INLINE f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }
INLINE f32x16 smaller(f32x16 a, f32x16 b) { return a < b ? a : b; }
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
INLINE float sum(f32x16 v) {
  f32x8 half[2];
  memcpy(half, &v, sizeof(half));
  f32x4 quarter[2];
  f32x8 eight = half[0] + half[1];
  memcpy(quarter, &eight, sizeof(quarter));
  f32x4 four = quarter[0] + quarter[1];
  return (four[0] + four[1]) + (four[2] + four[3]);
}
INLINE float largest(f32x16 v) {
  f32x8 half[2];
  memcpy(half, &v, sizeof(half));
  f32x4 quarter[2];
  f32x8 eight = half[0] > half[1] ? half[0] : half[1];
  memcpy(quarter, &eight, sizeof(quarter));
  f32x4 four = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
  float a = four[0] > four[1] ? four[0] : four[1], b = four[2] > four[3] ? four[2] : four[3];
  return a > b ? a : b;
}

// e^x within 2 ulp: 2^n · e^r with |r| ≤ ln 2 / 2 and a polynomial for e^r (coefficients as in Cephes' expf).
INLINE f32x16 exp16(f32x16 x) {
  x = smaller(larger(x, all(-87.3f)), all(88.3f));
  const f32x16 shift = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  f32x16 n = (x * 1.44269504088896341f + shift) - shift;
  f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  i32x16 exponent = __builtin_convertvector(n, i32x16) << 23;
  return bits_of<f32x16>(bits_of<i32x16>(p) + exponent);
}

// 2^x for x ≤ 0, within 2 ulp of the largest; 0 from -127 down. Its exponent is taken from where the rounding left it.
INLINE f32x16 power2(f32x16 x) {
  const f32x16 shift = all(12582912.0f), least = all(-127.0f);
  x = x > least ? x : least;
  f32x16 n = x + shift;
  f32x16 r = x - (n - shift);
  f32x16 p = all(1.326472615e-3f);
  p = p * r + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  return bits_of<f32x16>(bits_of<i32x16>(p) + (bits_of<i32x16>(n) << 23));
}

// ---- rows by rows --------------------------------------------------------------------------------------------------

// Elements of one vector, and accumulate(sum, a, b): sum += a · b, element by element: `per` neighbours go into one sum.
// broadcast: the `per` elements at a place, everywhere. narrowed: a Vector from `per` of float32.
// side_by_side: elements i to i + 15 of n of `per` rows, neighbour by neighbour.
template <class S>
struct Lanes;

template <>
struct Lanes<float> {
  enum { count = 16, per = 1 };
  typedef f32x16 Vector;
  static INLINE Vector load(const float* from) { return load16(from); }
  static INLINE Vector broadcast(const float* from) { return all(*from); }
  static INLINE Vector narrowed(const f32x16* from) { return *from; }
  static INLINE Vector side_by_side(const float* a, const float*, int64_t i, int64_t n) { return load_at(a, i, n); }
  static INLINE Vector load_some(const float* from, int64_t n) { return ::load_some(from, n); }
  static INLINE f32x16 accumulate(f32x16 sum, Vector a, Vector b) { return sum + a * b; }
};

template <>
struct Lanes<bf16> {
  enum { count = 32, per = 2 };
#if defined(__AVX512BF16__)
  typedef __m512bh Vector;
  static INLINE Vector load(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static INLINE Vector narrowed(const f32x16* from) {
    return _mm512_cvtne2ps_pbh((__m512)from[1], (__m512)from[0]);
  }
  static INLINE Vector broadcast(const bf16* from) { return (__m512bh)_mm512_set1_epi32(bits_of<int32_t>(pair_at(from))); }
  static INLINE f32x16 accumulate(f32x16 sum, Vector a, Vector b) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
#else
  typedef u32x16 Vector;
  static INLINE Vector load(const bf16* from) {
    Vector value;
    memcpy(&value, from, sizeof(value));
    return value;
  }
  static INLINE Vector narrowed(const f32x16* from) {
    bf16 some[32];
    store16(some, from[0]);
    store16(some + 16, from[1]);
    return load(some);
  }
  static INLINE Vector broadcast(const bf16* from) { return pair_at(from) - Vector{}; }
  static INLINE f32x16 low(Vector v) { return bits_of<f32x16>(v << 16); }
  static INLINE f32x16 high(Vector v) { return bits_of<f32x16>(v & 0xffff0000u); }
  static INLINE f32x16 accumulate(f32x16 sum, Vector a, Vector b) { return sum + low(a) * low(b) + high(a) * high(b); }
#endif
  static INLINE Vector load_some(const bf16* from, int64_t n) {
    bf16 some[32] = {};
    memcpy(some, from, n * sizeof(bf16));
    return load(some);
  }
  static INLINE uint32_t pair_at(const bf16* from) {
    uint32_t pair;
    memcpy(&pair, from, sizeof(pair));
    return pair;
  }
  static INLINE Vector side_by_side(const bf16* a, const bf16* b, int64_t i, int64_t n) {
#if defined(__AVX512BF16__)
    if (i + 16 <= n) {
      const __m512i places = (__m512i)(LANES16 * 0x10001 + (32 << 16));
      __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(a + i)));
      __m512i high = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(b + i)));
      return (Vector)_mm512_permutex2var_epi16(low, places, high);
    }
#endif
    return bits_of<Vector>(bits_of<u32x16>(load_at(a, i, n)) >> 16 | bits_of<u32x16>(load_at(b, i, n)));
  }
};

// The sums of four vectors. All four take the same order of additions.
INLINE void sum4(f32x16 a, f32x16 b, f32x16 c, f32x16 d, float* to) {
#define LOW32 (i32x16{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29})
#define HIGH32 (i32x16{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31})
#define LOW64 (i32x16{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29})
#define HIGH64 (i32x16{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31})
#define SHUFFLE(x, y, m) __builtin_shuffle(x, y, m)
  f32x16 ab = SHUFFLE(a, b, LOW32) + SHUFFLE(a, b, HIGH32);
  f32x16 cd = SHUFFLE(c, d, LOW32) + SHUFFLE(c, d, HIGH32);
  f32x16 abcd = SHUFFLE(ab, cd, LOW64) + SHUFFLE(ab, cd, HIGH64);
  f32x4 part[4];
  memcpy(part, &abcd, sizeof(part));
  f32x4 total = (part[0] + part[1]) + (part[2] + part[3]);
  memcpy(to, &total, sizeof(total));
}

// to: the 16 columns of row(0) to row(15).
template <class Row, class S>
INLINE void transpose16(Row row, S* to) {
#define EVEN128 (i32x16{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27})
#define ODD128 (i32x16{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31})
  f32x16 by2[16], by4[16], columns[16];
  UNROLLED for (int i = 0; i < 16; i += 2) {
    f32x16 a = row(i), b = row(i + 1);
    by2[i] = SHUFFLE(a, b, LOW32);
    by2[i + 1] = SHUFFLE(a, b, HIGH32);
  }
  UNROLLED for (int i = 0; i < 16; i += 4)
    UNROLLED for (int half = 0; half < 2; half++) {
      by4[i + 2 * half] = SHUFFLE(by2[i + half], by2[i + half + 2], LOW64);
      by4[i + 2 * half + 1] = SHUFFLE(by2[i + half], by2[i + half + 2], HIGH64);
    }
  UNROLLED for (int i = 0; i < 4; i++) {  // four columns each in quarters 0 to 3
    f32x16 even[2], odd[2];
    UNROLLED for (int half = 0; half < 2; half++) {
      even[half] = SHUFFLE(by4[i + 8 * half], by4[i + 8 * half + 4], EVEN128);
      odd[half] = SHUFFLE(by4[i + 8 * half], by4[i + 8 * half + 4], ODD128);
    }
    columns[i] = SHUFFLE(even[0], even[1], EVEN128);
    columns[i + 4] = SHUFFLE(odd[0], odd[1], EVEN128);
    columns[i + 8] = SHUFFLE(even[0], even[1], ODD128);
    columns[i + 12] = SHUFFLE(odd[0], odd[1], ODD128);
  }
  UNROLLED for (int i = 0; i < 16; i++) memcpy(reinterpret_cast<char*>(to) + 64 * i, &columns[i], 64);
}

// out[t][r] = Σ_k x[t][k] · w[r · stride + k] for T rows of x and four of w.
// AHEAD: the four rows lie in one run of memory; ask for what lies `ahead` bytes behind them. Four rows side by side are
// four short streams, which no hardware prefetcher follows (11 GB/s a core against 31).
template <int T, bool AHEAD, class S>
INLINE void rows_by_4(const S* const* x, const S* w, int64_t stride, int64_t k_size, float (*out)[4], int64_t ahead = 0) {
  typedef Lanes<S> L;
  f32x16 sums[T][4];
  UNROLLED for (int t = 0; t < T; t++)
    UNROLLED for (int r = 0; r < 4; r++) sums[t][r] = f32x16{};
  int64_t k = 0;
  for (; k + L::count <= k_size; k += L::count) {
    typename L::Vector rows[4];
    UNROLLED for (int r = 0; r < 4; r++) rows[r] = L::load(w + r * stride + k);
    if (AHEAD)
      for (int line = 0; line < 4; line++)
        __builtin_prefetch(reinterpret_cast<const char*>(w + 4 * k) + ahead + 64 * line, 0, 2);
    UNROLLED for (int t = 0; t < T; t++) {
      typename L::Vector row = L::load(x[t] + k);
      UNROLLED for (int r = 0; r < 4; r++) sums[t][r] = L::accumulate(sums[t][r], rows[r], row);
    }
  }
  if (k < k_size) {
    typename L::Vector rows[4];
    UNROLLED for (int r = 0; r < 4; r++) rows[r] = L::load_some(w + r * stride + k, k_size - k);
    UNROLLED for (int t = 0; t < T; t++) {
      typename L::Vector row = L::load_some(x[t] + k, k_size - k);
      UNROLLED for (int r = 0; r < 4; r++) sums[t][r] = L::accumulate(sums[t][r], rows[r], row);
    }
  }
  UNROLLED for (int t = 0; t < T; t++) sum4(sums[t][0], sums[t][1], sums[t][2], sums[t][3], out[t]);
}

template <int T, class S>
INLINE void rows_by_1(const S* const* x, const S* w, int64_t k_size, float (*out)[4]) {
  typedef Lanes<S> L;
  f32x16 sums[T];
  for (int t = 0; t < T; t++) sums[t] = f32x16{};
  for (int64_t k = 0; k < k_size; k += L::count) {
    bool whole = k + L::count <= k_size;
    typename L::Vector row = whole ? L::load(w + k) : L::load_some(w + k, k_size - k);
    for (int t = 0; t < T; t++) {
      typename L::Vector other = whole ? L::load(x[t] + k) : L::load_some(x[t] + k, k_size - k);
      sums[t] = L::accumulate(sums[t], row, other);
    }
  }
  for (int t = 0; t < T; t++) {
    float four[4];
    sum4(sums[t], f32x16{}, f32x16{}, f32x16{}, four);
    out[t][0] = four[0];
  }
}
