// What is done with logits: the likeliest token, what the softmax says of a token, the softmax
// itself, and the race that `coupled` sampling decides by.

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

// out [n, width] = softmax(x / temperature) of each row; NaN where x has none.
template <typename T>
static void softmax(const T* x, i64 stride, const float* temperature, float* out, i64 n, i64 width) {
    constexpr i64 BLOCK = 16 * LANES;  // summed up in float: a whole vocabulary would lose digits
#pragma omp parallel for if (n > 1 && n * width > SERIAL)
    for (i64 i = 0; i < n; i++) {
        const T* row = x + i * stride;
        float* to = out + i * width;
        bool odd = false;
        const float most = largest(row, width, odd), colder = 1.0f / temperature[i];
        if (odd || !std::isfinite(most)) {
            std::fill(to, to + width, NAN);
            continue;
        }
        double total = 0;
        for (i64 first = 0; first < width; first += BLOCK) {
            const i64 size = std::min(BLOCK, width - first);
            float* block = to + first;
            for (i64 d = 0; d < size; d++) block[d] = get(row[first + d]);
            transform(block, size, [&](vec y) {
                const vec below = (y - most) * colder;
                return below < -87.0f ? vec{} : exp_(below);
            });
            total += sum(block, size);
        }
        const float inverse = static_cast<float>(1.0 / total);
        transform(to, width, [&](vec y) { return y * inverse; });
    }
}

// at [n] = where p / E is the largest, of each row of p [n, width], with E ~ Exp(1) made of the row's
// key and the place, as specdec/lossless/sampling.py has it (exponential_noise, exponential).
//
// E = -log(1 - v) > v. So a place is in the race only if p > best * v, and few logarithms are needed.
static void race(const float* p, const i64* keys, i64* at, i64 n, i64 width) {
    constexpr i64 BLOCK = 16 * LANES;
    const float scale = 0x1p-31f * (1 - 0x1p-24f), least = scale * (0.5f + 0x1p-24f);
    vec_u32 lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma omp parallel for if (n > 1 && n * width > SERIAL)
    for (i64 i = 0; i < n; i++) {
        const float* row = p + i * width;
        const uint32_t low = static_cast<uint32_t>(keys[i]), high = keys[i] >> 32;
        float best = 0, v[BLOCK];
        i64 place = 0;
        for (i64 first = 0; first < width; first += BLOCK) {
            const i64 size = std::min(BLOCK, width - first);
            vec_i32 maybe = {};
            for (i64 d = 0; d < size; d += LANES) {
                const vec_u32 token = lane + static_cast<uint32_t>(first + d);
                const vec_u32 y = mixed<16>(token * 2654435761u ^ low) * 0x7feb352du;
                const vec_u32 x = mixed<16>(mixed<15>(y + high) * 0x846ca68bu);
                const vec whole = __builtin_convertvector(x & 0x7fffffffu, vec);
                const vec part = __builtin_convertvector(reinterpret_cast<vec_i32>(y), vec);
                const vec number = (whole + part * 0x1p-32f) * scale + least;
                store(v + d, number);
                const i64 left = size - d;
                const vec here = left < LANES ? load(row + first + d, left, 0.0f) : load(row + first + d);
                maybe |= here > number * best;
            }
            if (!any(maybe)) continue;
            for (i64 d = 0; d < size; d++) {
                if (!(row[first + d] > v[d] * best)) continue;
                const float score = row[first + d] / -std::log1p(-v[d]);
                if (score > best) best = score, place = first + d;
            }
        }
        at[i] = place;
    }
}
