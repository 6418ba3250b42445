// Products of float by panels: the weights of two vectors of outputs, input by input, so that few
// tokens read them once and in order.

#pragma once

#include <algorithm>

#include "numbers.h"

constexpr i64 PANEL = 2 * LANES;  // outputs
#if defined(__AVX2__) && defined(__FMA__)
constexpr bool HAS_PANELS = true;
#else
constexpr bool HAS_PANELS = false;  // elsewhere torch's products are faster
#endif
#ifdef __AVX512F__
constexpr int TOKENS = 14;  // multiplied at once: as many as there are registers for their sums
#else
constexpr int TOKENS = 6;
#endif

// What is multiplied by what: x [n, width] by weight [outputs / PANEL][width][PANEL], padded to whole
// panels as bias is. One panel for some tokens is one block.
struct Block {
    const float *x, *panel, *bias;
    float* out;
    i64 width, outputs, stride;  // outputs of this panel; numbers between two tokens' outputs
    const float* next;  // what to fetch meanwhile,
    i64 step;  // and how many numbers of it for each input
};

// Each sum goes over inputs in their order, whatever N is: a token's bits are its own.
template <int N>
static void multiply(const Block& b) {
    constexpr i64 SOON = 512;  // numbers ahead; a twentieth slower without, up to twice without both
    vec low[N] = {}, high[N] = {};
    const float *panel = b.panel, *next = b.next;
    for (i64 d = 0; d < b.width; d++, panel += PANEL, next += b.step) {
        __builtin_prefetch(panel + SOON);
        __builtin_prefetch(panel + SOON + LANES);
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + b.step / 2, 0, 2);
        const vec first = load(panel), second = load(panel + LANES);
        for (int i = 0; i < N; i++) {
            const vec x = all(b.x[i * b.width + d]);
            low[i] = fused(x, first, low[i]);
            high[i] = fused(x, second, high[i]);
        }
    }
    for (int i = 0; i < N; i++) {
        const vec sums[] = {low[i] + load(b.bias), high[i] + load(b.bias + LANES)};
        float* out = b.out + i * b.stride;
        for (i64 half = 0; half < 2; half++) {
            const i64 left = b.outputs - half * LANES;
            if (left >= LANES) {
                store(out + half * LANES, sums[half]);
            } else if (left > 0) {
                store(out + half * LANES, sums[half], left);
            }
        }
    }
}

template <int N = TOKENS>
static void multiply(int n, const Block& b) {
    if constexpr (N > 0) n == N ? multiply<N>(b) : multiply<N - 1>(n, b);
}

// out [n, outputs] = x [n, width] W^T + bias, W packed as `Block` says. While a panel is multiplied,
// the next one is fetched by the first one or two of its blocks.
static void panel_product(const float* x, const float* weight, const float* bias, float* out, i64 n,
                          i64 width, i64 outputs) {
    const i64 panels = (outputs + PANEL - 1) / PANEL, blocks = (n + TOKENS - 1) / TOKENS;
    const i64 parts = parts_of(panels, blocks);
#pragma omp parallel for
    for (i64 item = 0; item < panels * parts; item++) {
        const i64 first = item / parts * PANEL, part = item % parts;
        const i64 begin = blocks * part / parts, end = blocks * (part + 1) / parts;
        const float *panel = weight + first * width, *next = panel + PANEL * width;
        const i64 step = PANEL / std::min(end - begin, i64{2});
        for (i64 i = begin; i < end; i++) {
            const i64 token = n * i / blocks, after = n * (i + 1) / blocks, turn = i - begin;
            multiply(after - token, {x + token * width, panel, bias + first,
                                     out + token * outputs + first, width,
                                     std::min(PANEL, outputs - first), outputs,
                                     turn < 2 ? next + turn * step * width : panel,
                                     turn < 2 ? step : 0});
        }
    }
}
