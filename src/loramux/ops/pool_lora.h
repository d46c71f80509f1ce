/* Shrink and expand over slots: rows are read where they lie, in the order in which they lie.
 *
 * Letters: I input width, O output width, r rank of a slot.
 */
typedef struct {
    const int64_t *a, *b, *gain; /* addresses by slot; gain 0: none */
    const int32_t *rank, *type;  /* rank -1: the slot is empty */
    const float *scale;
} Slots;

enum { AT_ONCE = 8 };

/* acc[j] = A[j] x, its lanes not yet summed, for `rows` rows that lie `width` apart; `rows` is a constant. */
INLINE void dot_rows(vec *acc, const char *x, int xt, const char *a, int at_, int64_t width, const int rows) {
    const int step = step_width(xt, at_), pairs = step > LANES;
    int64_t k = 0;
    UNROLL for (int j = 0; j < rows; j++) acc[j] = (vec){0};
    for (; k + step <= width; k += step) {
        vec v = load_step(at(x, xt, k), xt, pairs);
        UNROLL for (int j = 0; j < rows; j++)
            acc[j] = dot_step(acc[j], v, load_step(at(a, at_, j * width + k), at_, pairs), pairs);
    }
    if (k == width) return;
    char end[8 * LANES] = {0}; /* the last few inputs, padded with zeros */
    memcpy(end, at(x, xt, k), (width - k) * size_of(xt));
    vec v = load_step(end, xt, pairs);
    UNROLL for (int j = 0; j < rows; j++) {
        memset(end, 0, sizeof end);
        memcpy(end, at(a, at_, j * width + k), (width - k) * size_of(at_));
        acc[j] = dot_step(acc[j], v, load_step(end, at_, pairs), pairs);
    }
}

/* out[j] = sum of the lanes of part[j], halves first. */
INLINE void fold_eight(float *out, const vec *part) {
#if defined(__AVX512F__)
    __m512 a[4], b[2], c;
    UNROLL for (int i = 0; i < 4; i++) {
        __m512 p = (__m512)part[i], q = (__m512)part[i + 4];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xee));
    }
    UNROLL for (int i = 0; i < 2; i++) /* parts i, i+4, i+2, i+6, one per 128 bits */
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 2], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 2], 0xdd));
    c = _mm512_add_ps(_mm512_shuffle_ps(b[0], b[1], 0x44), _mm512_shuffle_ps(b[0], b[1], 0xee));
    c = _mm512_add_ps(_mm512_shuffle_ps(c, c, 0x88), _mm512_shuffle_ps(c, c, 0xdd));
    c = _mm512_permutexvar_ps(_mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 13, 12, 5, 4, 9, 8, 1, 0), c);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(c));
#else
    for (int j = 0; j < AT_ONCE; j++) {
        float lane[LANES];
        memcpy(lane, &part[j], sizeof lane);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) lane[i] += lane[i + half];
        out[j] = lane[0];
    }
#endif
}

INLINE void shrink_rows(float *t, const char *x, int xt, const char *a, int at_, int64_t width, int64_t rows) {
    vec acc[AT_ONCE] = {{0}};
    float sums[AT_ONCE];
    if (rows >= AT_ONCE) {
        dot_rows(acc, x, xt, a, at_, width, AT_ONCE);
        fold_eight(t, acc);
        return;
    }
    for (int64_t j = 0; j < rows; j++) dot_rows(acc + j, x, xt, at(a, at_, j * width), at_, width, 1);
    fold_eight(sums, acc);
    memcpy(t, sums, 4 * rows);
}

/* t[i] = A[i] x of one row of x. One accumulator per rank row: the same bits in any company. `is_new`: the rows are
 * part of the stream. */
static void shrink_row(float *t, const char *x, int xt, const char *a, int at_, int64_t rank, int64_t width, int is_new,
                       Stream *s) {
    for (int64_t r = 0; r < rank; r += AT_ONCE, a = at(a, at_, AT_ONCE * width)) {
        int64_t rows = rank - r, bytes = (rows < AT_ONCE ? rows : AT_ONCE) * width * size_of(at_);
        if (xt == BF16 && at_ == BF16) shrink_rows(t + r, x, BF16, a, BF16, width, rows);
        else if (xt == BF16) shrink_rows(t + r, x, BF16, a, FP32, width, rows);
        else if (at_ == BF16) shrink_rows(t + r, x, FP32, a, BF16, width, rows);
        else shrink_rows(t + r, x, FP32, a, FP32, width, rows);
        advance(s, is_new ? bytes : 0, bytes / 8);
    }
}

