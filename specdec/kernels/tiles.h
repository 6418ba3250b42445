// Products of bytes, and of bfloat16, in the tiles of Intel's AMX: one instruction multiplies 16 x 64
// bytes by 64 x 16, or 16 x 32 numbers by 32 x 16.

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "numbers.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif

// Whether this process may use tiles: Linux gives them to those that ask.
static bool ask_for_tiles() {
#ifdef TILES
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

#ifdef TILES

constexpr i64 TILE = 16, LINE = 64;  // rows and outputs of a tile; bytes of a row of it
constexpr i64 BYTES = TILE * LINE;  // of a tile

// The inputs that one step sums over.
template <typename W>
constexpr i64 STEP = LINE / sizeof(W);

// Quantizes x [width] in steps of 1/127 of its largest magnitude, each STEP inputs a tile apart, and
// pads with zeros. Returns what a step is worth, NaN for a row that is not finite.
template <typename T>
static float to_tiles(const T* x, int8_t* tiles, i64 width) {
    const Rounding rounding(127.0f, x, width);
    for (i64 first = 0; first < width; first += LINE, tiles += BYTES) {
        const i64 n = std::min(LINE, width - first);
        rounding.round(x + first, tiles, n);
        std::fill(tiles + n, tiles + LINE, 0);
    }
    return rounding.unit;
}

// The same without quantizing: a step is worth 1.
static float to_tiles(const bf16* x, bf16* tiles, i64 width) {
    constexpr i64 STEP = ::STEP<bf16>;
    for (i64 first = 0; first < width; first += STEP, tiles += TILE * STEP) {
        const i64 n = std::min(STEP, width - first);
        std::copy(x + first, x + first + n, tiles);
        std::fill(tiles + n, tiles + STEP, bf16{0});
    }
    return 1;
}

// Tiles 0 to 3 hold sums, 4 and 5 inputs, 6 and 7 weights. Fewer tokens take less time.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileShapes(i64 tokens) {
        for (int tile = 0; tile < 8; tile++) {
            bytes[tile] = LINE;
            rows[tile] = static_cast<uint8_t>(tile < 6 ? std::min(tokens, TILE) : TILE);
        }
    }
};

// What turns sums into numbers: out [n, outputs] = sums * scales [outputs] * steps [n] + bias. Without
// `scales` they are 1.
template <typename T>
struct Outputs {
    const float *scales, *bias, *steps;
    T* out;
    i64 n, outputs;

    template <typename Sum>
    void put(const Sum* sums, i64 token, i64 output) const {
        const i64 width = std::min(TILE, outputs - output);
        if (width <= 0) return;  // the second tile of a pair may be padding
        const vec scale = scales ? load(scales + output) : all(1), more = load(bias + output);
        for (i64 i = token; i < std::min(n, token + TILE); i++, sums += TILE) {
            const vec y = as_floats(sums) * scale * steps[i] + more;
            T* to = out + i * outputs + output;
            if (width == TILE) {
                store(to, y);
            } else {
                store(to, y, width);
            }
        }
    }

    static vec as_floats(const float* sums) { return load(sums); }
    static vec as_floats(const int32_t* sums) {
        return _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    }
};

// Adds a tile of inputs times one of weights to one of sums; the intrinsics want literal numbers.
#define ADD_PRODUCT(W, SUMS, INPUTS, WEIGHTS)          \
    if constexpr (sizeof(W) == 1) {                    \
        _tile_dpbssd(SUMS, INPUTS, WEIGHTS);           \
    } else {                                           \
        _tile_dpbf16ps(SUMS, INPUTS, WEIGHTS);         \
    }

// 32 outputs of up to 32 tokens: inputs [1 or 2][steps][a tile], weights [steps][2][a tile]. The first
// tokens also fetch the weights of the next 32 outputs, which the processor alone does too late.
template <typename W, typename T>
static void multiply(const W* inputs, const W* weights, i64 steps, i64 token, i64 output,
                     const Outputs<T>& to) {
    constexpr i64 ALL = TILE * STEP<W>;  // numbers of a tile
    const W* more = inputs + steps * ALL;
    const bool both = token + TILE < to.n;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 s = 0; s < steps; s++) {
        if (token == 0) {
            const char* next = reinterpret_cast<const char*>(weights + 2 * (steps + s) * ALL);
            for (i64 line = 0; line < 2 * BYTES; line += LINE) _mm_prefetch(next + line, _MM_HINT_T1);
        }
        _tile_loadd(4, inputs + s * ALL, LINE);
        _tile_loadd(6, weights + 2 * s * ALL, LINE);
        ADD_PRODUCT(W, 0, 4, 6);
        _tile_loadd(7, weights + (2 * s + 1) * ALL, LINE);
        ADD_PRODUCT(W, 1, 4, 7);
        if (both) {
            _tile_loadd(5, more + s * ALL, LINE);
            ADD_PRODUCT(W, 2, 5, 6);
            ADD_PRODUCT(W, 3, 5, 7);
        }
    }
    alignas(64) std::conditional_t<sizeof(W) == 1, int32_t, float> sums[TILE * TILE];
    _tile_stored(0, sums, LINE);
    to.put(sums, token, output);
    _tile_stored(1, sums, LINE);
    to.put(sums, token, output + TILE);
    if (both) {
        _tile_stored(2, sums, LINE);
        to.put(sums, token + TILE, output);
        _tile_stored(3, sums, LINE);
        to.put(sums, token + TILE, output + TILE);
    }
}

// out [n, outputs] = x [n, width] W^T + bias, with x quantized per row where weights are bytes. W is
// packed as [outputs / 32][width / STEP][2][16][16][4 / bytes of a number]: pairs of tiles of 16
// groups of inputs by 16 outputs. It, scales and bias are padded to whole pairs.
template <typename W, typename T>
static void tile_product(const T* x, const W* weight, const float* scales, const float* bias,
                         T* out, i64 n, i64 width, i64 outputs) {
    constexpr i64 ALL = TILE * STEP<W>;
    const i64 steps = (width + STEP<W> - 1) / STEP<W>, blocks = (n + 2 * TILE - 1) / (2 * TILE);
    const i64 pairs = (outputs + 2 * TILE - 1) / (2 * TILE), parts = parts_of(pairs, blocks);
    // Left as found: rows of the last tiles that are no token's are summed, too, and not put.
    const std::unique_ptr<W[]> tiles(new W[2 * blocks * steps * ALL]);
    const std::unique_ptr<float[]> worth(new float[n]);
    const Outputs<T> to{scales, bias, worth.get(), out, n, outputs};
#pragma omp parallel
    {
#pragma omp for
        for (i64 i = 0; i < n; i++) {
            W* first = tiles.get() + i / TILE * steps * ALL + i % TILE * STEP<W>;
            worth[i] = to_tiles(x + i * width, first, width);
        }
        const TileShapes shapes(n);
        _tile_loadconfig(&shapes);
#pragma omp for
        for (i64 item = 0; item < pairs * parts; item++) {
            const i64 pair = item / parts, part = item % parts;
            const W* weights = weight + pair * steps * 2 * ALL;
            for (i64 i = blocks * part / parts; i < blocks * (part + 1) / parts; i++) {
                const W* inputs = tiles.get() + 2 * i * steps * ALL;
                multiply(inputs, weights, steps, 2 * i * TILE, pair * 2 * TILE, to);
            }
        }
        _tile_release();
    }
}

#else

template <typename W, typename T>
static void tile_product(const T*, const W*, const float*, const float*, T*, i64, i64, i64) {}

#endif
