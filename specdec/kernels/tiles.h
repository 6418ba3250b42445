// Products of bytes in the tiles of Intel's AMX: one instruction multiplies 16 x 64 by 64 x 16.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.h"

#if defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
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

constexpr i64 TILE = 16, STEP = 64;  // rows and outputs of a tile; inputs that one step sums over
constexpr i64 BYTES = TILE * STEP;  // of a tile

// Quantizes x [width] in steps of 1/127 of its largest magnitude, each STEP inputs a tile apart, and
// pads with zeros. Returns what a step is worth, NaN for a row that is not finite.
template <typename T>
static float to_bytes(const T* x, int8_t* tiles, i64 width) {
    float most = 1e-12f, poison = 0;
#pragma omp simd reduction(max : most) reduction(+ : poison)
    for (i64 d = 0; d < width; d++) {
        const float size = std::fabs(get(x[d]));
        most = size > most ? size : most;
        poison += size * 0.0f;
    }
    const float steps = 127.0f / most;
    for (i64 first = 0; first < width; first += STEP, tiles += BYTES) {
        const i64 n = std::min(STEP, width - first);
#pragma omp simd
        for (i64 d = 0; d < n; d++) {
            tiles[d] = static_cast<int8_t>(
                static_cast<int32_t>(std::nearbyint(get(x[first + d]) * steps)));
        }
        std::fill(tiles + n, tiles + STEP, 0);
    }
    return most / 127.0f + poison;
}

// Tiles 0 to 3 hold sums, 4 and 5 inputs, 6 and 7 weights. Fewer tokens take less time.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileShapes(i64 tokens) {
        for (int tile = 0; tile < 8; tile++) {
            bytes[tile] = STEP;
            rows[tile] = static_cast<uint8_t>(tile < 6 ? std::min(tokens, TILE) : TILE);
        }
    }
};

// What turns sums into numbers: out [n, outputs] = sums * scales [outputs] * steps [n] + bias.
template <typename T>
struct Outputs {
    const float *scales, *bias, *steps;
    T* out;
    i64 n, outputs;

    void put(const int32_t* sums, i64 token, i64 output) const {
        const i64 width = std::min(TILE, outputs - output);
        if (width <= 0) return;  // the second tile of a pair may be padding
        const vec scale = load(scales + output), more = load(bias + output);
        for (i64 i = token; i < std::min(n, token + TILE); i++, sums += TILE) {
            const vec sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
            const vec y = sum * scale * steps[i] + more;
            T* to = out + i * outputs + output;
            if (width == TILE) {
                store(to, y);
            } else {
                store(to, y, width);
            }
        }
    }
};

// 32 outputs of up to 32 tokens: inputs [1 or 2][steps][BYTES], weights [steps][2][BYTES].
template <typename T>
static void multiply(const int8_t* inputs, const int8_t* weights, i64 steps, i64 token, i64 output,
                     const Outputs<T>& to) {
    const int8_t* more = inputs + steps * BYTES;
    const bool both = token + TILE < to.n;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 s = 0; s < steps; s++) {
        // The processor alone fetches too few of a tile's lines ahead: a fifth slower from 32 tokens.
        const char* soon = reinterpret_cast<const char*>(weights + 2 * (s + 4) * BYTES);
        for (i64 line = 0; line < 2 * BYTES; line += 64) _mm_prefetch(soon + line, _MM_HINT_T0);
        _tile_loadd(4, inputs + s * BYTES, STEP);
        _tile_loadd(6, weights + 2 * s * BYTES, STEP);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, weights + (2 * s + 1) * BYTES, STEP);
        _tile_dpbssd(1, 4, 7);
        if (both) {
            _tile_loadd(5, more + s * BYTES, STEP);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    alignas(64) int32_t sums[TILE * TILE];
    _tile_stored(0, sums, STEP);
    to.put(sums, token, output);
    _tile_stored(1, sums, STEP);
    to.put(sums, token, output + TILE);
    if (both) {
        _tile_stored(2, sums, STEP);
        to.put(sums, token + TILE, output);
        _tile_stored(3, sums, STEP);
        to.put(sums, token + TILE, output + TILE);
    }
}

// out [n, outputs] = x [n, width] W^T + bias with x quantized per row. W is packed as
// [outputs / 32][width / 64][2][16][16][4]: pairs of tiles of 16 fours of inputs by 16 outputs.
// It, scales and bias are padded to whole pairs.
template <typename T>
static void tile_product(const T* x, const int8_t* weight, const float* scales, const float* bias,
                         T* out, i64 n, i64 width, i64 outputs) {
    const i64 steps = (width + STEP - 1) / STEP, chunks = (n + TILE - 1) / TILE;
    std::vector<int8_t> tiles(chunks * steps * BYTES);
    std::vector<float> worth(n);
    const Outputs<T> to{scales, bias, worth.data(), out, n, outputs};
#pragma omp parallel
    {
#pragma omp for
        for (i64 i = 0; i < n; i++) {
            int8_t* first = tiles.data() + i / TILE * steps * BYTES + i % TILE * STEP;
            worth[i] = to_bytes(x + i * width, first, width);
        }
        const TileShapes shapes(n);
        _tile_loadconfig(&shapes);
#pragma omp for
        for (i64 pair = 0; pair < (outputs + 2 * TILE - 1) / (2 * TILE); pair++) {
            const int8_t* weights = weight + pair * steps * 2 * BYTES;
            for (i64 chunk = 0; chunk < chunks; chunk += 2) {
                const int8_t* inputs = tiles.data() + chunk * steps * BYTES;
                multiply(inputs, weights, steps, chunk * TILE, pair * 2 * TILE, to);
            }
        }
        _tile_release();
    }
}

#else

template <typename T>
static void tile_product(const T*, const int8_t*, const float*, const float*, T*, i64, i64, i64) {}

#endif
