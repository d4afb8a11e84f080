// Statistics of each row of weights: entropy, mean distance, largest weight, mass on the prefix tokens, and importance.
#pragma once

#include "weights.h"

namespace attnx {

// Sums over the keys of the weights of a block, before they are divided by their total.
struct Sums {
    float logs[ROWS] = {};       // of p log2(p)
    float distances[ROWS] = {};  // of p times the distance of query and key
    float mass[ROWS] = {};       // of p of the first `c.prefix` keys
    float importance[ROWS] = {}; // of the magnitude of p times its gradient
};

// Writes the distance of each query of the block to each key, to [key][width]. It is 0 for keys without a place, and NaN
// for queries without one.
static void distances(const Call& c, const Block& block, float* to) {
    const int64_t item = block.b % c.places;
    const float *queries = c.queries_at + item * c.M * 2, *keys = c.keys_at + item * c.N * 2;
    float row[ROWS], column[ROWS];
    for (int i = 0; i < ROWS; i++) row[i] = queries[2 * block.row[i]], column[i] = queries[2 * block.row[i] + 1];
    for (int64_t j = 0; j < block.limit; j++, to += block.width) {
        const float y = keys[2 * j], x = keys[2 * j + 1];
        const bool placed = y == y;
        for (int i = 0; i < block.width; i++) {
            const float dy = row[i] - (placed ? y : row[i]), dx = column[i] - (placed ? x : column[i]);
            to[i] = dy * dy + dx * dx;
        }
        for (int i = 0; i < block.width; i += W) store(to + i, square_root(load(to + i)));
    }
}

// `exponentiate`, which also adds to the sums of logs and distances; `far` [count][width] are the distances.
template <bool LOGS, bool DISTANCES>
static void exponentiate_with(const Block& block, float* s, int64_t count, const float* shift, float* total,
                              const float* far, Sums& sums) {
    by_vectors(block, [&](auto V, int i) {
        vec minus[V], sum[V], logs[V], distance[V];
        for (int v = 0; v < V; v++) minus[v] = load(shift + i + v * W), sum[v] = logs[v] = distance[v] = vec{};
        float* at = s + i;
        for (int64_t j = 0; j < count; j++, at += block.width)
            for (int v = 0; v < V; v++) {
                const vec x = load(at + v * W) - minus[v], p = exp2(x);
                store(at + v * W, p);
                sum[v] += p;
                // The weight is 0 below -126, and 0 times minus infinity would be NaN.
                if (LOGS) logs[v] += p * (x < -126.0f ? vec{} : x);
                if (DISTANCES) distance[v] += p * load(far + j * block.width + i + v * W);
            }
        for (int v = 0; v < V; v++) {
            const int lane = i + v * W;
            store(total + lane, load(total + lane) + sum[v]);
            if (LOGS) store(sums.logs + lane, load(sums.logs + lane) + logs[v]);
            if (DISTANCES) store(sums.distances + lane, load(sums.distances + lane) + distance[v]);
        }
    });
}

// `exponentiate` of the keys first..first+count-1 in scratch.s, and what the statistics need of them.
static void exponentiate_and_sum(const Call& c, const Block& block, const Scratch& scratch, int64_t first,
                                 int64_t count, const float* shift, float* total, Sums& sums) {
    float* s = scratch.s + first * block.width;
    const float* far = scratch.far + first * block.width;
    const bool logs = c.statistics & ENTROPY, distances = c.statistics & DISTANCE;
    if (logs && distances)
        exponentiate_with<true, true>(block, s, count, shift, total, far, sums);
    else if (logs)
        exponentiate_with<true, false>(block, s, count, shift, total, far, sums);
    else if (distances)
        exponentiate_with<false, true>(block, s, count, shift, total, far, sums);
    else
        exponentiate(block, s, count, shift, total);
    for (int64_t j = first; c.statistics & MASS && j < first + count && j < c.prefix; j++)
        for (int i = 0; i < block.width; i += W)
            store(sums.mass + i, load(sums.mass + i) + load(scratch.s + j * block.width + i));
}

// Adds the magnitudes of scratch.s [key][width], which are weights times their gradients.
static void sum_magnitudes(const Block& block, const float* s, Sums& sums) {
    for (int64_t first = 0; first < block.limit; first += CHUNK)
        by_vectors(block, [&](auto V, int i) {
            vec sum[V];
            for (int v = 0; v < V; v++) sum[v] = vec{};
            for (int64_t j = first; j < block.limit && j < first + CHUNK; j++)
                for (int v = 0; v < V; v++) {
                    const vec x = load(s + j * block.width + i + v * W);
                    sum[v] += x < 0.0f ? -x : x;
                }
            for (int v = 0; v < V; v++) {
                const int lane = i + v * W;
                store(sums.importance + lane, load(sums.importance + lane) + sum[v]);
            }
        });
}

// Writes the statistics of head h to c.stats, one [B, H, M] after another, in the order of `Statistic`.
//   top: the largest scores [ROWS]; shift: what was subtracted from the scores; factor: what turns the exponentials into
//   weights, 0 for rows without keys.
static void store_statistics(const Call& c, const Block& block, const Scratch& scratch, int64_t h, const float* top,
                             const float* shift, const float* total, const float* factor, const Sums& sums) {
    float* to = c.stats + (block.b * c.H + h) * c.M;
    auto write = [&](int64_t statistic, auto value) {
        if (!(c.statistics & statistic)) return;
        for (int i = 0; i < block.count; i++) to[block.row[i]] = value(i);
        to += c.B * c.H * c.M;
    };
    write(ENTROPY, [&](int i) {
        // In bits, log2(total) - sum(p log2 p) / total. With c.lse the exponentials are the weights themselves.
        const double bits = factor[i] == 0 ? 0 : (c.lse ? 0 : std::log2(double(total[i]))) - sums.logs[i] * factor[i];
        return bits < 0 ? 0.0f : float(bits / LOG2E);
    });
    // Distances to the first key are NaN for queries without a place.
    write(DISTANCE, [&](int i) { return factor[i] == 0 ? scratch.far[i] * 0 : sums.distances[i] * factor[i]; });
    write(LARGEST_WEIGHT, [&](int i) { return factor[i] == 0 ? 0 : exp2(splat(top[i] - shift[i]))[0] * factor[i]; });
    write(MASS, [&](int i) { return factor[i] == 0 || c.prefix == 0 ? 0 : sums.mass[i] * factor[i]; });
    write(IMPORTANCE, [&](int i) { return factor[i] == 0 ? 0 : sums.importance[i] * factor[i]; });
}

}  // namespace attnx
