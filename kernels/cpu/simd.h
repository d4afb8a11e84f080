// Vectors of W floats by the vector extensions of GCC and Clang. The compiler flags (-mavx512f, -mavx2) determine the
// width: AVX-512, AVX2, NEON, or four floats elsewhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace attnx {

#if defined(__AVX512F__)
constexpr int W = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int W = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int W = 4, REGISTERS = 32;
#else
constexpr int W = 4, REGISTERS = 16;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));

struct bf16 {
    uint16_t bits;
};

static inline vec splat(float x) { return x - vec{}; }

static inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline vec load(const bf16* p) {
    halves h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even. NaN stays NaN.
static inline void store(bf16* p, vec v) {
    const uvec bits = (uvec)v;
    const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const halves h = __builtin_convertvector(v != v ? (bits >> 16) | 0x40 : rounded, halves);
    std::memcpy(p, &h, sizeof h);
}

// Products operate on 32-bit words: a float each, or two bf16 with AVX512_BF16.
#if defined(__AVX512BF16__)
constexpr int PAIR = 2;

// acc + a.low * b.low + a.high * b.high. The instruction treats subnormal numbers as zero in every mode.
static inline vec dot_pairs(vec a, vec b, vec acc) {
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}

// W words, each of two floats rounded to bf16.
static inline vec rounded_pairs(vec low, vec high) {
    alignas(64) static constexpr uint16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (vec)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)both);
}
#else
constexpr int PAIR = 1;

vec dot_pairs(vec, vec, vec);  // never called
vec rounded_pairs(vec, vec);
#endif

// Number of elements in a word.
template <class T>
constexpr int IN_WORD = sizeof(T) == 2 ? PAIR : 1;

static inline float word_of(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// The word at p, where `left` elements remain.
static inline float word(const float* p, int64_t) { return *p; }

static inline float word(const bf16* p, int64_t left) {
    const uint32_t second = PAIR == 2 && left > 1 ? p[1].bits : 0;
    return word_of(PAIR == 2 ? second << 16 | p->bits : uint32_t(p->bits) << 16);
}

// The W words at p.
template <class T>
static inline vec words(const T* p) {
    if constexpr (IN_WORD<T> == 1) return load(p);
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// W words, each of two floats that are bf16 values already.
static inline vec joined(vec low, vec high) { return (vec)((uvec)low >> 16 | (uvec)high); }

// acc + a * b, summed over the E elements of each word.
template <int E>
static inline vec multiply_add(vec a, vec b, vec acc) {
    if constexpr (E == 2) return dot_pairs(a, b, acc);
    return acc + a * b;
}

static inline float sum_of(vec v) {
    float total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
}

// 2^x to about 1 ulp; 0 below -126, infinity from 127.5, and NaN for NaN. It is Cephes' polynomial (exp2f) of
// x - round(x), in [-1/2, 1/2], times 2^round(x).
static inline vec exp2(vec x) {
    x = x > 128.0f ? splat(128.0f) : x;
    const float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23 plus the exponent bias: low bits of the sum are round(x) + 127
    const vec shifted = x + magic;
    const vec f = x - (shifted - magic);
    vec p = splat(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const vec y = p * (vec)((ivec)shifted << 23);
    return x < -126.0f ? vec{} : y;
}

// A loop, which compilers vectorize without checks of errno.
static inline vec square_root(vec x) {
    for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
}

// Unrolls a loop of multiplications by four, because loop counters compete with them for issue slots.
#if defined(__clang__)
#define ATTNX_UNROLL _Pragma("unroll 4")
#define ATTNX_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ATTNX_UNROLL _Pragma("GCC unroll 4")
#define ATTNX_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

template <int S, int... L>
static inline void exchange(vec* r, std::integer_sequence<int, L...>) {
    for (int i = 0; i < W; i++)
        if (!(i & S)) {
            const vec a = r[i], b = r[i + S];
            r[i] = ATTNX_SHUFFLE(a, b, ((L & S) ? W + L - S : L)...);
            r[i + S] = ATTNX_SHUFFLE(a, b, ((L & S) ? W + L : L + S)...);
        }
}

// Transposes a [W][W] matrix in place.
static inline __attribute__((always_inline)) void transpose(vec (&r)[W]) {
    const auto lanes = std::make_integer_sequence<int, W>();
    exchange<1>(r, lanes);
    exchange<2>(r, lanes);
    if constexpr (W > 4) exchange<4>(r, lanes);
    if constexpr (W > 8) exchange<8>(r, lanes);
}

}  // namespace attnx
