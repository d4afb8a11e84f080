// Exact attention with its head-reduced map, for CPUs; `attnx/backends/native.py` calls it.
//
// A block of query rows at a time, and one head after another: the scores of all its keys, softmax, into the block's
// map, times V. What a block needs stays in cache. Scores stand transposed, [keys][rows], a vector being W rows of one
// key: so a row's maximum and sum need nothing from other lanes. K and V are first copied to rows that follow one
// another, in float: those of a packed qkv lie in pages of their own, and no hardware foresees them.
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <queue>
#include <system_error>
#include <thread>
#include <vector>

#include "simd.h"

namespace attnx {

constexpr int ROWS = 64;                         // of a block at most
constexpr int VECS = REGISTERS == 32 ? 4 : 2;    // vectors of rows in a register tile at most
constexpr int TILE = REGISTERS == 32 ? 24 : 12;  // accumulators of a register tile of scores
constexpr int KEYS = REGISTERS == 32 ? 12 : 6;   // keys of one at most
constexpr int OUT_ROWS = REGISTERS == 32 ? 8 : 4;  // rows in a register tile of the output, of two vectors
constexpr int CHUNK = 64;                        // keys between two visits of the output's accumulators
constexpr int BLOCK_COST = 3;                    // of a block beside its rows, as if they were so many more
constexpr int PASSED_KEYS = 192;                 // of one piece of vecmat's work
constexpr int64_t PACKED = 4 << 20;              // floats of K and V that are copied at a time, if an item has no more
constexpr double LOG2E = 1.44269504088896341;
constexpr float HIDDEN = -5e4f;  // as attnx.reducers.HIDDEN
constexpr float LARGEST = std::numeric_limits<float>::max();
constexpr float INF = std::numeric_limits<float>::infinity();

enum Heads : int64_t { MEAN, MAX, MIN, EACH };
enum BiasKind : int64_t { NO_BIAS, FLOAT, BOOL };

// What a call is about; `native.py` fills the same structure. Strides count elements. Null pointers are not wanted.
struct Call {
    const void *q, *k, *v;           // [B, H, M, D], [B, Hk, N, D], [B, Hk, N, Dv], the last stride 1
    const void* bias;                // [B, H, M, N], any strides
    const int64_t* rows;             // [R] query rows, or null: all M
    const float* lse;                // [B, H, M] given: weights are exp(score - lse)
    const float* r;                  // [B, M] of vecmat
    void* out;                       // [B, H, M, Dv], rows before heads
    float *map, *lse_out, *passed;   // [B, R, N] or [B, H, R, N]; [B, H, M]; [B, N]
    float* scratch;                  // as many as `attnx_scratch_floats` says
    int64_t B, H, Hk, M, N, D, Dv, R;
    int64_t q_stride[3], k_stride[3], v_stride[3], bias_stride[4];
    int64_t half, heads, bias_kind, causal, threads;
    double scale;
};

static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static int64_t key_stride(const Call& c) { return round_up(c.D, 16); }
static int64_t value_stride(const Call& c) { return c.v ? round_up(c.Dv, 2 * W) : 0; }

// K and V of some items: [item][Hk][N][key_stride] and [item][Hk][N][value_stride].
struct Packed {
    float *k = nullptr, *v = nullptr;
    int64_t first = 0, items, size;  // which items, and the floats of all

    explicit Packed(const Call& c) {
        const int64_t keys = c.Hk * c.N * key_stride(c), values = c.Hk * c.N * value_stride(c);
        items = PACKED / (keys + values + 1);
        items = items < 1 ? 1 : items > c.B ? c.B : items;
        size = items * (keys + values);
        if (c.scratch) k = c.scratch, v = c.scratch + items * keys;
    }

    // The first row of an item's keys and values for a head of queries.
    int64_t row(const Call& c, int64_t b, int64_t h) const { return ((b - first) * c.Hk + h / (c.H / c.Hk)) * c.N; }
};

// The parts of one thread's scratch.
struct Scratch {
    float *s, *map, *qt, *o, *bias;
    int64_t size;

