// A packed forward's work between its matrix products, and a first look at logits, on a CPU.
// Compiled and called by kernels.py.
//
// Nothing here is clever: one pass over memory where torch's operators take several, keys and
// values read once for all query heads that share them, no positions beyond a row's end. A token is
// computed by itself in a fixed order, so its bits do not depend on what else is in the batch. That
// is why sums are written with vectors, and fused multiply-adds by name: left to the compiler
// (-ffp-contract), they come and go with the number of queries in a loop.

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

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

// -------------------------------------------------------------------------------- vectors

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

// ------------------------------------------------------------------------------ attention

struct Row {
    i64 begin, count, slot, start;  // packed tokens [begin, begin + count), from position start
};

// Queries first..last of a row and a key/value head. Query i is token i / group and, of the query
// heads that share the key/value head, number i % group.
struct Item {
    const Row* row;
    i64 kv_head, first, last;
};

// out[j][p] = q[j] . key[p] for J queries and P positions.
template <int J, int P, typename T>
static inline void dots(const float* q, const T* key, i64 dim, float* out, i64 stride) {
    vec sums[J][P] = {};
    for (i64 d = 0; d < dim; d += LANES) {
        vec k[P];
        for (int p = 0; p < P; p++) {
            k[p] = load(key + p * dim + d);
            __builtin_prefetch(key + (p + 2 * P) * dim + d);
        }
        for (int j = 0; j < J; j++) {
            const vec x = load(q + j * dim + d);
            for (int p = 0; p < P; p++) sums[j][p] = fused(x, k[p], sums[j][p]);
        }
    }
    for (int j = 0; j < J; j++)
        for (int p = 0; p < P; p++) out[j * stride + p] = total(sums[j][p]);
}

// sums[j] += weights[j][l] * values[l] over positions l, for J queries and C vectors of a head.
template <int J, int C, typename T>
static inline void mix(const float* weights, i64 stride, const T* values, i64 low, i64 high,
                       i64 dim, float* sums) {
    vec acc[J][C];
    for (int j = 0; j < J; j++) std::memcpy(acc[j], sums + j * dim, sizeof acc[j]);
    for (i64 l = low; l < high; l++) {
        vec v[C];
        for (int c = 0; c < C; c++) {
            v[c] = load(values + l * dim + c * LANES);
            __builtin_prefetch(values + (l + 8) * dim + c * LANES);
        }
        for (int j = 0; j < J; j++)
            for (int c = 0; c < C; c++)
                acc[j][c] = fused(all(weights[j * stride + l]), v[c], acc[j][c]);
    }
    for (int j = 0; j < J; j++) std::memcpy(sums + j * dim, acc[j], sizeof acc[j]);
}

// Positions whose values are read in one go: those of a wide head in several passes, out of cache.
static constexpr i64 NEAR = 64;

template <int N>
using Number = std::integral_constant<int, N>;

// Calls f(Number<J>, first) for groups of J = QUERIES of n queries, the last one smaller.
template <typename F>
static inline void by_queries(i64 n, F f) {
    i64 j = 0;
    for (; j + QUERIES <= n; j += QUERIES) f(Number<QUERIES>(), j);
    if (n - j == 1) f(Number<1>(), j);
    if (QUERIES > 2 && n - j == 2) f(Number<2>(), j);
    if (QUERIES > 3 && n - j == 3) f(Number<3>(), j);
}

