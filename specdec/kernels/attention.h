// Attention of packed tokens, each to its own slot up to itself.
//
// Keys and values are read once for all query heads that share them. The keys of a page lie by
// dimension: one load takes a dimension of many positions, whose scores then lie side by side.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "pages.h"

struct Row {
    i64 begin, count, slot, start;  // packed tokens [begin, begin + count), stored from start on
};

// What most forwards have not, as cpu.py has it; null or 0 where a forward lacks it.
struct Extras {
    i64 chunked;               // whether `window` is one of chunks
    const i64 *bases, *masks;  // of packed tokens in trees: specdec/model/trees.py
    const float *sinks, *bias;  // [heads], [heads, bias_width]: specdec/kernels/scoring.py
    i64 bias_width;
    float softcap;
};

// Which positions a token sees: up to itself, and back to the first of its window or chunk.
//
// A token in a tree is at position base + bits of its mask - 1. Positions from its base on are stored
// where the bits are set, in this order; others are stored at their places.
struct Span {
    i64 window, chunked;
    const i64 *bases, *masks;

    // The end of what is seen by a packed token that is stored at `place`.
    i64 end(i64 token, i64 place) const {
        return masks ? bases[token] + __builtin_popcountll(masks[token]) : place + 1;
    }

    i64 begin(i64 end) const {
        if (!window) return 0;
        return chunked ? end - 1 - (end - 1) % window : std::max<i64>(0, end - window);
    }
};

// Numbers of nodes, one each, become those of the nodes whose bits are set.
static inline void gather(float* nodes, uint64_t mask) {
    for (float* to = nodes; mask; mask &= mask - 1) *to++ = nodes[__builtin_ctzll(mask)];
}

// The same back, with zeros for all others.
static inline void scatter(float* nodes, uint64_t mask) {
    for (i64 i = __builtin_popcountll(mask); i-- > 0;) {
        const int bit = 63 - __builtin_clzll(mask);
        const float number = nodes[i];
        nodes[i] = 0;
        nodes[bit] = number;
        mask ^= uint64_t{1} << bit;
    }
}

// Scores of positions from `base` on become weights but for a factor, which is returned. Those outside
// [begin, end) become 0, whatever their scores.
static inline float weigh(float* line, i64 stride, i64 base, i64 begin, i64 end, i64 head,
                          const Extras& extras) {
    float* score = line + begin - base;
    const i64 n = end - begin;
    if (const float cap = extras.softcap) {
        const float twice = 2.0f / cap;
        transform(score, n, [&](vec x) {  // cap * tanh(x / cap)
            const vec e = exp_(x * twice);
            return cap * ((e - 1.0f) / (e + 1.0f));
        });
    }
    if (extras.bias) {
        const float* bias = extras.bias + head * extras.bias_width + begin;
#pragma omp simd
        for (i64 l = 0; l < n; l++) score[l] += bias[l];
    }
    const float* sink = extras.sinks ? extras.sinks + head : nullptr;
    float most = sink ? std::max(score[0], *sink) : score[0];
#pragma omp simd reduction(max : most)
    for (i64 l = 0; l < n; l++) most = score[l] > most ? score[l] : most;
    vec sums = {};
    for (i64 l = 0; l < stride; l += LANES) {
        const vec_i32 at = LANE_NUMBERS + static_cast<int32_t>(base + l);
        const vec_i32 seen = (at >= static_cast<int32_t>(begin)) & (at < static_cast<int32_t>(end));
        const vec weights = seen ? exp_(load(line + l) - most) : vec{};
        store(line + l, weights);
        sums += weights;
    }
    return 1.0f / (total(sums) + (sink ? exp_(all(*sink - most))[0] : 0.0f));
}

// Queries first..last of a row and a key/value head. Query i is token i / group and, of the query
// heads that share the key/value head, number i % group.
struct Item {
    const Row* row;
    i64 kv_head, first, last;
};

// Positions that memory is asked for in advance. They are asked for up to the second cache: the
// first one has too few places for what is on its way to hide how long memory takes. A page is as far
// as it is known where the next numbers lie.
static constexpr i64 AHEAD = PAGE;