    explicit Scratch(const Call& c, float* base = nullptr) {
        int64_t at = 0;
        auto take = [&](int64_t n) {
            float* p = base ? base + at : nullptr;
            at += round_up(n, 16);
            return p;
        };
        s = take(c.passed ? PASSED_KEYS * (ROWS + W) : c.N * ROWS);
        map = take(c.map && c.heads != EACH ? c.N * ROWS : 0);
        qt = take(c.D * ROWS);
        o = take(ROWS * value_stride(c));
        bias = take(KEYS * ROWS);
        size = at;
    }
};

// [n] elements at p as floats; the rest of the stride is zero.
template <class T>
static void widen_row(const T* p, int64_t n, float* to, int64_t stride) {
    int64_t d = 0;
    for (; d + W <= n; d += W) store(to + d, load(p + d));
    for (; d < n; d++) to[d] = widen(p[d]);
    for (; d < stride; d++) to[d] = 0;
}

// K and V of one head of one item. Whether all values are finite, if that matters.
template <class T>
static bool pack(const Call& c, const Packed& to, int64_t item, int64_t head) {
    const int64_t b = to.first + item, plane = (item * c.Hk + head) * c.N;
    const T* k = (const T*)c.k + b * c.k_stride[0] + head * c.k_stride[1];
    const T* v = (const T*)c.v + b * c.v_stride[0] + head * c.v_stride[1];
    vec strange = vec{};
    for (int64_t j = 0; j < c.N; j++) {
        widen_row(k + j * c.k_stride[2], c.D, to.k + (plane + j) * key_stride(c), key_stride(c));
        if (!c.v) continue;
        float* values = to.v + (plane + j) * value_stride(c);
        widen_row(v + j * c.v_stride[2], c.Dv, values, value_stride(c));
        for (int64_t d = 0; c.causal && d < value_stride(c); d += W) strange += load(values + d) * 0.0f;
    }
    return sum_of(strange) == 0;  // NaN of an infinity or a NaN
}

// One block of query rows: which they are, and what is known of them.
struct Block {
    int64_t b, first, count;  // item, first row, rows
    int width, vectors;       // rows that are computed, at least `count`: whole vectors and tiles of the output
    int64_t row[ROWS];        // the query row of every lane
    int32_t number[ROWS];     // the same, for comparisons
    int64_t lowest, limit;    // the first of them, and the keys that any of them may see

    Block(const Call& c, int64_t b, int64_t first, int64_t count, bool all_keys = false)
        : b(b), first(first), count(count), lowest(c.M), limit(c.N) {
        width = int(round_up(count, W > OUT_ROWS ? W : OUT_ROWS));
        vectors = width / W;
        int64_t last = 0;
        for (int i = 0; i < ROWS; i++) {
            const int64_t at = first + (i < count ? i : 0);
            row[i] = c.rows ? c.rows[at] : at;
            number[i] = int32_t(row[i]);
            last = row[i] > last ? row[i] : last;
            lowest = row[i] < lowest ? row[i] : lowest;
        }
        if (c.causal && !all_keys && last + 1 < limit) limit = last + 1;
    }
};

// The block's queries of head h as [D][ROWS].
template <class T>
static void load_queries(const Call& c, const Block& block, int64_t h, float* qt) {
    const T* q = (const T*)c.q + block.b * c.q_stride[0] + h * c.q_stride[1];
    for (int i = 0; i < block.width; i += W) {
        int64_t d = 0;
        for (; d + W <= c.D; d += W) {
            vec tile[W];
            for (int t = 0; t < W; t++) tile[t] = load(q + block.row[i + t] * c.q_stride[2] + d);
            transpose(tile);
            for (int t = 0; t < W; t++) store(qt + (d + t) * ROWS + i, tile[t]);
        }
        for (; d < c.D; d++)
            for (int t = 0; t < W; t++) qt[d * ROWS + i + t] = widen(q[block.row[i + t] * c.q_stride[2] + d]);
    }
}

// Asks for floats that are wanted next.
static inline void prefetch(const float* p, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(p + i);
}

// acc[t][v] = the dot products of key t with vector v of rows. The keys are reached from every third one, so that
// their addresses fit the registers.
template <int T, int V>
static inline __attribute__((always_inline)) void dot_tile(const float* qt, const float* k, int64_t stride, int64_t D,
                                                           vec (&acc)[T][V]) {
    const float* base[(T + 2) / 3];
    for (int t = 0; t < T; t += 3) base[t / 3] = k + t * stride;
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) acc[t][v] = vec{};
    ATTNX_UNROLL for (int64_t d = 0; d < D; d++, qt += ROWS) {
        vec q[V];
        for (int v = 0; v < V; v++) q[v] = load(qt + v * W);
        for (int t = 0; t < T; t++) {
            const vec key = splat(base[t / 3][(t % 3) * stride]);
            for (int v = 0; v < V; v++) acc[t][v] += key * q[v];
        }
        for (auto& p : base) p++;
    }
}

