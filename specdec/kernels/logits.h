// A first look at logits: the likeliest token, and what the softmax says of a token.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "numbers.h"

template <typename T>
static inline float largest(const T* x, i64 n) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (i64 d = 0; d < n; d++) {
        const float here = get(x[d]);
        most = here > most ? here : most;
    }
    return most;
}

// As `largest`, and whether any of them is NaN, which no comparison finds.
template <typename T>
static inline float largest(const T* x, i64 n, bool& odd) {
    float most = -INFINITY;
    int unequal = 0;
#pragma omp simd reduction(max : most) reduction(| : unequal)
    for (i64 d = 0; d < n; d++) {
        const float here = get(x[d]);
        most = here > most ? here : most;
        unequal |= here != here;
    }
    odd = odd || unequal;
    return most;
}

// at [n] = where the largest of each row of x [n, width] stands, the first if it stands twice; -1 if
// it is infinite or one of them is NaN. Rows begin `stride` numbers apart: a vocabulary may be padded.
template <typename T>
static void argmax(const T* x, i64 stride, i64* at, i64 n, i64 width) {
    constexpr i64 BLOCK = 1024;  // only one of them is gone through number by number
#pragma omp parallel for if (n > 1 && n * width > SERIAL)
    for (i64 i = 0; i < n; i++) {
        const T* row = x + i * stride;
        float most = -INFINITY;
        i64 place = 0;
        bool odd = false;
        for (i64 d = 0; d < width; d += BLOCK) {
            const float here = largest(row + d, std::min(BLOCK, width - d), odd);
            if (here > most) most = here, place = d;
        }
        if (odd || !std::isfinite(most)) {
            at[i] = -1;
            continue;
        }
        while (get(row[place]) != most) place++;
        at[i] = place;
    }
}

// Of the softmax of each row of x [n, width]: the logarithms at the row's token, no less than that of
// the smallest normal number, and at its largest; the entropy. They go to the first three of
// out [n, columns], those whose bits are set in `wanted`.
template <typename T>
static void token_signals(const T* x, i64 stride, const i64* tokens, float* out, i64 n, i64 width,
                          i64 columns, i64 wanted) {
#pragma omp parallel for if (n > 1 && n * width > SERIAL)
    for (i64 i = 0; i < n; i++) {
        const T* row = x + i * stride;
        const float most = largest(row, width);
        vec sums = {}, means = {};
        const auto add = [&](vec x) {
            const vec below = x - most, seen = below < -87.0f ? all(-87.0f) : below;
            const vec e = below < -87.0f ? vec{} : exp_(below);
            sums += e;
            means = fused(e, seen, means);  // not `below`: 0 * -inf is no number
        };
        i64 d = 0;
        for (; d + LANES <= width; d += LANES) add(load(row + d));
        if (d < width) add(load(row + d, width - d, -INFINITY));
        const float sum = total(sums), mean = total(means);
        const float log_sum = std::log(sum), log_q = get(row[tokens[i]]) - most - log_sum;
        const float found[] = {std::max(log_q, std::log(std::numeric_limits<float>::min())),
                               -log_sum, std::max(log_sum - mean / sum, 0.0f)};
        for (i64 c = 0; c < 3; c++)
            if (wanted >> c & 1) out[i * columns + c] = found[c];
    }
}