// The vector number i behind `soon`; a line of the cache is asked for once.
template <typename T>
static inline void prefetch(const T* soon, int i) {
    if (i * LANES * sizeof(T) % 64 == 0) __builtin_prefetch(soon + i * LANES, 0, 2);
}

// How many vectors of each query's sums a loop works on, at most `most`.
static constexpr int vectors(int queries, int most) {
    return queries * most <= SUMS ? most : vectors(queries, most / 2);
}

// out[j][p] = q[j] . key[p] for J queries and the positions p of a page; `ahead` is read next.
template <int J, typename T>
static inline void dots(const float* q, const T* keys, const T* ahead, i64 dim, float* out,
                        i64 stride) {
    constexpr int P = vectors(J, PAGE / LANES);
    for (i64 at = 0; at < PAGE; at += P * LANES) {
        vec sums[J][P] = {};
        for (i64 d = 0; d < dim; d++) {
            const i64 first = d * PAGE + at;
            vec k[P];
            for (int p = 0; p < P; p++) k[p] = load(keys + first + p * LANES);
            for (int p = 0; p < P; p++) prefetch(ahead + first, p);
            for (int j = 0; j < J; j++) {
                const vec x = all(q[j * dim + d]);
                for (int p = 0; p < P; p++) sums[j][p] = fused(x, k[p], sums[j][p]);
            }
        }
        for (int j = 0; j < J; j++)
            for (int p = 0; p < P; p++) store(out + j * stride + at + p * LANES, sums[j][p]);
    }
}

// sums[j] += weights[j][l] * values[l] over n positions l, for J queries and C vectors of a head;
// `next` is what follows these values.
template <int J, int C, typename T>
static inline void mix(const float* weights, i64 stride, const T* values, const T* next, i64 n,
                       i64 dim, float* sums) {
    vec acc[J][C];
    for (int j = 0; j < J; j++)
        for (int c = 0; c < C; c++) acc[j][c] = load(sums + j * dim + c * LANES);
    for (i64 l = 0; l < n; l++) {
        vec v[C];
        const T* ahead = (l + AHEAD < n ? values : next - n * dim) + (l + AHEAD) * dim;
        for (int c = 0; c < C; c++) {
            v[c] = load(values + l * dim + c * LANES);
            prefetch(ahead, c);
        }
        for (int j = 0; j < J; j++)
            for (int c = 0; c < C; c++)
                acc[j][c] = fused(all(weights[j * stride + l]), v[c], acc[j][c]);
    }
    for (int j = 0; j < J; j++)
        for (int c = 0; c < C; c++) store(sums + j * dim + c * LANES, acc[j][c]);
}

template <int N>
using Number = std::integral_constant<int, N>;

template <int J = 6, typename F>
static inline void others(i64 j, i64 n, F f) {
    for (; j + J <= n; j += J) f(Number<J>(), j);
    if constexpr (J > 1) others<J - 1>(j, n, f);
}

// Calls f(Number<J>, first) for groups of J of n queries, up to six. The first one waits for memory, so
// it is of as many as take whole lines of it at once.
template <int J = SUMS / 4, typename F>
static inline void by_queries(i64 n, F f) {
    if (n >= J) {
        f(Number<J>(), 0);
        others(J, n, f);
    } else if constexpr (J > 1) {
        by_queries<J - 1>(n, f);
    }
}