// Head sizes are multiples of 16.
template <typename T>
static void attend(const T* query, i64 token_stride, i64 head_stride, const T* keys,
                   const T* values, const Row* rows, i64 n_rows, i64 kv_heads, i64 group,
                   i64 capacity, i64 key_dim, i64 value_dim, i64 window, float scale, T* out) {
    i64 queries = 0, work = 0;
    for (i64 r = 0; r < n_rows; r++) {
        queries += rows[r].count * group * kv_heads;
        work += rows[r].count * group * kv_heads * (rows[r].start + rows[r].count) * key_dim;
    }
    // Many queries for each pass over the keys, yet enough pieces for every thread.
    const i64 each = std::clamp<i64>(queries / (4 * omp_get_max_threads()), 1, 4 * group);
    std::vector<Item> items;
    for (i64 r = 0; r < n_rows; r++)
        for (i64 head = 0; head < kv_heads; head++)
            for (i64 i = 0; i < rows[r].count * group; i += each)
                items.push_back({&rows[r], head, i, std::min(i + each, rows[r].count * group)});

#pragma omp parallel if (work > SERIAL)
    {
        std::vector<float> scores, sums(each * value_dim), q(each * key_dim);
#pragma omp for schedule(dynamic)
        for (size_t at = 0; at < items.size(); at++) {
            const Item& item = items[at];
            const Row& row = *item.row;
            const i64 n = item.last - item.first;
            const i64 plane = (row.slot * kv_heads + item.kv_head) * capacity;
            const T *key = keys + plane * key_dim, *value = values + plane * value_dim;
            // The queries attend from where the first may look back to, up to the last.
            const i64 earliest = row.start + item.first / group + 1;
            const i64 low = window ? std::max<i64>(0, earliest - window) : 0;
            const i64 high = row.start + (item.last - 1) / group + 1, stride = high - low;
            scores.resize(std::max<i64>(scores.size(), n * stride));

            for (i64 j = 0; j < n; j++) {
                const i64 token = row.begin + (item.first + j) / group;
                const i64 head = item.kv_head * group + (item.first + j) % group;
                const T* from = query + token * token_stride + head * head_stride;
                for (i64 d = 0; d < key_dim; d++) q[j * key_dim + d] = get(from[d]) * scale;
            }
            by_queries(n, [&](auto count, i64 j) {
                constexpr int J = count, P = 4;
                float* to = &scores[j * stride];
                i64 l = low;
                for (; l + P <= high; l += P)
                    dots<J, P>(&q[j * key_dim], key + l * key_dim, key_dim, to + l - low, stride);
                for (; l < high; l++)
                    dots<J, 1>(&q[j * key_dim], key + l * key_dim, key_dim, to + l - low, stride);
            });
            for (i64 j = 0; j < n; j++) {
                const i64 to = row.start + (item.first + j) / group + 1;
                const i64 from = window ? std::max<i64>(0, to - window) : 0, m = to - from;
                float *begin = &scores[j * stride], *score = begin + from - low;
                std::fill(begin, score, 0.0f);
                std::fill(score + m, begin + stride, 0.0f);
                float most = score[0];
#pragma omp simd reduction(max : most)
                for (i64 l = 0; l < m; l++) most = score[l] > most ? score[l] : most;
#pragma omp simd
                for (i64 l = 0; l < m; l++) score[l] = exp_(score[l] - most);
                const float inverse = 1.0f / sum(score, m);
#pragma omp simd
                for (i64 l = 0; l < m; l++) score[l] *= inverse;
            }
            by_queries(n, [&](auto count, i64 j) {
                constexpr int J = count, C = 4;
                const float* weights = &scores[j * stride] - low;
                float* to = &sums[j * value_dim];
                std::fill(to, to + J * value_dim, 0.0f);
                for (i64 l = low; l < high; l += NEAR) {
                    const i64 end = std::min(l + NEAR, high);
                    i64 d = 0;
                    for (; d + C * LANES <= value_dim; d += C * LANES)
                        mix<J, C>(weights, stride, value + d, l, end, value_dim, to + d);
                    for (; d < value_dim; d += LANES)
                        mix<J, 1>(weights, stride, value + d, l, end, value_dim, to + d);
                }
            });
            for (i64 j = 0; j < n; j++) {
                const i64 token = row.begin + (item.first + j) / group;
                const i64 head = item.kv_head * group + (item.first + j) % group;
                T* to = out + (token * kv_heads * group + head) * value_dim;
                for (i64 d = 0; d < value_dim; d++) put(to + d, sums[j * value_dim + d]);
            }
        }
    }
}

// ------------------------------------------------------------- a layer's small operators

// The reciprocal root mean square of `width` numbers.
static inline float inverse_rms(const float* x, i64 width, float eps) {
    return 1.0f / std::sqrt(sum_of_squares(x, width) / static_cast<float>(width) + eps);
}

// x += y, unless y is null; out = weight * x / rms(x). All [n, width].
template <typename T>
static void add_norm(T* x, const T* y, const T* weight, T* out, i64 n, i64 width, float eps) {
#pragma omp parallel if (n * width > SERIAL)
    {
        std::vector<float> row(width);
#pragma omp for
        for (i64 i = 0; i < n; i++) {
            T *to = x + i * width, *normed = out + i * width;
            if (y) {
                const T* more = y + i * width;
#pragma omp simd
                for (i64 d = 0; d < width; d++) put(to + d, get(to[d]) + get(more[d]));
            }
            for (i64 d = 0; d < width; d++) row[d] = get(to[d]);
            const float inverse = inverse_rms(row.data(), width, eps);
#pragma omp simd
            for (i64 d = 0; d < width; d++) put(normed + d, get(weight[d]) * (row[d] * inverse));
        }
    }
}

// out [n, width] = silu(first half) * second half of each row of gate_up [n, 2 * width].
template <typename T>
static void gate(const T* gate_up, T* out, i64 n, i64 width) {
#pragma omp parallel for if (n * width > SERIAL)
    for (i64 i = 0; i < n; i++) {
        const T *g = gate_up + i * 2 * width, *up = g + width;
        T* to = out + i * width;
#pragma omp simd
        for (i64 d = 0; d < width; d++) {
            const float x = get(g[d]);
            put(to + d, x / (1.0f + exp_(-x)) * get(up[d]));
        }
    }
}