// A finite number times log2(e), finite as well.
static float in_base_2(float x) {
    const float y = float(x * LOG2E);
    return std::isinf(y) && !std::isinf(x) ? std::copysign(LARGEST, x) : y;
}

// The bias of T keys from `first` on, times log2(e), as [T][ROWS]; minus infinity hides.
static void load_bias(const Call& c, const Block& block, int64_t h, int64_t first, int T, float* tile) {
    const int64_t *stride = c.bias_stride, at = block.b * stride[0] + h * stride[1];
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
                to[i] = floats[from] < HIDDEN ? -INF : in_base_2(floats[from]);
        }
        for (int i = lanes; i < block.width; i++) to[i] = to[0];
    }
}

// f(V, i) for all vectors of a block's rows, in groups of V (a constant) from row i on.
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

// Exponentials times a factor, which is zero for rows without keys.
static inline vec weighted(vec p, vec factor) { return factor == 0.0f ? vec{} : p * factor; }

struct Scores {
    const Call& c;
    const Block& block;
    float* map;           // [key][width], or null: to it go the exponentials of the head before, times `factor`, when
    const float* factor;  // scores take their place: they are in cache then, and the units that multiply have time
    bool begin;           // nothing is in the map yet
    float* bias;  // room for a tile
    float unit;   // scale * log2(e)
    float* top;   // [ROWS] running maxima
};