// Head sizes are multiples of 16.
template <typename T>
static void attend(const T* query, i64 token_stride, i64 head_stride, const T* keys,
                   const T* values, Pages pages, const Row* rows, i64 n_rows, i64 kv_heads,
                   i64 group, i64 key_dim, i64 value_dim, i64 window, float scale,
                   const Extras extras, T* out) {
    const Span span = {window, extras.chunked, extras.bases, extras.masks};
    i64 queries = 0, work = 0;
    for (i64 r = 0; r < n_rows; r++) {
        queries += rows[r].count * group * kv_heads;
        work += rows[r].count * group * kv_heads * (rows[r].start + rows[r].count) * key_dim;
    }
    // All queries of a row in one pass over its keys, unless some thread would have no piece.
    const i64 each = std::clamp<i64>(queries / (4 * omp_get_max_threads()), 1, 16 * group);
    std::vector<Item> items;
    for (i64 r = 0; r < n_rows; r++)
        for (i64 head = 0; head < kv_heads; head++)
            for (i64 i = 0; i < rows[r].count * group; i += each)
                items.push_back({&rows[r], head, i, std::min(i + each, rows[r].count * group)});

#pragma omp parallel if (work > SERIAL)
    {
        std::vector<float> scores, sums(each * value_dim), q(each * key_dim), factors(each);
#pragma omp for schedule(dynamic)
        for (size_t at = 0; at < items.size(); at++) {
            const Item& item = items[at];
            const Row& row = *item.row;
            const i64 n = item.last - item.first;
            // The queries attend from where one may look back to, or a tree begins, up to the last.
            const i64 first = item.first / group, last = (item.last - 1) / group;
            i64 low = span.begin(row.start + first + 1);
            if (span.masks)
                for (i64 t = first; t <= last; t++) {
                    const i64 token = row.begin + t, end = span.end(token, row.start + t);
                    low = std::min({low, span.begin(end), span.bases[token]});
                }
            const i64 high = row.start + last + 1, base = low / PAGE * PAGE;
            const i64 stride = (high - base + PAGE - 1) / PAGE * PAGE;
            scores.resize(std::max<i64>(scores.size(), n * stride));

            for (i64 j = 0; j < n; j++) {
                const i64 token = row.begin + (item.first + j) / group;
                const i64 head = item.kv_head * group + (item.first + j) % group;
                const T* from = query + token * token_stride + head * head_stride;
                for (i64 d = 0; d < key_dim; d++) q[j * key_dim + d] = get(from[d]) * scale;
            }
            const T* first_values =
                values + pages.place(row.slot, low, kv_heads, item.kv_head) * value_dim;
            // All queries go through a page while it is in the first cache.
            pages.each(row.slot, base, high, kv_heads, item.kv_head, [&](i64 begin, i64 end, i64 at,
                                                                         i64 next) {
                // Values follow the last keys.
                const T* ahead = end == high ? first_values : keys + next * key_dim;
                by_queries(n, [&](auto count, i64 j) {
                    dots<count>(&q[j * key_dim], keys + at * key_dim, ahead, key_dim,
                                &scores[j * stride + begin - base], stride);
                });
            });
            for (i64 j = 0; j < n; j++) {
                const i64 t = (item.first + j) / group, token = row.begin + t;
                const i64 head = item.kv_head * group + (item.first + j) % group;
                const i64 end = span.end(token, row.start + t), begin = span.begin(end);
                float* line = &scores[j * stride];
                if (span.masks) gather(line + span.bases[token] - base, span.masks[token]);
                factors[j] = weigh(line, stride, base, begin, end, head, extras);
                if (span.masks) scatter(line + span.bases[token] - base, span.masks[token]);
            }
            std::fill(sums.begin(), sums.end(), 0.0f);
            pages.each(row.slot, low, high, kv_heads, item.kv_head, [&](i64 begin, i64 end, i64 at,
                                                                        i64 next) {
                const T *value = values + at * value_dim, *more = values + next * value_dim;
                by_queries(n, [&](auto count, i64 j) {
                    constexpr int J = count, C = vectors(J, 4);
                    const float* weights = &scores[j * stride + begin - base];
                    float* to = &sums[j * value_dim];
                    const i64 m = end - begin;
                    i64 d = 0;
                    for (; d + C * LANES <= value_dim; d += C * LANES)
                        mix<J, C>(weights, stride, value + d, more + d, m, value_dim, to + d);
                    for (; d < value_dim; d += LANES)
                        mix<J, 1>(weights, stride, value + d, more + d, m, value_dim, to + d);
                });
            });
            for (i64 j = 0; j < n; j++) {
                const i64 token = row.begin + (item.first + j) / group;
                const i64 head = item.kv_head * group + (item.first + j) % group;
                T* to = out + (token * kv_heads * group + head) * value_dim;
                for (i64 d = 0; d < value_dim; d++) put(to + d, sums[j * value_dim + d] * factors[j]);
            }
        }
    }
}
