// Exact attention with its head-reduced map, for CPUs. `attnx/ops/backends/native.py` calls it.
//
// Each thread processes a block of query rows, one head after another: scores of all keys, softmax, map, P V. The data
// of a block stays in cache. Scores are stored transposed, [keys][rows], and a vector holds W rows of one key, so row
// maxima and sums need no reduction across lanes. K and V are copied to contiguous rows, one batch item ahead, because
// the rows of a packed qkv are in separate pages, which hardware prefetchers don't follow.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <queue>
#include <system_error>
#include <thread>
#include <vector>

#include "statistics.h"

namespace attnx {

constexpr int BLOCK_COST = 3;  // fixed cost of a block, in rows

// Computes the outputs of a call for one block of rows.
template <class T>
static void attend(const Call& c, const Block& block, const Packed& kv, const Scratch& scratch) {
    float shift[ROWS], total[ROWS], factor[ROWS], fused[ROWS], top[ROWS];
    if (c.statistics & DISTANCE) distances(c, block, scratch.far);
    for (int64_t h = 0; h < c.H; h++) {
        load_rows<T>(c.q, c.q_stride, c.D, block, h, scratch.qt);
        for (float& x : shift) x = -INF;
        scores<T>(c, block, kv, h, 0, block.limit, scratch, shift, c.map && c.heads == MEAN && h > 0 ? fused : nullptr);
        const int64_t head = (block.b * c.H + h) * c.M;
        std::memcpy(top, shift, sizeof top);
        Sums sums;
        for (int i = 0; i < ROWS; i++) {
            if (c.lse) shift[i] = float(c.lse[head + block.row[i]] * LOG2E);
            total[i] = 0;
            fused[i] = std::isinf(shift[i]) ? 0 : 1;
            if (shift[i] == -INF || (c.lse && shift[i] == INF)) shift[i] = 0;
        }
        if (c.out) std::memset(scratch.o, 0, ROWS * value_stride(c) * sizeof(float));
        for (int64_t j = 0; j < block.limit; j += CHUNK) {
            const int64_t count = block.limit - j < CHUNK ? block.limit - j : CHUNK;
            if (c.statistics)
                exponentiate_and_sum(c, block, scratch, j, count, shift, total, sums);
            else
                exponentiate(block, scratch.s + j * block.width, count, shift, total);
            if (c.out) weigh<T>(c, block, kv, h, j, count, scratch);
        }
        if (c.grad) {
            load_rows<T>(c.grad, c.grad_stride, c.Dv, block, h, scratch.gt);
            weigh_by_gradient<T>(c, block, kv, h, scratch);
            if (c.statistics & IMPORTANCE) sum_magnitudes(block, scratch.s, sums);
        }
        for (int i = 0; i < ROWS; i++) {
            // Only a bias can mask all keys of a row. Else, if all scores are -inf, the result is NaN as in softmax.
            factor[i] = c.bias_kind && total[i] == 0 ? 0 : 1 / total[i];
            if (!c.lse) fused[i] = factor[i];
            if (c.lse_out && i < block.count)
                c.lse_out[head + block.row[i]] =
                    total[i] == 0 ? -INF : float((shift[i] + std::log2(double(total[i]))) / LOG2E);
        }
        if (c.out) store_out<T>(c, block, h, scratch.o, factor);
        if (c.statistics) store_statistics(c, block, scratch, h, top, shift, total, fused, sums);
        if (!c.map) continue;
        if (c.heads == MEAN)
            for (float& x : fused) x /= float(c.H);
        if (c.heads == EACH)
            store_map(c, block, scratch.s, fused, c.map + ((block.b * c.H + h) * c.R + block.first) * c.N);
        else if (c.heads == MEAN && h + 1 < c.H)
            continue;  // `scores` of the next head adds these weights to the map
        else if (h == 0)
            fuse<MEAN, true>(block, scratch.s, fused, scratch.map);
        else if (c.heads == MEAN)
            fuse<MEAN, false>(block, scratch.s, fused, scratch.map);
        else if (c.heads == MAX)
            fuse<MAX, false>(block, scratch.s, fused, scratch.map);
        else
            fuse<MIN, false>(block, scratch.s, fused, scratch.map);
    }
    if (c.map && c.heads != EACH) {
        for (float& x : fused) x = 1;
        store_map(c, block, scratch.map, fused, c.map + (block.b * c.R + block.first) * c.N);
    }
}

// vecmat: writes passed[b, first..last-1], the sum of r[row] * P[row, key] over rows, averaged over heads.
template <class T>
static void pass_on(const Call& c, int64_t b, int64_t first, int64_t last, const Packed& kv, const Scratch& scratch) {
    float* sums = scratch.s + (last - first) * ROWS;
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
            // Weights beyond the block's limit are 0, unless the row is NaN: then all of its weights are NaN.
            const float* lse = c.lse + (b * c.H + h) * c.M;
            for (int i = 0; i < block.count; i++)
                if (r[i] != 0 && (r[i] != r[i] || lse[block.row[i]] != lse[block.row[i]]))
                    for (int64_t j = stop < first ? first : stop; j < last; j++) sums[(j - first) * W] = NAN;
            if (first >= stop) continue;
            load_rows<T>(c.q, c.q_stride, c.D, block, h, scratch.qt);
            scores<T>(c, block, kv, h, first, stop, scratch, top);
            float weight[ROWS];
            for (int i = 0; i < ROWS; i++) {
                shift[i] = float(lse[block.row[i]] * LOG2E);
                weight[i] = std::isinf(shift[i]) ? 0 : r[i];
                if (std::isinf(shift[i])) shift[i] = 0;
            }
            exponentiate(block, scratch.s, stop - first, shift, total);
            for (int64_t j = 0; j < stop - first; j++) {
                vec sum = vec{};
                for (int i = 0; i < block.width; i += W) {
                    const vec factor = load(weight + i);
                    const vec p = load(scratch.s + j * block.width + i) * factor;
                    sum += factor == 0.0f ? vec{} : p;  // not p * 0, which may be NaN
                }
                store(sums + j * W, load(sums + j * W) + sum);
            }
        }
    }
    for (int64_t j = 0; j < last - first; j++) c.passed[b * c.N + first + j] = sum_of(load(sums + j * W)) / float(c.H);
}

