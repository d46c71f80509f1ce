/* Dot products of a few rows of x with 16 rows of W: vectors, types, and the one order in which a sum is made.
 *
 * A vector has 16, 8 or 4 lanes by instruction set. Each (row, output) has one accumulator that walks the input in
 * order and is folded by one tree.
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
enum { LANES = 16, MAX_ROWS = 4 };
#elif defined(__AVX2__)
enum { LANES = 8, MAX_ROWS = 2 };
#else
enum { LANES = 4, MAX_ROWS = 2 };
#endif

enum { TILE = 16, GROUP = 4, PARTS = TILE / LANES, CHUNK = 8, FAR = 8192 };
enum { FP32 = 0, BF16 = 1 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef struct { vec v[PARTS]; } tile; /* 16 outputs of one row */

INLINE int64_t size_of(int type) { return type == BF16 ? 2 : 4; }
INLINE const char *at(const void *base, int type, int64_t i) { return (const char *)base + i * size_of(type); }

INLINE vec widen(const char *p, int type) {
    vec v;
    if (type == FP32) {
        memcpy(&v, p, sizeof v);
        return v;
    }
    halves h;
    memcpy(&h, p, sizeof h);
    bits b = __builtin_convertvector(h, bits) << 16;
    memcpy(&v, &b, sizeof v);
    return v;
}

/* To nearest even; a NaN stays one. */
INLINE halves round_bf16(vec v) {
#if defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    bits b = (bits)v, nan = (bits)(v != v);
    bits kept = (b >> 16) | 0x40, rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return __builtin_convertvector((nan & kept) | (~nan & rounded), halves);
#endif
}

INLINE tile load_tile(const char *p, int type, int64_t count) {
    char part[4 * TILE] = {0};
    if (count < TILE) p = memcpy(part, p, count * size_of(type));
    tile t;
    UNROLL for (int i = 0; i < PARTS; i++) t.v[i] = widen(at(p, type, i * LANES), type);
    return t;
}

INLINE void store_tile(char *p, int type, int64_t count, tile t) {
    if (type == FP32) {
        memcpy(p, &t, 4 * (count < TILE ? count : TILE));
        return;
    }
    halves h[PARTS];
    UNROLL for (int i = 0; i < PARTS; i++) h[i] = round_bf16(t.v[i]);
    if (count >= TILE)
        memcpy(p, h, 2 * TILE);
    else
        memcpy(p, h, 2 * count);
}

/* A step of a dot product takes 2 * LANES inputs when both sides are bf16 (pairs as they lie in memory), else LANES. */
INLINE int step_width(int xt, int wt) { return xt == BF16 && wt == BF16 ? 2 * LANES : LANES; }

