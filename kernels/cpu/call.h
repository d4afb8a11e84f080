// What a call is about, what of K and V is copied, and a block of its rows.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace attnx {

constexpr int ROWS = 64;                         // of a block at most
constexpr int VECS = REGISTERS == 32 ? 4 : 2;    // vectors of rows in a register tile at most
constexpr int TILE = REGISTERS == 32 ? 24 : 12;  // accumulators of a register tile of scores
constexpr int KEYS = REGISTERS == 32 ? 12 : 6;   // keys of one at most
constexpr int OUT_ROWS = REGISTERS == 32 ? 8 : 4;  // rows of one of the output, which is two vectors wide
constexpr int CHUNK = 64;                        // keys between two visits of the output's accumulators
constexpr int PASSED_KEYS = 192;                 // of one piece of vecmat's work
constexpr double LOG2E = 1.44269504088896341;
constexpr float MASK_THRESHOLD = -5e4f;  // as attnx.reducers.MASK_THRESHOLD
constexpr float LARGEST = std::numeric_limits<float>::max();
constexpr float INF = std::numeric_limits<float>::infinity();

enum Reduction : int64_t { MEAN, MAX, MIN, EACH };
enum BiasKind : int64_t { NO_BIAS, FLOAT, BOOL };

// What a call is about; `native.py` fills the same structure. Strides count elements. Null pointers are not wanted.
struct Call {
    const void *q, *k, *v;           // [B, H, M, D], [B, Hk, N, D], [B, Hk, N, Dv], the last stride 1
    const void* bias;                // [B, H, M, N], any strides
    const int64_t* rows;             // [R] query rows, or null: all M
    const float* lse;                // [B, H, M] given: weights are exp(score - lse)
    const float* r;                  // [B, M] of vecmat
    const void* grad;                // [B, H, M, Dv] of the output: the map is of P times its gradient; last stride 1
    void* out;                       // [B, H, M, Dv], rows before heads
    float *map, *lse_out, *passed;   // [B, R, N] or [B, H, R, N]; [B, H, M]; [B, N]
    float* scratch;                  // as many as `attnx_scratch_floats` says
    int64_t B, H, Hk, M, N, D, Dv, R;
    int64_t q_stride[3], k_stride[3], v_stride[3], bias_stride[4], grad_stride[3];
    int64_t half, heads, bias_kind, causal, threads, clamp;
    double scale;
};

static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The words of n elements.
static int64_t in_words(const Call& c, int64_t n) { return c.half ? (n + PAIR - 1) / PAIR : n; }

static int64_t key_stride(const Call& c) { return round_up(in_words(c, c.D), 16); }
static int64_t value_stride(const Call& c) {
    return !c.v ? 0 : c.grad ? round_up(in_words(c, c.Dv), 16) : round_up(c.Dv, 2 * W);
}

// K and V of as many items as there are slots, in words: [slot][Hk][N][key_stride], and [slot][Hk][N][value_stride]; of
// V, a word of two is of two keys, and there are half as many rows. Where V meets a gradient it lies as K does.
struct Packed {
    float *k = nullptr, *v = nullptr;
    int64_t slots, size;             // and the words of all
    int64_t keys_size, values_size;  // words of a head
    int64_t Hk, group;               // heads of keys, and of queries for each

    Packed(const Call& c, int64_t slots)
        : slots(slots), keys_size(c.N * key_stride(c)), values_size((c.grad ? c.N : in_words(c, c.N)) * value_stride(c)), Hk(c.Hk),
          group(c.H / c.Hk) {
        size = slots * Hk * (keys_size + values_size);
        if (c.scratch) k = c.scratch, v = c.scratch + slots * Hk * keys_size;
    }

    // An item's keys and values for a head of queries.
    float* keys(int64_t b, int64_t h) const { return k + (b % slots * Hk + h / group) * keys_size; }
    float* values(int64_t b, int64_t h) const { return v + (b % slots * Hk + h / group) * values_size; }
};

// The parts of one thread's scratch.
struct Scratch {
    float *s, *map, *qt, *gt, *o, *pairs, *bias;
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
        qt = take(in_words(c, c.D) * ROWS);
        gt = take(c.grad ? in_words(c, c.Dv) * ROWS : 0);
        o = take(c.out ? ROWS * value_stride(c) : 0);
        pairs = take(c.out && c.half && PAIR == 2 ? CHUNK / 2 * ROWS : 0);
        bias = take(KEYS * ROWS);
        size = at;
    }
};

// [n] elements at p as words; the rest of the stride is zero.
template <class T>
static void copy_row(const T* p, int64_t n, float* to, int64_t stride) {
    constexpr int E = IN_WORD<T>;
    float* const end = to + stride;
    int64_t d = 0;
    for (; d + E * W <= n; d += E * W, to += W) store(to, words(p + d));
    for (; d < n; d += E) *to++ = word(p + d, n - d);
    while (to < end) *to++ = 0;
}

// Two rows of [n] elements as one of words; the rest of the stride is zero, and so is a second row that is null.
static inline void join_rows(const bf16* first, const bf16* second, int64_t n, float* to, int64_t stride) {
    int64_t d = 0;
    for (; d + W <= n; d += W) store(to + d, joined(load(first + d), second ? load(second + d) : vec{}));
    for (; d < n; d++) to[d] = word_of(uint32_t(second ? second[d].bits : 0) << 16 | first[d].bits);
    for (; d < stride; d++) to[d] = 0;
}

// K and V of one head of one item. Whether all values are finite, if that matters.
template <class T>
static bool pack(const Call& c, const Packed& to, int64_t b, int64_t head) {
    constexpr int E = IN_WORD<T>;
    const T* k = (const T*)c.k + b * c.k_stride[0] + head * c.k_stride[1];
    const T* v = (const T*)c.v + b * c.v_stride[0] + head * c.v_stride[1];
    float *keys = to.keys(b, head * to.group), *values = to.values(b, head * to.group);
    vec nonfinite = vec{};
    for (int64_t j = 0; j < c.N; j++) {
        copy_row(k + j * c.k_stride[2], c.D, keys + j * key_stride(c), key_stride(c));
        if (!c.v || (j % E && !c.grad)) continue;
        const T* row = v + j * c.v_stride[2];
        if (c.grad)
            copy_row(row, c.Dv, values, value_stride(c));
        else if constexpr (E == 1)
            copy_row(row, c.Dv, values, value_stride(c));
        else
            join_rows(row, j + 1 < c.N ? row + c.v_stride[2] : nullptr, c.Dv, values, value_stride(c));
        for (int64_t d = 0; c.causal && d < value_stride(c); d += W) {
            const vec value = load(values + d);
            if (E == 2) nonfinite += (vec)((uvec)value << 16) * 0.0f;
            nonfinite += value * 0.0f;  // of two bf16 the second one, since it has the exponent
        }
        values += value_stride(c);
    }
    return sum_of(nonfinite) == 0;  // NaN of an infinity or a NaN
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

}  // namespace attnx
