// From the scores of a block to exponentials, the output P V and the map.
#pragma once

#include "scores.h"

namespace attnx {

// o [OUT_ROWS][V * W] += p^T v, with p [count][OUT_ROWS] (row stride `width`) and v [count][V * W]. Each of the `count`
// words holds E keys. v and o have row stride dv.
template <int E, int V>
static inline void weigh_tile(const float* p, int64_t width, const float* v, int64_t dv, int64_t count, float* o) {
    // Sum from zero and add to `o` at the end, because a chain of thousands of additions loses precision.
    vec acc[OUT_ROWS][V];
    for (int i = 0; i < OUT_ROWS; i++)
        for (int d = 0; d < V; d++) acc[i][d] = vec{};
    ATTNX_UNROLL for (int64_t j = 0; j < count; j++, p += width, v += dv) {
        vec value[V];
        for (int d = 0; d < V; d++) value[d] = load(v + d * W);
        for (int i = 0; i < OUT_ROWS; i++) {
            const vec weight = splat(p[i]);
            for (int d = 0; d < V; d++) acc[i][d] = multiply_add<E>(weight, value[d], acc[i][d]);
        }
    }
    for (int i = 0; i < OUT_ROWS; i++)
        for (int d = 0; d < V; d++) store(o + i * dv + d * W, load(o + i * dv + d * W) + acc[i][d]);
}

// Packs the weights s [count][width] to pairs [(count + 1) / 2][width], words of two keys each, rounded to bf16. If
// `count` is odd, the last key is paired with zero.
static inline void pair_weights(const Block& block, const float* s, int64_t count, float* pairs) {
    for (int64_t j = 0; j < count; j += 2, pairs += block.width)
        for (int i = 0; i < block.width; i += W) {
            const float* at = s + j * block.width + i;
            store(pairs + i, rounded_pairs(load(at), j + 1 < count ? load(at + block.width) : vec{}));
        }
}

// Adds the weights of keys first..first+count-1, times their values, to scratch.o [ROWS][value_stride]. `first` is a
// multiple of CHUNK.
template <class T>
static void weigh(const Call& c, const Block& block, const Packed& kv, int64_t h, int64_t first, int64_t count,
                  const Scratch& scratch) {
    constexpr int E = IN_WORD<T>;
    const int64_t dv = value_stride(c), words = (count + E - 1) / E;
    const float* v = kv.values(block.b, h) + first / E * dv;
    const float* p = scratch.s + first * block.width;
    if constexpr (E == 2) {
        pair_weights(block, p, count, scratch.pairs);
        p = scratch.pairs;
    }
    if (first + count < block.limit) prefetch(v + words * dv, words * dv);
    for (int64_t i = 0; i < block.count; i += OUT_ROWS) {
        int64_t d = 0;
        for (; d + 2 * W <= c.Dv; d += 2 * W)
            weigh_tile<E, 2>(p + i, block.width, v + d, dv, words, scratch.o + i * dv + d);
        for (; d < c.Dv; d += W) weigh_tile<E, 1>(p + i, block.width, v + d, dv, words, scratch.o + i * dv + d);
    }
}

// Replaces s [count][width] by exp2(s - shift [width]), and adds the sums over keys to total [width].
static void exponentiate(const Block& block, float* s, int64_t count, const float* shift, float* total) {
    by_vectors(block, [&](auto V, int i) {
        vec minus[V], sum[V];
        for (int v = 0; v < V; v++) minus[v] = load(shift + i + v * W), sum[v] = vec{};
        float* at = s + i;
        for (int64_t j = 0; j < count; j++, at += block.width)
            for (int v = 0; v < V; v++) {
                const vec p = exp2(load(at + v * W) - minus[v]);
                store(at + v * W, p);
                sum[v] += p;
            }
        for (int v = 0; v < V; v++) store(total + i + v * W, load(total + i + v * W) + sum[v]);
    });
}

// Multiplies scratch.s [key][width] by its gradient, the dot products of the output gradient (scratch.gt) and the values.
// With `clamp`, negative gradients count as zero.
template <class T>
static void weigh_by_gradient(const Call& c, const Block& block, const Packed& kv, int64_t h, const Scratch& scratch) {
    const float* value = kv.values(block.b, h);
    const int64_t stride = value_stride(c), words = in_words(c, c.Dv);
    auto begin = [&](int64_t from, int64_t till) {
        if (till < block.limit) prefetch(value + till * stride, (till - from) * stride);
    };
    by_tiles(block, 0, block.limit, begin, [&](auto N, auto V, int64_t from, int i) {
        vec acc[N][V];
        dot_tile<IN_WORD<T>>(scratch.gt + i, value + from * stride, stride, words, acc);
        for (int t = 0; t < N; t++)
            for (int v = 0; v < V; v++) {
                float* at = scratch.s + (from + t) * block.width + i + v * W;
                const vec dp = acc[t][v], clamped = dp < 0.0f ? vec{} : dp;
                store(at, load(at) * (c.clamp ? clamped : dp));
            }
    });
}

// Fuses one more head, p [key][width] * factor [width], into the block's map [key][width].
template <int HEADS, bool BEGIN>
static void fuse(const Block& block, const float* p, const float* factor, float* map) {
    by_vectors(block, [&](auto V, int i) {
        vec f[V];
        for (int v = 0; v < V; v++) f[v] = load(factor + i + v * W);
        const float* from = p + i;
        float* to = map + i;
        for (int64_t j = 0; j < block.limit; j++, from += block.width, to += block.width)
            for (int v = 0; v < V; v++) {
                const vec weight = weighted(load(from + v * W), f[v]), before = BEGIN ? vec{} : load(to + v * W);
                if (BEGIN)
                    store(to + v * W, weight);
                else if (HEADS == MEAN)
                    store(to + v * W, before + weight);
                else {
                    const ivec kept = HEADS == MAX ? weight < before : weight > before;
                    store(to + v * W, (kept | (before != before)) ? before : weight);
                }
            }
    });
}

// Writes from [key][width] * factor [width], transposed, to the rows of a map, to [count][N]. Keys beyond the block's
// limit get 0, or NaN if the first weight of the row is NaN.
static void store_map(const Call& c, const Block& block, const float* from, const float* factor, float* to) {
    for (int i = 0; i < block.count; i += W) {
        const int64_t count = block.count - i < W ? block.count - i : W;
        const vec f = load(factor + i);
        for (int64_t j = 0; j < block.limit; j += W) {
            vec tile[W];
            for (int t = 0; t < W; t++) {
                const vec p = j + t < block.limit ? load(from + (j + t) * block.width + i) : vec{};
                tile[t] = weighted(p, f);
            }
            transpose(tile);
            const int64_t keys = block.limit - j < W ? block.limit - j : W;
            for (int64_t t = 0; t < count; t++) {
                float* at = to + (i + t) * c.N + j;
                if (keys == W)
                    store(at, tile[t]);
                else
                    std::memcpy(at, &tile[t], keys * sizeof(float));
            }
        }
        for (int64_t t = 0; t < count; t++) {
            float* row = to + (i + t) * c.N;
            const float beyond = row[0] != row[0] ? row[0] : 0;
            for (int64_t j = block.limit; j < c.N; j++) row[j] = beyond;
        }
    }
}

// Writes o [count][value_stride] * factor [count] to the output.
template <class T>
static void store_out(const Call& c, const Block& block, int64_t h, const float* o, const float* factor) {
    const int64_t dv = value_stride(c);
    for (int64_t i = 0; i < block.count; i++) {
        T* to = (T*)c.out + ((block.b * c.M + block.row[i]) * c.H + h) * c.Dv;
        int64_t d = 0;
        for (; d + W <= c.Dv; d += W) store(to + d, load(o + i * dv + d) * factor[i]);
        T rest[W];
        store(rest, d < c.Dv ? load(o + i * dv + d) * factor[i] : vec{});
        std::memcpy(to + d, rest, (c.Dv - d) * sizeof(T));
    }
}

}  // namespace attnx