// Scores of T keys from `first` on and V vectors of rows from lane i on, times log2(e), into s [key][width].
template <int T, int V>
static void score_tile(const Scores& to, const float* qt, const float* k, int64_t stride, int64_t first, int i,
                       float* s) {
    vec acc[T][V];
    dot_tile<T, V>(qt + i, k, stride, to.c.D, acc);
    vec top[V];
    for (int v = 0; v < V; v++) top[v] = load(to.top + i + v * W);
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) {
            const int lane = i + v * W;
            // One expression, with or without a bias, so that it is fused alike in tiles of every size.
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

template <int T, int V>
static void score_keys(const Scores& to, int count, const float* qt, const float* k, int64_t stride, int64_t first,
                       int i, float* s) {
    if constexpr (T > 1)
        if (count < T) return score_keys<T - 1, V>(to, count, qt, k, stride, first, i, s);
    score_tile<T, V>(to, qt, k, stride, first, i, s);
}

// Scores of the keys first..last-1 and head h into room.s [key - first][width], and their maxima into top. With the
// factors of the head before, its exponentials go into room.map first.
static void scores(const Call& c, const Block& block, const Packed& kv, int64_t h, int64_t first, int64_t last,
                   const Scratch& room, float* top, const float* factor = nullptr) {
    const Scores to{c, block, factor ? room.map : nullptr, factor, h == 1, c.bias_kind ? room.bias : nullptr, float(c.scale * LOG2E), top};
    const float* k = kv.k + kv.row(c, block.b, h) * key_stride(c);
    const int most = block.vectors < VECS ? TILE / block.vectors : TILE / VECS, keys = most < KEYS ? most : KEYS;
    const int64_t tiles = (last - first + keys - 1) / keys;
    for (int64_t tile = 0; tile < tiles; tile++) {
        // As even as can be: a tile of few keys takes as long as a full one.
        const int64_t from = first + (last - first) * tile / tiles, till = first + (last - first) * (tile + 1) / tiles;
        if (till < last) prefetch(k + till * key_stride(c), (till - from) * key_stride(c));
        if (to.bias) load_bias(c, block, h, from, int(till - from), to.bias);
        by_vectors(block, [&](auto V, int i) {
            constexpr int T = TILE / V < KEYS ? TILE / V : KEYS;
            score_keys<T, V>(to, int(till - from), room.qt, k + from * key_stride(c), key_stride(c), from, i,
                             room.s + (from - first) * block.width);
        });
    }
}

// o [OUT_ROWS][V * W] += p^T v for `count` keys: p [key] of stride `width`, v [key] and o [row] of stride dv.
template <int V>
static inline void weigh_tile(const float* p, int64_t width, const float* v, int64_t dv, int64_t count, float* o) {
    // From zero, and added to the sum of all keys at the end: a chain of thousands of additions loses digits.
    vec acc[OUT_ROWS][V];
    for (int i = 0; i < OUT_ROWS; i++)
        for (int d = 0; d < V; d++) acc[i][d] = vec{};
    ATTNX_UNROLL for (int64_t j = 0; j < count; j++, p += width, v += dv) {
        vec value[V];
        for (int d = 0; d < V; d++) value[d] = load(v + d * W);
        for (int i = 0; i < OUT_ROWS; i++) {
            const vec weight = splat(p[i]);
            for (int d = 0; d < V; d++) acc[i][d] += weight * value[d];
        }
    }
    for (int i = 0; i < OUT_ROWS; i++)
        for (int d = 0; d < V; d++) store(o + i * dv + d * W, load(o + i * dv + d * W) + acc[i][d]);
}

// The weights of `count` keys from `first` on times their values, added to the block's output.
static void weigh(const Call& c, const Block& block, const Packed& kv, int64_t h, int64_t first, int64_t count,
                  const Scratch& room) {
    const int64_t dv = value_stride(c);
    const float* v = kv.v + (kv.row(c, block.b, h) + first) * dv;
    const float* p = room.s + first * block.width;
    if (first + count < block.limit) prefetch(v + count * dv, count * dv);
    for (int64_t i = 0; i < block.count; i += OUT_ROWS) {
        int64_t d = 0;
        for (; d + 2 * W <= c.Dv; d += 2 * W) weigh_tile<2>(p + i, block.width, v + d, dv, count, room.o + i * dv + d);
        for (; d < c.Dv; d += W) weigh_tile<1>(p + i, block.width, v + d, dv, count, room.o + i * dv + d);
    }
}

// s of `count` keys becomes exp2(s - shift); adds the sums to `total`.
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

// One more head into the block's map [key][width]: exponentials times each row's own factor.
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

// [key][width] times each row's factor to the rows of a map; beyond the block's limit zero, or NaN where the row is.
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

// All that a call wants of one block of rows.
template <class T>
static void attend(const Call& c, const Block& block, const Packed& kv, const Scratch& room) {
    float shift[ROWS], total[ROWS], factor[ROWS], fused[ROWS];
    for (int64_t h = 0; h < c.H; h++) {
        load_queries<T>(c, block, h, room.qt);
        for (float& x : shift) x = -INF;
        scores(c, block, kv, h, 0, block.limit, room, shift, c.map && c.heads == MEAN && h > 0 ? fused : nullptr);
        const int64_t head = (block.b * c.H + h) * c.M;
        for (int i = 0; i < ROWS; i++) {
            if (c.lse) shift[i] = float(c.lse[head + block.row[i]] * LOG2E);
            total[i] = 0;
            fused[i] = std::isinf(shift[i]) ? 0 : 1;
            if (shift[i] == -INF || (c.lse && shift[i] == INF)) shift[i] = 0;
        }
        if (c.out) std::memset(room.o, 0, ROWS * value_stride(c) * sizeof(float));
        for (int64_t j = 0; j < block.limit; j += CHUNK) {
            const int64_t count = block.limit - j < CHUNK ? block.limit - j : CHUNK;
            exponentiate(block, room.s + j * block.width, count, shift, total);
            if (c.out) weigh(c, block, kv, h, j, count, room);
        }
        for (int i = 0; i < ROWS; i++) {
            // Only a bias leaves a row without keys; scores that are all -inf make it NaN, as softmax does.
            factor[i] = c.bias_kind && total[i] == 0 ? 0 : 1 / total[i];
            if (!c.lse) fused[i] = factor[i];
            if (c.lse_out && i < block.count)
                c.lse_out[head + block.row[i]] =
                    total[i] == 0 ? -INF : float((shift[i] + std::log2(double(total[i]))) / LOG2E);
        }
        if (c.out) store_out<T>(c, block, h, room.o, factor);
        if (!c.map) continue;
        if (c.heads == MEAN)
            for (float& x : fused) x /= float(c.H);
        if (c.heads == EACH)
            store_map(c, block, room.s, fused, c.map + ((block.b * c.H + h) * c.R + block.first) * c.N);
        else if (c.heads == MEAN && h + 1 < c.H)
            continue;  // the next head's scores see to it
        else if (h == 0)
            fuse<MEAN, true>(block, room.s, fused, room.map);
        else if (c.heads == MEAN)
            fuse<MEAN, false>(block, room.s, fused, room.map);
        else if (c.heads == MAX)
            fuse<MAX, false>(block, room.s, fused, room.map);
        else
            fuse<MIN, false>(block, room.s, fused, room.map);
    }
    if (c.map && c.heads != EACH) {
        for (float& x : fused) x = 1;
        store_map(c, block, room.map, fused, c.map + (block.b * c.R + block.first) * c.N);
    }
}

// passed[b, first..last-1] of vecmat: the keys' weights in all rows and heads, each row's times its r.
template <class T>
static void pass_on(const Call& c, int64_t b, int64_t first, int64_t last, const Packed& kv, const Scratch& room) {
    float* sums = room.s + (last - first) * ROWS;
    std::memset(sums, 0, (last - first) * W * sizeof(float));
    float top[ROWS] = {}, shift[ROWS], r[ROWS], total[ROWS] = {};
    for (int64_t start = 0; start < c.M; start += ROWS) {
        const Block block(c, b, start, c.M - start < ROWS ? c.M - start : ROWS);
        const int64_t stop = last < block.limit ? last : block.limit;
        bool any = false;
        for (int i = 0; i < ROWS; i++) {
            r[i] = i < block.count ? c.r[b * c.M + start + i] : 0;
            any = any || r[i] != 0;
        }
        if (!any) continue;
        for (int64_t h = 0; h < c.H; h++) {
            // Beyond the block's limit a row passes nothing on; but all of a row is NaN if anything is.
            const float* lse = c.lse + (b * c.H + h) * c.M;
            for (int i = 0; i < block.count; i++)
                if (r[i] != 0 && (r[i] != r[i] || lse[block.row[i]] != lse[block.row[i]]))
                    for (int64_t j = stop < first ? first : stop; j < last; j++) sums[(j - first) * W] = NAN;
            if (first >= stop) continue;
            load_queries<T>(c, block, h, room.qt);
            scores(c, block, kv, h, first, stop, room, top);
            float weight[ROWS];
            for (int i = 0; i < ROWS; i++) {
                shift[i] = float(lse[block.row[i]] * LOG2E);
                weight[i] = std::isinf(shift[i]) ? 0 : r[i];
                if (std::isinf(shift[i])) shift[i] = 0;
            }
            exponentiate(block, room.s, stop - first, shift, total);
            for (int64_t j = 0; j < stop - first; j++) {
                vec sum = vec{};
                for (int i = 0; i < block.width; i += W) {
                    const vec factor = load(weight + i);
                    const vec p = load(room.s + j * block.width + i) * factor;
                    sum += factor == 0.0f ? vec{} : p;  // zero times NaN is NaN
                }
                store(sums + j * W, load(sums + j * W) + sum);
            }
        }
    }
    for (int64_t j = 0; j < last - first; j++) c.passed[b * c.N + first + j] = sum_of(load(sums + j * W)) / float(c.H);
}

// How long c.threads take for blocks of so many rows, if each takes the next block when it is done with one; in rows.
static int64_t duration(const Call& c, int64_t rows) {
    std::priority_queue<int64_t, std::vector<int64_t>, std::greater<int64_t>> done;
    for (int64_t i = 0; i < c.threads; i++) done.push(0);
    int64_t last = 0;
    for (int64_t b = 0; b < c.B; b++)
        for (int64_t first = 0; first < c.R; first += rows) {
            const int64_t left = c.R - first, at = done.top() + round_up(left < rows ? left : rows, 16) + BLOCK_COST;
            done.pop();
            done.push(at);
            if (at > last) last = at;
        }
    return last;
}

// Rows of a block: as many as can be, but where blocks are few, so many that no thread is long alone with the last one.
static int64_t best_rows(const Call& c) {
    int64_t best = ROWS;
    if (c.threads == 1 || c.B * c.R >= 4 * ROWS * c.threads) return best;
    int64_t least = duration(c, best);
    for (int64_t rows = ROWS - 16; rows > 0; rows -= 16) {
        const int64_t time = duration(c, rows);
        if (time < least) best = rows, least = time;
    }
    return best;
}

// The work in pieces that don't depend on one another; a row's result doesn't depend on how they are cut.
struct Work {
    const Call& c;
    Packed kv;
    float* scratch;
    int64_t rows;    // of a block, see `best_rows`
    bool packing;    // K and V, which comes first
    int64_t pieces;  // of every item
    std::atomic<int64_t> next{0}, thread{0};
    std::atomic<bool> all_keys{false};  // a value that is not finite: times a weight of zero it is NaN

    explicit Work(const Call& c) : c(c), kv(c), scratch(c.scratch ? c.scratch + kv.size : nullptr), rows(best_rows(c)) {}

    void begin(bool pack) {
        packing = pack;
        pieces = pack ? c.Hk : c.passed ? (c.N + PASSED_KEYS - 1) / PASSED_KEYS : (c.R + rows - 1) / rows;
        next = thread = 0;
    }

    template <class T>
    void run() {
        const Scratch room(c, scratch + thread++ * Scratch(c).size);
        for (int64_t piece; (piece = next++) < kv.items * pieces;) {
            const int64_t item = piece / pieces, b = kv.first + item, at = piece % pieces;
            if (b >= c.B) break;
            if (packing) {
                if (!pack<T>(c, kv, item, at)) all_keys = true;
            } else if (c.passed) {
                const int64_t last = (at + 1) * PASSED_KEYS;
                pass_on<T>(c, b, at * PASSED_KEYS, last < c.N ? last : c.N, kv, room);
            } else {
                const int64_t left = c.R - at * rows;
                attend<T>(c, Block(c, b, at * rows, left < rows ? left : rows, all_keys), kv, room);
            }
        }
    }

    // How many threads there is work for.
    int64_t threads() const {
        const int64_t all = kv.items * pieces;
        return all < c.threads ? all : c.threads;
    }

    static void enter(void* self) {
        auto& work = *(Work*)self;
        work.c.half ? work.run<bf16>() : work.run<float>();
    }
};

// GOMP_parallel of an OpenMP runtime: calls a function in so many threads, this one included.
typedef void Parallel(void (*)(void*), void*, unsigned, unsigned);

static void in_threads(Work& work, Parallel* parallel) {
    const unsigned threads = unsigned(work.threads());
    if (threads <= 1) return Work::enter(&work);
    if (parallel) return parallel(Work::enter, &work, threads, 0);
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (unsigned i = 1; i < threads; i++) others.emplace_back(Work::enter, &work);
    } catch (const std::system_error&) {
        // No more threads to be had: those that there are do all of the work.
    }
    Work::enter(&work);
    for (auto& other : others) other.join();
}

}  // namespace attnx

extern "C" {

// Size of Call, so that its twin in Python can be compared.
int64_t attnx_call_size() { return sizeof(attnx::Call); }

// Floats in a vector.
int64_t attnx_width() { return attnx::W; }

// What a call needs of scratch.
int64_t attnx_scratch_floats(const attnx::Call* call) {
    attnx::Work work(*call);
    int64_t threads = 0;
    for (const bool pack : {true, false}) {
        work.begin(pack);
        if (work.threads() > threads) threads = work.threads();
    }
    return work.kv.size + threads * attnx::Scratch(*call).size;
}

// With `parallel` of the OpenMP runtime that torch uses: its threads are there already, and a second pool beside them
// would fight for the cores. Null where there is none: then threads of our own.
void attnx_run(const attnx::Call* call, attnx::Parallel* parallel) {
    using namespace attnx;
    Work work(*call);
    for (; work.kv.first < call->B; work.kv.first += work.kv.items)
        for (const bool pack : {true, false}) {
            work.begin(pack);
            in_threads(work, parallel);
        }
}
}