// Rotates the query and key heads of n tokens, each [query_heads + 2 * kv_heads, dim], queries in
// place, and stores keys and values at their slots and positions. Heads are normed before if there
// are weights for it. cos and sin are [n, dim]; each angle stands there twice.
template <typename T>
static void rotate_and_store(T* heads, const T* cos, const T* sin, const T* query_norm,
                             const T* key_norm, float eps, T* keys, T* values, const i64* slots,
                             const i64* positions, i64 n, i64 query_heads, i64 kv_heads, i64 dim,
                             i64 capacity) {
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
                T* to = head;
                if (is_key) {
                    const i64 plane = slots[i] * kv_heads + h - query_heads;
                    to = keys + (plane * capacity + positions[i]) * dim;
                }
                const float *low = x.data(), *high = low + half;
#pragma omp simd
                for (i64 d = 0; d < half; d++) {
                    put(to + d, low[d] * get(c[d]) - high[d] * get(s[d]));
                    put(to + half + d, high[d] * get(c[half + d]) + low[d] * get(s[half + d]));
                }
            }
            for (i64 h = 0; h < kv_heads; h++) {
                const T* from = heads + (i * all + query_heads + kv_heads + h) * dim;
                std::copy(from, from + dim,
                          values + ((slots[i] * kv_heads + h) * capacity + positions[i]) * dim);
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

// ------------------------------------------------------------------------------ vocabulary

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

// at [n] = where the largest of each row of x [n, width] stands, the first if it stands twice. Rows
// begin `stride` numbers apart: a vocabulary may be padded.
template <typename T>
static void argmax(const T* x, i64 stride, i64* at, i64 n, i64 width) {
    constexpr i64 BLOCK = 1024;  // only one of them is gone through number by number
#pragma omp parallel for if (n > 1 && n * width > SERIAL)
    for (i64 i = 0; i < n; i++) {
        const T* row = x + i * stride;
        float most = -INFINITY;
        i64 place = 0;
        for (i64 d = 0; d < width; d += BLOCK) {
            const float here = largest(row + d, std::min(BLOCK, width - d));
            if (here > most) most = here, place = d;
        }
        while (place + 1 < width && get(row[place]) != most) place++;
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
        float sum = 0, mean = 0;
#pragma omp simd reduction(+ : sum, mean)
        for (i64 d = 0; d < width; d++) {
            const float below = get(row[d]) - most;
            const float e = below < -87.0f ? 0.0f : exp_(below);
            sum += e;
            mean += e * std::max(below, -87.0f);  // 0 * -inf is no number
        }
        const float log_sum = std::log(sum), log_q = get(row[tokens[i]]) - most - log_sum;
        const float found[] = {std::max(log_q, std::log(std::numeric_limits<float>::min())),
                               -log_sum, std::max(log_sum - mean / sum, 0.0f)};
        for (i64 c = 0; c < 3; c++)
            if (wanted >> c & 1) out[i * columns + c] = found[c];
    }
}

#define EXPORT(T, NAME)                                                                           \
    extern "C" void attend_##NAME(const T* q, i64 ts, i64 hs, const T* k, const T* v,             \
                                  const Row* rows, i64 n, i64 kv, i64 group, i64 capacity,        \
                                  i64 kd, i64 vd, i64 window, float scale, T* out) {              \
        attend<T>(q, ts, hs, k, v, rows, n, kv, group, capacity, kd, vd, window, scale, out);     \
    }                                                                                             \
    extern "C" void add_norm_##NAME(T* x, const T* y, const T* w, T* out, i64 n, i64 width,       \
                                    float eps) {                                                  \
        add_norm<T>(x, y, w, out, n, width, eps);                                                 \
    }                                                                                             \
    extern "C" void gate_##NAME(const T* gate_up, T* out, i64 n, i64 width) {                     \
        gate<T>(gate_up, out, n, width);                                                          \
    }                                                                                             \
    extern "C" void rotate_and_store_##NAME(                                                      \
        T* heads, const T* cos, const T* sin, const T* qn, const T* kn, float eps, T* keys,       \
        T* values, const i64* slots, const i64* positions, i64 n, i64 q, i64 kv, i64 dim,         \
        i64 capacity) {                                                                           \
        rotate_and_store<T>(heads, cos, sin, qn, kn, eps, keys, values, slots, positions, n, q,   \
                            kv, dim, capacity);                                                   \
    }                                                                                             \
    extern "C" void scale_rows_##NAME(const T* x, float* out, float* largest, i64 n, i64 width) { \
        scale_rows<T>(x, out, largest, n, width);                                                 \
    }                                                                                             \
    extern "C" void argmax_##NAME(const T* x, i64 stride, i64* at, i64 n, i64 width) {            \
        argmax<T>(x, stride, at, n, width);                                                       \
    }                                                                                             \
    extern "C" void token_signals_##NAME(const T* x, i64 stride, const i64* tokens, float* out,   \
                                         i64 n, i64 width, i64 columns, i64 wanted) {             \
        token_signals<T>(x, stride, tokens, out, n, width, columns, wanted);                      \
    }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
