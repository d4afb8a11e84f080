// What a call is about, how its work is cut into blocks, and what is copied before it begins.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace attnx {

constexpr int ROWS = 64;                         // of a block at most
constexpr int VECS = REGISTERS == 32 ? 4 : 2;    // vectors of rows in a register tile at most
constexpr int TILE = REGISTERS == 32 ? 24 : 12;  // accumulators of a register tile of scores
constexpr int KEYS = REGISTERS == 32 ? 12 : 6;   // keys of one at most
constexpr int OUT_ROWS = REGISTERS == 32 ? 8 : 4;  // rows in a register tile of the output, of two vectors
constexpr int CHUNK = 64;                        // keys between two visits of the output's accumulators
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

}  // namespace attnx
