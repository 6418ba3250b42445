// A packed forward's work on a CPU: its matrix products, what is between them, and what is done with
// its logits.
// Compiled by compile.py into one library, called by cpu.py. This file exports each function for
// both kinds of numbers.
//
// Nothing here is clever: one pass over memory where torch's operators take several. A token is
// computed by itself in a fixed order, so its bits do not depend on what else is in the batch.

#include "attention.h"
#include "layers.h"
#include "logits.h"
#include "numbers.h"
#include "whole_layer.h"

#define EXPORT(T, NAME)                                                                           \
    extern "C" void attend_##NAME(const T* q, i64 ts, i64 hs, const T* k, const T* v,             \
                                  const i64* table, i64 table_width, const Row* rows, i64 n,      \
                                  i64 kv, i64 group, i64 kd, i64 vd, i64 window, float scale,     \
                                  const Extras* extras, T* out) {                                 \
        attend<T>(q, ts, hs, k, v, {table, table_width}, rows, n, kv, group, kd, vd, window,      \
                  scale, extras ? *extras : Extras{}, out);                                       \
    }                                                                                             \
    extern "C" void add_norm_##NAME(T* x, const T* y, const T* w, T* out, i64 n, i64 width,       \
                                    float eps) {                                                  \
        add_norm<T>(x, y, w, out, n, width, eps);                                                 \
    }                                                                                             \
    extern "C" void norm_beside_##NAME(const T* embeddings, const i64* tokens, const T* states,     \
                                       const T* embedding_norm, const T* state_norm,              \
                                       float embedding_eps, float state_eps, T* out, i64 n,       \
                                       i64 width) {                                               \
        norm_beside<T>(embeddings, tokens, states, embedding_norm, state_norm, embedding_eps,     \
                       state_eps, out, n, width);                                                 \
    }                                                                                             \
    extern "C" void gate_##NAME(const T* gate_up, T* out, i64 n, i64 width) {                     \
        gate<T>(gate_up, out, n, width);                                                          \
    }                                                                                             \
    extern "C" void rotate_and_store_##NAME(                                                      \
        T* heads, const T* cos, const T* sin, const T* qn, const T* kn, float eps, T* keys,       \
        T* values, const i64* table, i64 table_width, const i64* slots, const i64* positions,     \
        i64 n, i64 q, i64 kv, i64 dim) {                                                          \
        rotate_and_store<T>(heads, cos, sin, qn, kn, eps, keys, values, {table, table_width},     \
                            slots, positions, n, q, kv, dim);                                     \
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
    }                                                                                             \
    extern "C" void softmax_##NAME(const T* x, i64 stride, const float* temperature, float* out,  \
                                   i64 n, i64 width) {                                            \
        softmax<T>(x, stride, temperature, out, n, width);                                        \
    }                                                                                             \
    extern "C" void product_##NAME(const T* x, const Weights* weights, T* out, i64 n) {           \
        product(x, *weights, out, n);                                                             \
    }                                                                                             \
    extern "C" void whole_layer_##NAME(const Layer* layer, const Forward* forward, T* x,          \
                                       const T* normed, T* keys, T* values, i64 window) {         \
        whole_layer(*layer, *forward, x, normed, keys, values, window);                           \
    }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
extern "C" void race_float32(const float* p, const i64* keys, i64* at, i64 n, i64 width) {
    race(p, keys, at, n, width);
}
extern "C" i64 panel_outputs() { return HAS_PANELS ? PANEL : 0; }
extern "C" i64 byte_panel_outputs() { return HAS_BYTE_PANELS && !HAS_TILES ? PANEL : 0; }
extern "C" bool has_tiles() { return ask_for_tiles(); }