// Estimated time, in rows, of c.threads threads for blocks of `rows` rows, if each thread takes the next free block.
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

// Rows per block: ROWS, or if there are few blocks, the number with the shortest estimated time.
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

// Progress of one slot for copies of K and V. Batch item b uses slot b % slots in turn b / slots.
struct alignas(64) Slot {
    std::atomic<int64_t> packed{0}, done{0};  // copied heads and finished pieces, over all turns
    std::atomic<int64_t> nonfinite{-1};         // the last turn with a value that is infinite or NaN
};

// The work of a call, in pieces. The pieces of a batch item are the copies of K and V, one per head, then blocks of rows
// (for vecmat, ranges of keys). Blocks wait for the copies of all heads, and copies wait for the blocks of the previous
// item in the same slot. Threads take pieces in order, so the pieces that a thread waits for are in progress already.
// Results do not depend on the division into blocks.
struct Work {
    const Call& c;
    int64_t rows;     // rows per block, see `best_rows`
    int64_t pieces;   // pieces per batch item, without the copies
    int64_t threads;  // threads in use
    Packed kv;
    std::vector<Slot> slots;
    std::atomic<int64_t> next{0}, thread{0};

    explicit Work(const Call& c)
        : c(c), rows(c.passed ? ROWS : best_rows(c)),
          pieces(c.passed ? (c.N + PASSED_KEYS - 1) / PASSED_KEYS : (c.R + rows - 1) / rows),
          threads(std::min(c.threads, c.B * std::max(pieces, c.Hk))),
          // Slots for the items in progress and for the next copy. Few slots, so that copies are in cache when read.
          kv(c, std::min(c.B, 2 + threads / std::max<int64_t>(pieces, 1))), slots(kv.slots) {}

    int64_t scratch_floats() const { return kv.size + threads * Scratch(c).size; }

