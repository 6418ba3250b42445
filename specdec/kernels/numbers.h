// Numbers of two kinds, float and bfloat16, one by one and in vectors.
//
// Sums are written with vectors, and fused multiply-adds by name: left to the compiler
// (-ffp-contract), they come and go with the number of queries in a loop, and with them a token's
// bits.

#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using i64 = int64_t;

struct bf16 {
    uint16_t bits;
};

static inline float get(float x) { return x; }

static inline float get(bf16 x) {
    uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}

static inline void put(float* to, float x) { *to = x; }

static inline void put(bf16* to, float x) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    to->bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// Below so many numbers a loop is over before other threads have woken up.
static constexpr i64 SERIAL = 16384;

// Into how many parts the blocks of tokens of a product go for each panel of outputs, so that there
// is work for all threads.
static inline i64 parts_of(i64 panels, i64 blocks) {
    return std::min(blocks, std::max<i64>(4 * omp_get_max_threads() / panels, 1));
}

#ifdef __AVX512F__
constexpr int LANES = 16, SUMS = 24;  // SUMS: vectors of them that a loop has registers for
#else
constexpr int LANES = 8, SUMS = 12;
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t vec_u32 __attribute__((vector_size(LANES * 4)));
typedef int32_t vec_i32 __attribute__((vector_size(LANES * 4)));
typedef uint16_t vec_u16 __attribute__((vector_size(LANES * 2)));

static inline vec load(const float* from) {
    vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

static inline vec load(const bf16* from) {
    vec_u16 x;
    std::memcpy(&x, from, sizeof x);
    return reinterpret_cast<vec>(__builtin_convertvector(x, vec_u32) << 16);
}

static inline void store(float* to, vec x) { std::memcpy(to, &x, sizeof x); }

static inline void store(bf16* to, vec x) {  // as `put`
    const vec_u32 wide = reinterpret_cast<vec_u32>(x);
    const vec_u32 near = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    const vec_u16 bits = __builtin_convertvector(near, vec_u16);
    std::memcpy(to, &bits, sizeof bits);
}

// The first n < LANES numbers, with `rest` behind them.
template <typename T>
static inline vec load(const T* from, i64 n, float rest) {
    T lanes[LANES];
    for (T& lane : lanes) put(&lane, rest);
    std::memcpy(lanes, from, n * sizeof(T));
    return load(lanes);
}

template <typename T>
static inline void store(T* to, vec x, i64 n) {
    T lanes[LANES];
    store(lanes, x);
    std::memcpy(to, lanes, n * sizeof(T));
}

// x = f(x) for n numbers.
template <typename F>
static inline void transform(float* x, i64 n, F f) {
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) store(x + i, f(load(x + i)));
    if (i < n) store(x + i, f(load(x + i, n - i, 0.0f)), n - i);
}

static inline float total(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(x);
#endif
    float lanes[LANES];
    std::memcpy(lanes, &x, sizeof x);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

static inline vec_i32 lane_numbers() {
    vec_i32 x;
    for (int i = 0; i < LANES; i++) x[i] = i;
    return x;
}

static const vec_i32 LANE_NUMBERS = lane_numbers();

static inline vec all(float x) { return x - vec{}; }

// a * b + c
static inline vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x within 2 ulp for x in [-87, 88], clamped outside; Cephes' polynomial. Written with vectors: of
// a scalar one the compiler makes loops that take eight times as long.
static inline vec exp_(vec x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
    const vec n = (x * 1.44269504088896341f + round) - round;
    const vec r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
    vec p = all(1.9875691500e-4f);
    p = fused(p, r, all(1.3981999507e-3f));
    p = fused(p, r, all(8.3334519073e-3f));
    p = fused(p, r, all(4.1665795894e-2f));
    p = fused(p, r, all(1.6666665459e-1f));
    p = fused(p, r, all(5.0000001201e-1f));
    p = fused(p, r * r, r + 1.0f);
    const vec_i32 power = (__builtin_convertvector(n, vec_i32) + 127) << 23;
    return p * reinterpret_cast<vec>(power);
}

// x ^ x >> bits
template <int BITS>
static inline vec_u32 mixed(vec_u32 x) {
    return x ^ (x >> BITS);
}

static inline bool any(vec_i32 flags) {
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= flags[i];
    return found;
}

static inline float sum(const float* x, i64 n) {
    vec lanes = {};
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) lanes += load(x + i);
    float result = total(lanes);
    for (; i < n; i++) result += x[i];
    return result;
}

static inline float sum_of_squares(const float* x, i64 n) {
    vec lanes = {};
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) lanes = fused(load(x + i), load(x + i), lanes);
    float result = total(lanes);
    for (; i < n; i++) result += x[i] * x[i];
    return result;
}

// How numbers are rounded to whole steps: how many steps 1 is, and what a step is worth.
struct Rounding {
    float steps, unit;

    // As many steps of the largest magnitude of x [n], which is at least 1e-12, as `levels`; a step is
    // worth NaN if x is not finite.
    template <typename T>
    Rounding(float levels, const T* x, i64 n) {
        float most = 1e-12f, poison = 0;
#pragma omp simd reduction(max : most) reduction(+ : poison)
        for (i64 d = 0; d < n; d++) {
            const float size = std::fabs(get(x[d]));
            most = size > most ? size : most;
            poison += size * 0.0f;
        }
        steps = levels / most;
        unit = most / levels + poison;
    }

    template <typename T, typename I>
    void round(const T* x, I* out, i64 n) const {
#pragma omp simd
        for (i64 d = 0; d < n; d++) {
            out[d] = static_cast<I>(static_cast<int32_t>(std::nearbyint(get(x[d]) * steps)));
        }
    }
};
