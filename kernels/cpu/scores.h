// Scores of a block of query rows for one head, with bias, mask and row maxima.
#pragma once

#include "call.h"

namespace attnx {

// Copies the block's rows of head h of x [B, H, M, n] (queries or gradients), transposed, to rows [words of n][ROWS].
template <class T>
static void load_rows(const void* x, const int64_t* stride, int64_t n, const Block& block, int64_t h, float* rows) {
    constexpr int E = IN_WORD<T>;
    const T* from = (const T*)x + block.b * stride[0] + h * stride[1];
    for (int i = 0; i < block.width; i += W) {
        int64_t d = 0;
        float* to = rows + i;
        for (; d + E * W <= n; d += E * W) {
            vec tile[W];
            for (int t = 0; t < W; t++) tile[t] = words(from + block.row[i + t] * stride[2] + d);
            transpose(tile);
            for (int t = 0; t < W; t++, to += ROWS) store(to, tile[t]);
        }
        for (; d < n; d += E, to += ROWS)
            for (int t = 0; t < W; t++) to[t] = word(from + block.row[i + t] * stride[2] + d, n - d);
    }
}

// Prefetches `count` floats.
static inline void prefetch(const float* p, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(p + i);
}

// acc [T][V]: dot products of key t with vector v of rows, from qt [words][ROWS] and k [T][stride]. One base pointer
// serves three keys, so that the addresses fit in registers.
template <int E, int T, int V>
static inline __attribute__((always_inline)) void dot_words(const float* qt, const float* k, int64_t stride,
                                                            int64_t words, vec (&acc)[T][V]) {
    const float* base[(T + 2) / 3];
    for (int t = 0; t < T; t += 3) base[t / 3] = k + t * stride;
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) acc[t][v] = vec{};
    ATTNX_UNROLL for (int64_t d = 0; d < words; d++, qt += ROWS) {
        vec q[V];
        for (int v = 0; v < V; v++) q[v] = load(qt + v * W);
        for (int t = 0; t < T; t++) {
            const vec key = splat(base[t / 3][(t % 3) * stride]);
            for (int v = 0; v < V; v++) acc[t][v] = multiply_add<E>(key, q[v], acc[t][v]);
        }
        for (auto& p : base) p++;
    }
}

// The same for more than PRODUCTS words: a sum of sums of that many products, whose rounding errors are smaller.
constexpr int64_t PRODUCTS = 128;
template <int E, int T, int V>
static __attribute__((noinline)) void dot_chunks(const float* qt, const float* k, int64_t stride, int64_t words,
                                                 vec (&acc)[T][V]) {
    dot_words<E>(qt, k, stride, PRODUCTS, acc);
    for (int64_t d = PRODUCTS; d < words; d += PRODUCTS) {
        vec part[T][V];
        dot_words<E>(qt + d * ROWS, k + d, stride, words - d < PRODUCTS ? words - d : PRODUCTS, part);
        for (int t = 0; t < T; t++)
            for (int v = 0; v < V; v++) acc[t][v] += part[t][v];
    }
}

// dot_words or dot_chunks. The latter has its own copy of acc, which else would not stay in registers.
template <int E, int T, int V>
static inline __attribute__((always_inline)) void dot_tile(const float* qt, const float* k, int64_t stride,
                                                           int64_t words, vec (&acc)[T][V]) {
    if (__builtin_expect(words > PRODUCTS, 0)) {
        vec sums[T][V];
        dot_chunks<E>(qt, k, stride, words, sums);
        for (int t = 0; t < T; t++)
            for (int v = 0; v < V; v++) acc[t][v] = sums[t][v];
    } else {
        dot_words<E>(qt, k, stride, words, acc);
    }
}

// x * log2(e), clamped so that it is finite for finite x.
static float in_base_2(float x) {
    const float y = float(x * LOG2E);
    return std::isinf(y) && !std::isinf(x) ? std::copysign(LARGEST, x) : y;
}

// Writes the bias of keys first..first+T-1, times log2(e), to tile [T][ROWS]; -inf masks.
static void load_bias(const Call& c, const Block& block, int64_t h, int64_t first, int T, float* tile) {
    const int64_t *stride = c.bias_stride, at = block.b % c.bias_items * stride[0] + h * stride[1];
    const auto* bytes = (const uint8_t*)c.bias + at;
    const auto* floats = (const float*)c.bias + at;
    for (int t = 0; t < T; t++) {
        const int64_t j = (first + t) * stride[3];
        const int lanes = stride[2] ? block.width : 1;
        float* to = tile + t * ROWS;
        for (int i = 0; i < lanes; i++) {
            const int64_t from = block.row[i] * stride[2] + j;
            if (c.bias_kind == BOOL)
                to[i] = bytes[from] ? 0 : -INF;
            else
                to[i] = floats[from] < MASK_THRESHOLD ? -INF : in_base_2(floats[from]);
        }
        for (int i = lanes; i < block.width; i++) to[i] = to[0];
    }
}

