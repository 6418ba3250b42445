// Numbers of two kinds, float and bfloat16, one by one and in vectors.
//
// Sums are written with vectors, and fused multiply-adds by name: left to the compiler
// (-ffp-contract), they come and go with the number of queries in a loop, and with them a token's
// bits.

#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

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

// e^x within 2 ulp for x in [-87, 88], clamped outside; Cephes' polynomial. Free of branches and
// calls, so that loops over it become vector code.
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = std::floor(x * 1.44269504088896341f + 0.5f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

// Below so many numbers a loop is over before other threads have woken up.
static constexpr i64 SERIAL = 16384;

#ifdef __AVX512F__
constexpr int LANES = 16, QUERIES = 4;  // QUERIES: as many as there are registers for
#else
constexpr int LANES = 8, QUERIES = 2;
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t vec_u32 __attribute__((vector_size(LANES * 4)));
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
