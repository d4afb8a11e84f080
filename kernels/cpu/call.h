// The arguments of a call, the packed copies of K and V, and a block of query rows.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace attnx {

constexpr int ROWS = 64;                         // most rows of a block
constexpr int VECS = REGISTERS == 32 ? 4 : 2;    // most vectors of rows in a register tile
constexpr int TILE = REGISTERS == 32 ? 24 : 12;  // accumulators in a register tile of scores
constexpr int KEYS = REGISTERS == 32 ? 12 : 6;   // most keys in a register tile of scores
constexpr int OUT_ROWS = REGISTERS == 32 ? 8 : 4;  // rows of a register tile of the output, two vectors wide
constexpr int CHUNK = 64;                        // keys that are weighted per update of the output
constexpr int PASSED_KEYS = 192;                 // keys per work item of vecmat
constexpr double LOG2E = 1.44269504088896341;
constexpr float MASK_THRESHOLD = -5e4f;  // as attnx.ops.reducers.MASK_THRESHOLD
constexpr float LARGEST = std::numeric_limits<float>::max();
constexpr float INF = std::numeric_limits<float>::infinity();

enum Reduction : int64_t { MEAN, MAX, MIN, EACH };
enum BiasKind : int64_t { NO_BIAS, FLOAT, BOOL };
enum Statistic : int64_t { ENTROPY = 1, DISTANCE = 2, LARGEST_WEIGHT = 4, MASS = 8, IMPORTANCE = 16 };

// The arguments of a call. `native.py` fills the same structure. Strides count elements. A null pointer stands for an
// absent input, or for an output that is not computed.
struct Call {
    const void *q, *k, *v;           // [B, H, M, D], [B, Hk, N, D], [B, Hk, N, Dv], the last stride 1
    const void* bias;                // [bias_items, H, M, N], any strides; item b uses bias[b % bias_items]
    const int64_t* rows;             // [R] indices of query rows; null: all M rows
    const float* lse;                // [B, H, M]; if given, weights are exp(score - lse)
    const float* r;                  // [B, M], the vector of vecmat
    const void* grad;                // [B, H, M, Dv] output gradient, last stride 1; if given, the map is of P * dP
    const float *queries_at, *keys_at;  // [places, M, 2], [places, N, 2]: rows and columns on the grid, NaN for no place
    void* out;                       // [B, H, M, Dv], stored as [B, M, H, Dv]
    float *map, *lse_out, *passed;   // [B, R, N] or [B, H, R, N]; [B, H, M]; [B, N], the result of vecmat
    float* stats;                    // [number of `statistics`, B, H, M]
    float* scratch;                  // [attnx_scratch_floats(call)]
    int64_t B, H, Hk, M, N, D, Dv, R, bias_items, places, prefix;
    int64_t q_stride[3], k_stride[3], v_stride[3], bias_stride[4], grad_stride[3];
    int64_t half, heads, bias_kind, causal, threads, clamp, statistics;
    double scale;
};

static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Number of 32-bit words that hold n elements.
static int64_t in_words(const Call& c, int64_t n) { return c.half ? (n + PAIR - 1) / PAIR : n; }

static int64_t key_stride(const Call& c) { return round_up(in_words(c, c.D), 16); }
static int64_t value_stride(const Call& c) {
    return !c.v ? 0 : c.grad ? round_up(in_words(c, c.Dv), 16) : round_up(c.Dv, 2 * W);
}

// Copies of K and V of `slots` batch items, in words: K [slots][Hk][N][key_stride] and V [slots][Hk][N][value_stride].
// If words hold two bf16 elements, a word of V holds the values of two keys, and V has N / 2 rows (rounded up). With an
// output gradient, V has the layout of K.
struct Packed {
    float *k = nullptr, *v = nullptr;
    int64_t slots, size;             // batch items; words in total
    int64_t keys_size, values_size;  // words per head
    int64_t Hk, group;               // key heads; query heads per key head

    Packed(const Call& c, int64_t slots)
        : slots(slots), keys_size(c.N * key_stride(c)), values_size((c.grad ? c.N : in_words(c, c.N)) * value_stride(c)), Hk(c.Hk),
          group(c.H / c.Hk) {
        size = slots * Hk * (keys_size + values_size);
        if (c.scratch) k = c.scratch, v = c.scratch + slots * Hk * keys_size;
    }

    // Keys [N][key_stride] and values [N][value_stride] of batch item b for query head h.
    float* keys(int64_t b, int64_t h) const { return k + (b % slots * Hk + h / group) * keys_size; }
    float* values(int64_t b, int64_t h) const { return v + (b % slots * Hk + h / group) * values_size; }
};

// The scratch memory of one thread:
//   s [N][ROWS] scores, for vecmat [PASSED_KEYS][ROWS] and its sums [PASSED_KEYS][W]; map, far (distances) [N][ROWS];
//   qt [words of D][ROWS]; gt [words of Dv][ROWS]; o [ROWS][value_stride]; pairs [CHUNK / 2][ROWS]; bias [KEYS][ROWS].
struct Scratch {
    float *s, *map, *far, *qt, *gt, *o, *pairs, *bias;
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
        far = take(c.statistics & DISTANCE ? c.N * ROWS : 0);
        qt = take(in_words(c, c.D) * ROWS);
        gt = take(c.grad ? in_words(c, c.Dv) * ROWS : 0);
        o = take(c.out ? ROWS * value_stride(c) : 0);
        pairs = take(c.out && c.half && PAIR == 2 ? CHUNK / 2 * ROWS : 0);
        bias = take(KEYS * ROWS);
        size = at;
    }
};

// Copies n elements at p to `stride` words at `to`; the remaining words become zero.
template <class T>
static void copy_row(const T* p, int64_t n, float* to, int64_t stride) {
    constexpr int E = IN_WORD<T>;
    float* const end = to + stride;
    int64_t d = 0;
    for (; d + E * W <= n; d += E * W, to += W) store(to, words(p + d));
    for (; d < n; d += E) *to++ = word(p + d, n - d);
    while (to < end) *to++ = 0;
}

// Interleaves two rows of n elements into n words at `to`. The remaining words up to `stride` become zero. A null second
// row counts as zeros.
static inline void join_rows(const bf16* first, const bf16* second, int64_t n, float* to, int64_t stride) {
    int64_t d = 0;
    for (; d + W <= n; d += W) store(to + d, joined(load(first + d), second ? load(second + d) : vec{}));
    for (; d < n; d++) to[d] = word_of(uint32_t(second ? second[d].bits : 0) << 16 | first[d].bits);
    for (; d < stride; d++) to[d] = 0;
}

// Copies K and V of one key head of a batch item. For causal calls, returns true if all values are finite.
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
            nonfinite += value * 0.0f;  // for two bf16, this is the second, in the high bits
        }
        values += value_stride(c);
    }
    return sum_of(nonfinite) == 0;  // an infinity or NaN times 0 is NaN
}

// A block of query rows of one batch item.
struct Block {
    int64_t b, first, count;  // batch item, first row, number of rows
    int width, vectors;       // computed rows, `count` rounded up to whole vectors and output tiles; vectors per key
    int64_t row[ROWS];        // query row of each lane
    int32_t number[ROWS];     // `row` as 32-bit integers, for comparisons
    int64_t lowest, limit;    // smallest query row; number of keys that any row may attend

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