// Calls f(V, i) for groups of V vectors (a compile-time constant) that start at row i and cover the block's rows.
template <class F>
static inline void by_vectors(const Block& block, F f) {
    for (int v = 0; v < block.vectors;) {
        const int left = block.vectors - v, i = v * W, taken = left < VECS ? left : VECS;
        if constexpr (VECS == 4) {
            if (taken == 4) f(std::integral_constant<int, 4>(), i);
            if (taken == 3) f(std::integral_constant<int, 3>(), i);
        }
        if (taken == 2) f(std::integral_constant<int, 2>(), i);
        if (taken == 1) f(std::integral_constant<int, 1>(), i);
        v += taken;
    }
}

// p * factor, and 0 where the factor is 0 (rows without keys), even if p is NaN.
static inline vec weighted(vec p, vec factor) { return factor == 0.0f ? vec{} : p * factor; }

struct Scores {
    const Call& c;
    const Block& block;
    int64_t words;        // words per key
    // [key][width] or null. If not null, the exponentials of the previous head, times `factor`, are added to the map
    // just before the scores of this head overwrite them. They are in cache then.
    float* map;
    const float* factor;  // [ROWS]
    bool begin;           // the map is uninitialised, so it is overwritten
    float* bias;          // [T][ROWS] bias of the current tile, or null
    float unit;           // scale * log2(e)
    float* top;           // [ROWS] running maxima
};

// Writes the scores of T keys from `first` on and V vectors of rows from lane i on, times log2(e), to s [T][width].
template <int E, int T, int V>
static void score_tile(const Scores& to, const float* qt, const float* k, int64_t stride, int64_t first, int i,
                       float* s) {
    vec acc[T][V];
    dot_tile<E>(qt + i, k, stride, to.words, acc);
    vec top[V];
    for (int v = 0; v < V; v++) top[v] = load(to.top + i + v * W);
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) {
            const int lane = i + v * W;
            // The same expression with and without a bias, so that the compiler fuses it alike in tiles of every size.
            const vec bias = to.bias ? load(to.bias + t * ROWS + lane) : vec{};
            vec score = acc[t][v] * to.unit + bias;
            score = bias == -INF ? bias : score;
            if (to.c.causal && first + t > to.block.lowest) {
                ivec rows;
                std::memcpy(&rows, to.block.number + lane, sizeof rows);
                score = rows < int32_t(first + t) ? splat(-INF) : score;
            }
            float* at = s + t * to.block.width + lane;
            if (to.map) {
                float* sum = to.map + (first + t) * to.block.width + lane;
                const vec weight = weighted(load(at), load(to.factor + lane));
                store(sum, to.begin ? weight : load(sum) + weight);
            }
            store(at, score);
            top[v] = score > top[v] ? score : top[v];
        }
    for (int v = 0; v < V; v++) store(to.top + i + v * W, top[v]);
}

// Calls f with `count` as a compile-time constant, at most MOST.
template <int MOST, class F>
static inline void with_count(int count, F f) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_count<MOST - 1>(count, f);
    f(std::integral_constant<int, MOST>());
}

// Calls f(T, V, from, i) for register tiles of T keys (from `from` on) and V vectors of rows (from row i on), which cover
// the keys first..last-1 and the rows of the block. Calls begin(from, till) before the tiles of keys from..till-1.
template <class Begin, class F>
static inline void by_tiles(const Block& block, int64_t first, int64_t last, Begin begin, F f) {
    const int most = block.vectors < VECS ? TILE / block.vectors : TILE / VECS, keys = most < KEYS ? most : KEYS;
    const int64_t tiles = (last - first + keys - 1) / keys;
    for (int64_t tile = 0; tile < tiles; tile++) {
        // As even as can be: a tile of few keys takes as long as a full one.
        const int64_t from = first + (last - first) * tile / tiles, till = first + (last - first) * (tile + 1) / tiles;
        begin(from, till);
        by_vectors(block, [&](auto V, int i) {
            constexpr int MOST = TILE / V < KEYS ? TILE / V : KEYS;
            with_count<MOST>(int(till - from), [&](auto T) { f(T, V, from, i); });
        });
    }
}

// Writes the scores of keys first..last-1 for head h to scratch.s [last - first][width], and the row maxima to top
// [ROWS]. If `factor` [ROWS] is given, the exponentials of the previous head, times `factor`, are added to scratch.map
// first.
template <class T>
static void scores(const Call& c, const Block& block, const Packed& kv, int64_t h, int64_t first, int64_t last,
                   const Scratch& scratch, float* top, const float* factor = nullptr) {
    float *map = factor ? scratch.map : nullptr, *bias = c.bias_kind ? scratch.bias : nullptr;
    const Scores to{c, block, in_words(c, c.D), map, factor, h == 1, bias, float(c.scale * LOG2E), top};
    const float* k = kv.keys(block.b, h);
    const int64_t stride = key_stride(c);
    auto begin = [&](int64_t from, int64_t till) {
        if (till < last) prefetch(k + till * stride, (till - from) * stride);
        if (to.bias) load_bias(c, block, h, from, int(till - from), to.bias);
    };
    by_tiles(block, first, last, begin, [&](auto N, auto V, int64_t from, int i) {
        float* s = scratch.s + (from - first) * block.width;
        score_tile<IN_WORD<T>, N, V>(to, scratch.qt, k + from * stride, stride, from, i, s);
    });
}

}  // namespace attnx