INLINE vec load_step(const char *p, int type, int pairs) {
    vec v;
    if (!pairs) return widen(p, type);
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vec dot_step(vec acc, vec x, vec w, int pairs) {
    if (!pairs) return acc + x * w;
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
#else
    /* Two neighbours per lane: the odd one is a float already but for its low bits, the even one a shift away. */
    acc += (vec)((bits)x << 16) * (vec)((bits)w << 16);
    return acc + (vec)((bits)x & 0xffff0000u) * (vec)((bits)w & 0xffff0000u);
#endif
}

/* part[row][j] = dot product of x row `row` and w row `j`, its lanes not yet summed; `rows` is a constant. */
INLINE void dot_group(vec part[][TILE], const char *const *x, int xt, const char *const *w, int wt, int64_t width,
                      const int rows) {
    const int step = step_width(xt, wt), pairs = step > LANES;
    vec acc[MAX_ROWS][GROUP] = {0}, wv[GROUP];
    /* The rows of the next group lie right behind these: the hardware follows no four streams at once, so ask for them. */
    int64_t k = 0, ahead = GROUP * width * size_of(wt);
    if (ahead < FAR) ahead *= 2;
    for (; k + step <= width; k += step) {
        UNROLL for (int j = 0; j < GROUP; j++) {
            __builtin_prefetch(at(w[j], wt, k) + ahead, 0, 3);
            wv[j] = load_step(at(w[j], wt, k), wt, pairs);
        }
        UNROLL for (int i = 0; i < rows; i++) {
            vec xv = load_step(at(x[i], xt, k), xt, pairs);
            UNROLL for (int j = 0; j < GROUP; j++) acc[i][j] = dot_step(acc[i][j], xv, wv[j], pairs);
        }
    }
    if (k < width) { /* the last few inputs, padded with zeros */
        char x_end[8 * LANES], w_end[GROUP][8 * LANES] = {{0}};
        UNROLL for (int j = 0; j < GROUP; j++) {
            memcpy(w_end[j], at(w[j], wt, k), (width - k) * size_of(wt));
            wv[j] = load_step(w_end[j], wt, pairs);
        }
        UNROLL for (int i = 0; i < rows; i++) {
            memset(x_end, 0, sizeof x_end);
            memcpy(x_end, at(x[i], xt, k), (width - k) * size_of(xt));
            vec xv = load_step(x_end, xt, pairs);
            UNROLL for (int j = 0; j < GROUP; j++) acc[i][j] = dot_step(acc[i][j], xv, wv[j], pairs);
        }
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < GROUP; j++) part[i][j] = acc[i][j];
}

/* Sums the lanes of 16 vectors, halves first: lane i + lane i+8, then i+4, i+2, i+1. */
INLINE tile fold_lanes(const vec *part) {
    tile out;
#if defined(__AVX512F__)
    __m512 a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; i++) { /* a[i]: part[k] and part[k+4] for k = i%4 + 8*(i/4) */
        __m512 p = (__m512)part[i % 4 + 8 * (i / 4)], q = (__m512)part[i % 4 + 8 * (i / 4) + 4];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xee));
    }
    UNROLL for (int i = 0; i < 4; i++) /* b[i]: parts i, i+4, i+8, i+12, one per 128 bits */
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    UNROLL for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
    out.v[0] = (vec)_mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
#else
    float sums[TILE], lane[LANES];
    for (int j = 0; j < TILE; j++) {
        memcpy(lane, &part[j], sizeof lane);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) lane[i] += lane[i + half];
        sums[j] = lane[0];
    }
    memcpy(&out, sums, sizeof out);
#endif
    return out;
}

#define EACH_TYPE(rows)                                                                \
    if (xt == BF16 && wt == BF16) dot_group(part, x, BF16, w, BF16, width, rows);      \
    else if (xt == BF16) dot_group(part, x, BF16, w, FP32, width, rows);               \
    else if (wt == BF16) dot_group(part, x, FP32, w, BF16, width, rows);               \
    else dot_group(part, x, FP32, w, FP32, width, rows);

/* Makes types and rows constants, so that every accumulator lives in a register. */
static void dot_group_of(vec part[][TILE], const char *const *x, int xt, const char *const *w, int wt, int64_t width,
                         int rows) {
    switch (rows) {
    case 1: EACH_TYPE(1) break;
    case 2: EACH_TYPE(2) break;
#if defined(__AVX512F__)
    case 3: EACH_TYPE(3) break;
    case 4: EACH_TYPE(4) break;
#endif
    }
}

/* out[i] = outputs o..o+15 (w rows, the last one repeated where w ends) of up to CHUNK rows of x. */
static void dot_tile(tile *out, const char *const *x, int xt, const char *w, int wt, int64_t o, int64_t num_w,
                     int64_t width, int rows) {
    vec part[CHUNK][TILE];
    for (int g = 0; g < TILE; g += GROUP) {
        const char *group[GROUP];
        for (int j = 0; j < GROUP; j++) group[j] = at(w, wt, (o + g + j < num_w ? o + g + j : num_w - 1) * width);
        for (int i = 0; i < rows; i += MAX_ROWS)
            dot_group_of((vec(*)[TILE]) & part[i][g], x + i, xt, group, wt, width,
                         rows - i < MAX_ROWS ? rows - i : MAX_ROWS);
    }
    for (int i = 0; i < rows; i++) out[i] = fold_lanes(part[i]);
}
