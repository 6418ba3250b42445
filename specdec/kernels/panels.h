// Products by panels: the weights of two vectors of outputs, step by step, so that few tokens read them
// once and in order. A step is one input; of bytes it is two, which one instruction multiplies and adds.

#pragma once

#include <algorithm>
#include <memory>

#include "numbers.h"

constexpr i64 PANEL = 2 * LANES;  // outputs
#if defined(__AVX2__) && defined(__FMA__)
constexpr bool HAS_PANELS = true;
#else
constexpr bool HAS_PANELS = false;  // elsewhere torch's products are faster
#endif
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
constexpr bool HAS_BYTE_PANELS = true;
#else
constexpr bool HAS_BYTE_PANELS = false;
#endif
#ifdef __AVX512F__
constexpr int TOKENS = 14;  // multiplied at once: as many as there are registers for their sums
#else
constexpr int TOKENS = 6;
#endif

// Inputs of a step.
template <typename W>
constexpr i64 STEP_INPUTS = sizeof(W) == 1 ? 2 : 1;

// A step of float: its input for all outputs, its weights, and what they add to sums.
static inline vec in_all(const float* x) { return all(*x); }
static inline vec weights_at(const float* from) { return load(from); }
static inline vec plus_product(vec sums, vec x, vec weights) { return fused(x, weights, sums); }

// A step of bytes, widened to 16 bits: sums are of 32 bits, and exact.
static inline vec_i32 in_all(const int16_t* x) {
    int32_t both;
    std::memcpy(&both, x, sizeof both);
    return both - vec_i32{};
}
#if defined(__AVX512BW__)
static inline vec_i32 weights_at(const int8_t* from) {
    return (vec_i32)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
static inline vec_i32 plus_product(vec_i32 sums, vec_i32 x, vec_i32 weights) {
#ifdef __AVX512VNNI__
    return (vec_i32)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)x, (__m512i)weights);
#else
    return sums + (vec_i32)_mm512_madd_epi16((__m512i)x, (__m512i)weights);
#endif
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
static inline vec_i32 weights_at(const int8_t* from) {
    return (vec_i32)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
static inline vec_i32 plus_product(vec_i32 sums, vec_i32 x, vec_i32 weights) {
    return sums + (vec_i32)_mm256_madd_epi16((__m256i)x, (__m256i)weights);
}
#endif

// Keeps the compiler from beginning with the products of all tokens, for which it lacks registers.
template <typename V>
static inline void in_order(V& low, V& high) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(low), "+v"(high));
#elif defined(__AVX2__)
    asm volatile("" : "+x"(low), "+x"(high));
#endif
}

// What is multiplied by what: x [n, width], width whole steps, by weights [outputs / PANEL][steps]
// [PANEL][inputs of a step], padded to whole panels as scales and bias are. One panel for some tokens
// is one block.
template <typename X, typename W, typename T>
struct Block {
    const X* x;
    const W* panel;
    const float *scales, *bias, *units;  // scales of outputs and units of tokens are for bytes
    T* out;
    i64 width, outputs, stride;  // outputs of this panel; numbers between two tokens' outputs
    const W* next;               // what to fetch meanwhile,
    i64 ahead;                   // and how many numbers of it in each step

    vec result(vec sums, i64, i64 output) const { return sums + load(bias + output); }
    vec result(vec_i32 sums, i64 token, i64 output) const {
        const vec y = __builtin_convertvector(sums, vec) * load(scales + output) * units[token];
        return y + load(bias + output);
    }
};