enum { WIDE = 64, DEEP = 8, HALF = WIDE / (2 * LANES) };

/* Lanes 0, 2, 4.. (odd = 0) or 1, 3, 5.. of two vectors. */
#if defined(__AVX512F__)
INLINE vec every_other(vec a, vec b, const int odd) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return (vec)_mm512_permutex2var_ps((__m512)a, odd ? _mm512_add_epi32(even, _mm512_set1_epi32(1)) : even, (__m512)b);
}
INLINE vec interleave(vec even, vec odd, const int second) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    return (vec)_mm512_permutex2var_ps((__m512)even, second ? high : low, (__m512)odd);
}
#else
INLINE vec every_other(vec a, vec b, const int odd) {
    vec out;
    for (int i = 0; i < LANES / 2; i++) out[i] = a[2 * i + odd], out[i + LANES / 2] = b[2 * i + odd];
    return out;
}
INLINE vec interleave(vec even, vec odd, const int second) {
    vec out;
    for (int i = 0; i < LANES / 2; i++)
        out[2 * i] = even[i + second * LANES / 2], out[2 * i + 1] = odd[i + second * LANES / 2];
    return out;
}
#endif

/* 64 outputs of bf16 rows. Two neighbours share a word: one is a shift away, the other a mask. */
INLINE void expand_wide(float *acc, const float *u, const char *b, int64_t pitch, const int rows) {
    vec even[HALF], odd[HALF];
    UNROLL for (int j = 0; j < HALF; j++) {
        vec v[2];
        memcpy(v, acc + 2 * j * LANES, sizeof v);
        even[j] = every_other(v[0], v[1], 0);
        odd[j] = every_other(v[0], v[1], 1);
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < HALF; j++) {
        bits w;
        memcpy(&w, b + 2 * (i * pitch + 2 * j * LANES), sizeof w);
        even[j] += u[i] * (vec)(w << 16);
        odd[j] += u[i] * (vec)(w & 0xffff0000u);
    }
    UNROLL for (int j = 0; j < HALF; j++) {
        vec v[2] = {interleave(even[j], odd[j], 0), interleave(even[j], odd[j], 1)};
        memcpy(acc + 2 * j * LANES, v, sizeof v);
    }
}

/* 16 outputs, of which `count` exist. */
INLINE void expand_tile(float *acc, const float *u, const char *b, int bt, int64_t pitch, int64_t rows, int64_t count) {
    tile sum;
    memcpy(&sum, acc, sizeof sum);
    for (int64_t i = 0; i < rows; i++) {
        tile t = load_tile(at(b, bt, i * pitch), bt, count);
        UNROLL for (int v = 0; v < PARTS; v++) sum.v[v] += u[i] * t.v[v];
    }
    memcpy(acc, &sum, sizeof sum);
}

/* acc[0..width) += sum over i of u[i] * B[i][0..width); rows of B lie `pitch` apart. Ranks are added one by one, in
 * their order. acc is whole tiles. */
static void expand_row(float *acc, const float *u, const char *b, int type, int64_t rank, int64_t pitch, int64_t width,
                       int is_new, Stream *s) {
    for (int64_t rows; rank > 0; rank -= rows, u += rows, b = at(b, type, rows * pitch)) {
        rows = rank < DEEP ? rank : DEEP;
        int64_t o = 0, bytes = rows * WIDE * size_of(type);
        for (; type == BF16 && o + WIDE <= width; o += WIDE) {
            switch (rows) {
            case DEEP: expand_wide(acc + o, u, b + 2 * o, pitch, DEEP); break;
            case 4: expand_wide(acc + o, u, b + 2 * o, pitch, 4); break;
            default:
                for (int64_t i = 0; i < rows; i++) expand_wide(acc + o, u + i, b + 2 * (i * pitch + o), pitch, 1);
            }
            advance(s, is_new ? bytes : 0, bytes / 4);
        }
        for (; o < width; o += TILE) {
            expand_tile(acc + o, u, at(b, type, o), type, pitch, rows, width - o < TILE ? width - o : TILE);
            if (is_new) advance(s, bytes * TILE / WIDE, 0);
        }
    }
}
