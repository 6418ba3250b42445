// A decoder layer's small operators between its matrix products, each in one pass over memory.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.h"
#include "pages.h"

// The reciprocal root mean square of `width` numbers.
static inline float inverse_rms(const float* x, i64 width, float eps) {
    return 1.0f / std::sqrt(sum_of_squares(x, width) / static_cast<float>(width) + eps);
}

// x += y
template <typename T>
static inline void add(T* x, const T* y, i64 n) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) put(x + i, get(x[i]) + get(y[i]));
}

// out = weight * x / rms(x), all [width]; `row` is room for as many numbers.
template <typename T>
static inline void norm(const T* x, const T* weight, T* out, i64 width, float eps, float* row) {
    for (i64 d = 0; d < width; d++) row[d] = get(x[d]);
    const float inverse = inverse_rms(row, width, eps);
#pragma omp simd
    for (i64 d = 0; d < width; d++) put(out + d, get(weight[d]) * (row[d] * inverse));
}

// x += y, unless y is null; out = weight * x / rms(x). All [n, width].
template <typename T>
static void add_norm(T* x, const T* y, const T* weight, T* out, i64 n, i64 width, float eps) {
#pragma omp parallel if (n * width > SERIAL)
    {
        std::vector<float> row(width);
#pragma omp for
        for (i64 i = 0; i < n; i++) {
            T* to = x + i * width;
            if (y) add(to, y + i * width, width);
            norm(to, weight, out + i * width, width, eps, row.data());
        }
    }
}

// out [n, 2 * width] = the normed embeddings of n tokens and normed states, side by side; each norm
// has a weight and an epsilon.
template <typename T>
static void norm_beside(const T* embeddings, const i64* tokens, const T* states,
                        const T* embedding_norm, const T* state_norm, float embedding_eps,
                        float state_eps, T* out, i64 n, i64 width) {
#pragma omp parallel if (2 * n * width > SERIAL)
    {
        std::vector<float> row(width);
#pragma omp for
        for (i64 i = 0; i < n; i++) {
            T* to = out + 2 * i * width;
            norm(embeddings + tokens[i] * width, embedding_norm, to, width, embedding_eps,
                 row.data());
            norm(states + i * width, state_norm, to + width, width, state_eps, row.data());
        }
    }
}

// out [n, width] = silu(first half) * second half of each row of gate_up [n, 2 * width].
template <typename T>
static void gate(const T* gate_up, T* out, i64 n, i64 width) {
    const auto silu = [](vec x) { return x / (1.0f + exp_(-x)); };
#pragma omp parallel for if (n * width > SERIAL)
    for (i64 i = 0; i < n; i++) {
        const T *g = gate_up + i * 2 * width, *up = g + width;
        T* to = out + i * width;
        i64 d = 0;
        for (; d + LANES <= width; d += LANES) store(to + d, silu(load(g + d)) * load(up + d));
        if (const i64 left = width - d) {
            store(to + d, silu(load(g + d, left, 0.0f)) * load(up + d, left, 0.0f), left);
        }
    }
}

// Rotates the query and key heads of n tokens, each [query_heads + 2 * kv_heads, dim], in place, and
// stores keys and values at their slots and positions. Heads are normed before if there are weights
// for it. cos and sin are [n, dim]; each angle stands there twice.
template <typename T>
static void rotate_and_store(T* heads, const T* cos, const T* sin, const T* query_norm,
                             const T* key_norm, float eps, T* keys, T* values, Pages pages,
                             const i64* slots, const i64* positions, i64 n, i64 query_heads,
                             i64 kv_heads, i64 dim) {
    const i64 half = dim / 2, all = query_heads + 2 * kv_heads;
#pragma omp parallel if (n * all * dim > SERIAL)
    {
        std::vector<float> x(dim);
#pragma omp for
        for (i64 i = 0; i < n; i++) {
            const T *c = cos + i * dim, *s = sin + i * dim;
            for (i64 h = 0; h < query_heads + kv_heads; h++) {
                T* head = heads + (i * all + h) * dim;
                for (i64 d = 0; d < dim; d++) x[d] = get(head[d]);
                const bool is_key = h >= query_heads;
                if (const T* weight = is_key ? key_norm : query_norm) {
                    const float inverse = inverse_rms(x.data(), dim, eps);
#pragma omp simd
                    for (i64 d = 0; d < dim; d++) x[d] = get(weight[d]) * (x[d] * inverse);
                }
                const float *low = x.data(), *high = low + half;
#pragma omp simd
                for (i64 d = 0; d < half; d++) {
                    put(head + d, low[d] * get(c[d]) - high[d] * get(s[d]));
                    put(head + half + d, high[d] * get(c[half + d]) + low[d] * get(s[half + d]));
                }
                if (is_key) {  // by dimension
                    const i64 at = pages.place(slots[i], positions[i], kv_heads, h - query_heads);
                    T* key = keys + at / PAGE * PAGE * dim + at % PAGE;
                    for (i64 d = 0; d < dim; d++) key[d * PAGE] = head[d];
                }
            }
            for (i64 h = 0; h < kv_heads; h++) {
                const T* from = heads + (i * all + query_heads + kv_heads + h) * dim;
                std::copy(from, from + dim,
                          values + dim * pages.place(slots[i], positions[i], kv_heads, h));
            }
        }
    }
}

// largest [n] = the largest magnitude of each row of x [n, width], but 1e-12 at least;
// out [n, width] = x / largest.
template <typename T>
static void scale_rows(const T* x, float* out, float* largest, i64 n, i64 width) {
#pragma omp parallel for if (n * width > SERIAL)
    for (i64 i = 0; i < n; i++) {
        const T* from = x + i * width;
        float most = 1e-12f;
#pragma omp simd reduction(max : most)
        for (i64 d = 0; d < width; d++) {
            const float size = std::fabs(get(from[d]));
            most = size > most ? size : most;
        }
        largest[i] = most;
#pragma omp simd
        for (i64 d = 0; d < width; d++) out[i * width + d] = get(from[d]) / most;
    }
}