// Each sum goes over inputs in their order, whatever N is: a token's bits are its own.
template <int N, typename X, typename W, typename T>
static void multiply(const Block<X, W, T>& b) {
    constexpr i64 INPUTS = STEP_INPUTS<W>, STEP = INPUTS * PANEL;   // a step's inputs, and weights
    constexpr i64 LINES = std::max<i64>(STEP * sizeof(W) / 64, 1);  // of the cache, in a step
    constexpr i64 SOON = 2048 / sizeof(W);  // a twentieth slower without, up to twice without both
    decltype(in_all(b.x)) low[N] = {}, high[N] = {};
    const W *panel = b.panel, *next = b.next;
    for (i64 d = 0; d < b.width; d += INPUTS, panel += STEP, next += b.ahead) {
        for (i64 line = 0; line < LINES; line++) {
            __builtin_prefetch(panel + SOON + line * STEP / LINES);
            __builtin_prefetch(next + line * b.ahead / LINES, 0, 2);
        }
        const auto first = weights_at(panel), second = weights_at(panel + STEP / 2);
        for (int i = 0; i < N; i++) {
            const auto x = in_all(b.x + i * b.width + d);
            auto one = plus_product(low[i], x, first), other = plus_product(high[i], x, second);
            in_order(one, other);
            low[i] = one, high[i] = other;
        }
    }
    for (int i = 0; i < N; i++) {
        T* out = b.out + i * b.stride;
        for (i64 half = 0; half < 2; half++) {
            const vec y = b.result(half ? high[i] : low[i], i, half * LANES);
            const i64 left = b.outputs - half * LANES;
            if (left >= LANES) {
                store(out + half * LANES, y);
            } else if (left > 0) {
                store(out + half * LANES, y, left);
            }
        }
    }
}

template <int N = TOKENS, typename B>
static void multiply_some(int n, const B& b) {
    if constexpr (N > 0) n == N ? multiply<N>(b) : multiply_some<N - 1>(n, b);
}

// out [n, outputs] = x [n, width] W^T + bias, packed as `Block` says. While a panel is multiplied, the
// next one is fetched by the first one or two of its blocks.
template <typename X, typename W, typename T>
static void panel_product(const X* x, const W* weight, const float* scales, const float* bias,
                          const float* units, T* out, i64 n, i64 width, i64 outputs) {
    const i64 panels = (outputs + PANEL - 1) / PANEL, blocks = (n + TOKENS - 1) / TOKENS;
    const i64 parts = parts_of(panels, blocks), steps = width / STEP_INPUTS<W>;
#pragma omp parallel for
    for (i64 item = 0; item < panels * parts; item++) {
        const i64 first = item / parts * PANEL, part = item % parts;
        const i64 begin = blocks * part / parts, end = blocks * (part + 1) / parts;
        const W *panel = weight + first * width, *next = panel + PANEL * width;
        const i64 ahead = PANEL * STEP_INPUTS<W> / std::min(end - begin, i64{2});
        for (i64 i = begin; i < end; i++) {
            const i64 token = n * i / blocks, after = n * (i + 1) / blocks, turn = i - begin;
            multiply_some(after - token,
                          Block<X, W, T>{x + token * width, panel, scales + first, bias + first,
                                         units + token, out + token * outputs + first, width,
                                         std::min(PANEL, outputs - first), outputs,
                                         turn < 2 ? next + turn * ahead * steps : panel,
                                         turn < 2 ? ahead : 0});
        }
    }
}

// The same of float, whose blocks read neither scales nor units.
static void panel_product(const float* x, const float* weight, const float* bias, float* out, i64 n,
                          i64 width, i64 outputs) {
    panel_product(x, weight, bias, bias, x, out, n, width, outputs);
}

// The same of bytes. Each row of x [n, inputs] is rounded to as many steps of its largest magnitude as
// 16 bits hold, and sums of 32 can take. One that is not finite gives NaN.
template <typename T>
static void byte_panel_product(const T* x, const int8_t* weight, const float* scales,
                               const float* bias, T* out, i64 n, i64 inputs, i64 outputs) {
    const i64 width = (inputs + 1) / 2 * 2;
    const auto levels = static_cast<float>(std::min<i64>(INT16_MAX, INT32_MAX / (INT8_MAX * width)));
    const std::unique_ptr<int16_t[]> rounded(new int16_t[n * width]);
    const std::unique_ptr<float[]> units(new float[n]);
#pragma omp parallel for if (n * width > SERIAL)
    for (i64 i = 0; i < n; i++) {
        int16_t* to = rounded.get() + i * width;
        const Rounding rounding(levels, x + i * inputs, inputs);
        rounding.round(x + i * inputs, to, inputs);
        units[i] = rounding.unit;
        if (width > inputs) to[inputs] = 0;
    }
    if constexpr (HAS_BYTE_PANELS) {
        panel_product(rounded.get(), weight, scales, bias, units.get(), out, n, width, outputs);
    }
}