    static void wait(const std::atomic<int64_t>& counter, int64_t count) {
        while (counter.load(std::memory_order_acquire) < count) std::this_thread::yield();
    }

    template <class T>
    void run() {
        const Scratch scratch(c, c.scratch + kv.size + thread++ * Scratch(c).size);
        for (int64_t piece; (piece = next++) < c.B * (c.Hk + pieces);) {
            const int64_t b = piece / (c.Hk + pieces), at = piece % (c.Hk + pieces), turn = b / kv.slots;
            Slot& slot = slots[b % kv.slots];
            if (at < c.Hk) {
                wait(slot.done, turn * pieces);
                if (!pack<T>(c, kv, b, at)) slot.nonfinite = turn;
                slot.packed.fetch_add(1, std::memory_order_release);
            } else {
                wait(slot.packed, (turn + 1) * c.Hk);
                piece_of<T>(b, at - c.Hk, slot.nonfinite == turn, scratch);
                slot.done.fetch_add(1, std::memory_order_release);
            }
        }
    }

    // Runs one piece of a batch item after its copies. nonfinite: a value is infinite or NaN.
    template <class T>
    void piece_of(int64_t b, int64_t at, bool nonfinite, const Scratch& scratch) {
        if (c.passed) {
            pass_on<T>(c, b, at * PASSED_KEYS, std::min(c.N, (at + 1) * PASSED_KEYS), kv, scratch);
        } else {
            // 0 times an infinite or NaN value is NaN, so masked keys must be included.
            attend<T>(c, Block(c, b, at * rows, std::min(rows, c.R - at * rows), nonfinite), kv, scratch);
        }
    }

    static void enter(void* self) {
        auto& work = *(Work*)self;
        work.c.half ? work.run<bf16>() : work.run<float>();
    }
};

// GOMP_parallel of an OpenMP runtime: calls a function in the given number of threads, including this one.
typedef void Parallel(void (*)(void*), void*, unsigned, unsigned);

static void in_threads(Work& work, Parallel* parallel) {
    const unsigned threads = unsigned(work.threads);
    if (threads <= 1) return Work::enter(&work);
    if (parallel) return parallel(Work::enter, &work, threads, 0);
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (unsigned i = 1; i < threads; i++) others.emplace_back(Work::enter, &work);
    } catch (const std::system_error&) {
        // No more threads can be started. The existing ones do all of the work.
    }
    Work::enter(&work);
    for (auto& other : others) other.join();
}

}  // namespace attnx

extern "C" {

// Size of Call in bytes. native.py compares it with its own structure.
int64_t attnx_call_size() { return sizeof(attnx::Call); }

// Floats per vector.
int64_t attnx_width() { return attnx::W; }

// Number of floats of scratch memory that a call needs.
int64_t attnx_scratch_floats(const attnx::Call* call) { return attnx::Work(*call).scratch_floats(); }

// Runs a call. `parallel` is GOMP_parallel of torch's OpenMP runtime, whose threads are reused, because a second pool
// would compete for the cores. If it is null, new threads are started.
void attnx_run(const attnx::Call* call, attnx::Parallel* parallel) {
    attnx::Work work(*call);
    attnx::in_threads(work, parallel);
}

// Runs a call that differs from `like` in its tensors and threads, with scratch memory of its own. Returns the bytes of
// scratch memory that could not be allocated, else 0.
int64_t attnx_run_like(const attnx::Call* like, const void* q, const void* k, const void* v, const void* bias, void* out,
                       float* map, int64_t threads, attnx::Parallel* parallel) {
    attnx::Call call = *like;
    call.q = q, call.k = k, call.v = v, call.bias = bias, call.out = out, call.map = map, call.threads = threads;
    const int64_t bytes = attnx::round_up(attnx_scratch_floats(&call) * sizeof(float), 64);
    call.scratch = (float*)std::aligned_alloc(64, bytes);
    if (!call.scratch) return bytes;
    attnx_run(&call, parallel);
    std::free(call.scratch);  // the block's MLP uses the memory next
    return 0;
}
}
