// A decoder layer of the Llama family in one call. Operator by operator, each with a call from Python,
// it takes as long again as an int8 model of a few hundred million weights takes to compute.

#pragma once

#include <memory>

#include "attention.h"
#include "layers.h"
#include "panels.h"
#include "tiles.h"

// A linear layer: numbers, packed for panels or tiles; bytes if there are scales.
struct Weights {
    const void* numbers;
    const float *scales, *bias;
    i64 inputs, outputs;
};

static void own_product(const float* x, const Weights& w, float* out, i64 n) {
    const auto* numbers = static_cast<const float*>(w.numbers);
    panel_product(x, numbers, w.bias, out, n, w.inputs, w.outputs);
}

static void own_product(const bf16* x, const Weights& w, bf16* out, i64 n) {
    const auto* numbers = static_cast<const bf16*>(w.numbers);
    tile_product(x, numbers, nullptr, w.bias, out, n, w.inputs, w.outputs);
}

// out [n, outputs] = x [n, inputs] W^T + bias.
template <typename T>
static void product(const T* x, const Weights& w, T* out, i64 n) {
    if (!w.scales) return own_product(x, w, out, n);
    const auto* bytes = static_cast<const int8_t*>(w.numbers);
    if constexpr (HAS_TILES) {
        tile_product(x, bytes, w.scales, w.bias, out, n, w.inputs, w.outputs);
    } else {
        byte_panel_product(x, bytes, w.scales, w.bias, out, n, w.inputs, w.outputs);
    }
}

// What a layer is made of; the norms of queries and keys may be null.
struct Layer {
    Weights qkv, output, gate_up, down;
    const void *input_norm, *mlp_norm, *query_norm, *key_norm;
    i64 query_heads, kv_heads, dim;
    float epsilon, scale;
};

// What all layers of a forward share: n tokens and where they belong. `extras` may be null.
struct Forward {
    const void *cos, *sin;
    const i64* table;
    i64 table_width;
    const i64 *slots, *positions;
    i64 n;
    const Row* rows;
    i64 n_rows;
    const Extras* extras;
};

// x [n, hidden] becomes what the layer makes of it. Its attention reads `normed`, or, if that is
// null, the input norm of x.
template <typename T>
static void whole_layer(const Layer& l, const Forward& f, T* x, const T* normed, T* keys, T* values,
                        i64 window) {
    const auto weight = [](const void* norm) { return static_cast<const T*>(norm); };
    const auto room = [&](i64 width) { return std::unique_ptr<T[]>(new T[f.n * width]); };
    const Pages pages = {f.table, f.table_width};
    const i64 hidden = l.output.outputs, inner = l.down.inputs, n = f.n;
    const auto own = room(hidden), more = room(hidden);
    if (!normed) {
        add_norm<T>(x, nullptr, weight(l.input_norm), own.get(), n, hidden, l.epsilon);
        normed = own.get();
    }
    const auto heads = room(l.qkv.outputs), mixed = room(l.output.inputs);
    product(normed, l.qkv, heads.get(), n);
    rotate_and_store(heads.get(), weight(f.cos), weight(f.sin), weight(l.query_norm),
                     weight(l.key_norm), l.epsilon, keys, values, pages, f.slots, f.positions, n,
                     l.query_heads, l.kv_heads, l.dim);
    attend<T>(heads.get(), l.qkv.outputs, l.dim, keys, values, pages, f.rows, f.n_rows, l.kv_heads,
              l.query_heads / l.kv_heads, l.dim, l.dim, window, l.scale,
              f.extras ? *f.extras : Extras{}, mixed.get());
    product(mixed.get(), l.output, more.get(), n);
    add_norm(x, more.get(), weight(l.mlp_norm), own.get(), n, hidden, l.epsilon);
    const auto both = room(2 * inner), gated = room(inner);
    product<T>(own.get(), l.gate_up, both.get(), n);
    gate(both.get(), gated.get(), n, inner);
    product<T>(gated.get(), l.down, more.get(), n);
#pragma omp parallel for if (n * hidden > SERIAL)
    for (i64 i = 0; i < n; i++) add(x + i * hidden, more.get() + i * hidden, hidden);
}
