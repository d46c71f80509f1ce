/* Attention of one decoded token: scores, softmax, sums, with keys and values read where they lie in the pool.
 *
 * Include functions.h and the structs of paged.c first. Letters as there.
 */
enum { STRIP = 4, CHAINS = 4 };

INLINE void fetch(const char *from, int64_t size) {
    for (int64_t i = 0; i < size; i += LINE) __builtin_prefetch(from + i, 0, 2);
}

INLINE vec even(bits b) { return (vec)(b << 16); }
INLINE vec odd(bits b) { return (vec)(b & 0xffff0000u); }

/* acc + the product of every lane of a key vector with one number of q (bf16: of both halves with a pair) */
INLINE vec add_product(vec acc, const char *key, const char *q, int type) {
    if (type == FP32) {
        float f;
        memcpy(&f, q, 4);
        return acc + widen(key, FP32) * f;
    }
    bits k;
    uint32_t pair;
    memcpy(&k, key, sizeof k);
    memcpy(&pair, q, 4);
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)k, (__m512bh)_mm512_set1_epi32(pair));
#else
    bits p = (bits){0} + pair;
    return acc + even(k) * even(p) + odd(k) * odd(p);
#endif
}

/* score[h][t] for LANES tokens of one block; `rows` heads and the type are constants. Four chains per head hide the
 * latency of a sum. */
INLINE void score_lanes(float *score, int64_t width, const char *const *q, const char *keys, int64_t stride,
                        int64_t pairs, int type, const int rows) {
    vec acc[MAX_ROWS][CHAINS] = {0};
    int64_t i = 0;
    for (; i + CHAINS <= pairs; i += CHAINS)
        UNROLL for (int c = 0; c < CHAINS; c++) UNROLL for (int h = 0; h < rows; h++)
            acc[h][c] = add_product(acc[h][c], keys + (i + c) * stride, q[h] + 4 * (i + c), type);
    for (; i < pairs; i++)
        UNROLL for (int h = 0; h < rows; h++) acc[h][0] = add_product(acc[h][0], keys + i * stride, q[h] + 4 * i, type);
    UNROLL for (int h = 0; h < rows; h++) {
        vec sum = (acc[h][0] + acc[h][1]) + (acc[h][2] + acc[h][3]);
        memcpy(score + h * width, &sum, sizeof sum);
    }
}

#define SCORE(rows)                                                                            \
    if (l->type == BF16) score_lanes(score + t, width, q, keys + 4 * t, 4 * T, pairs, BF16, rows); \
    else score_lanes(score + t, width, q, keys + 4 * t, 4 * T, pairs, FP32, rows);

static void score_block(const Layer *l, float *score, int64_t width, const char *const *q, const char *keys, int rows) {
    int64_t T = l->block_size, pairs = l->key_dim * size_of(l->type) / 4;
    for (int64_t t = 0; t < T; t += LANES) switch (rows) {
        case 1: SCORE(1) break;
        case 2: SCORE(2) break;
#if defined(__AVX512F__)
        case 3: SCORE(3) break;
        case 4: SCORE(4) break;
#endif
        }
}

/* In place: x[first..last-1] to softmax(scale * x), or of softcap * tanh(scale * x / softcap); 0 elsewhere. `width` is
 * a multiple of 16. */
static void softmax(float *x, int64_t first, int64_t last, int64_t width, float scale, float softcap) {
    vec top = all(-INFINITY), sum = all(0.0f);
    for (int64_t t = 0; t < width; t += LANES) {
        vec s;
        memcpy(&s, x + t, sizeof s);
        s *= scale;
        if (softcap > 0) s = tanh_of(s / softcap) * softcap;
        memcpy(x + t, &s, sizeof s);
    }
    for (int64_t t = 0; t < first; t++) x[t] = -INFINITY; /* only now: capped, it would be a number again */
    for (int64_t t = last; t < width; t++) x[t] = -INFINITY;
    for (int64_t t = 0; t < width; t += LANES) {
        vec s;
        memcpy(&s, x + t, sizeof s);
        top = pick((bits)(s > top), s, top);
    }
    float lane[LANES], most = -INFINITY, total = 0;
    memcpy(lane, &top, sizeof lane);
    for (int i = 0; i < LANES; i++) most = lane[i] > most ? lane[i] : most;
    for (int64_t t = 0; t < width; t += LANES) {
        vec s;
        memcpy(&s, x + t, sizeof s);
        s = exp_of(s - most);
        memcpy(x + t, &s, sizeof s);
        sum += s;
    }
    memcpy(lane, &sum, sizeof lane);
    for (int i = 0; i < LANES; i++) total += lane[i];
    float share = 1.0f / total;
    for (int64_t t = 0; t < width; t += LANES) {
        vec s;
        memcpy(&s, x + t, sizeof s);
        s *= share;
        memcpy(x + t, &s, sizeof s);
    }
}

/* sum[h] += p[h][t] v[t] for one token or, of bf16, one or both of a pair. All but the pointers are constants. */
INLINE void weigh_tokens(vec sum[][STRIP], const float *p, int64_t width, const char *v, int type, const int rows,
                         const int strip, const int with_even, const int with_odd) {
    UNROLL for (int i = 0; i < strip; i++) {
        bits b;
        memcpy(&b, v + 4 * i * LANES, sizeof b);
        vec first = type == FP32 ? (vec)b : even(b);
        if (with_even) UNROLL for (int h = 0; h < rows; h++) sum[h][i] += p[h * width] * first;
        if (with_odd) UNROLL for (int h = 0; h < rows; h++) sum[h][i] += p[h * width + 1] * odd(b);
    }
}

/* acc[h] += sum of p[h][t] v[t] for the tokens first..last-1 of a block, over `strip` vectors of numbers; type, rows
 * and strip are constants. A token outside is not touched: what lies there may be NaN. */
INLINE void weigh_strip(float *acc, const float *p, int64_t width, const char *v, int64_t first, int64_t last,
                        int64_t dim, int type, const int rows, const int strip) {
    vec sum[MAX_ROWS][STRIP];
    int64_t t = first;
    UNROLL for (int h = 0; h < rows; h++) UNROLL for (int i = 0; i < strip; i++)
        memcpy(&sum[h][i], acc + h * dim + i * LANES, sizeof(vec));
    if (type == FP32)
        for (; t < last; t++) weigh_tokens(sum, p + t, width, v + 4 * t * dim, FP32, rows, strip, 1, 0);
    else {
        if (t % 2) {
            weigh_tokens(sum, p + t - 1, width, v + 2 * (t - 1) * dim, BF16, rows, strip, 0, 1);
            t++;
        }
        for (; t + 1 < last; t += 2) weigh_tokens(sum, p + t, width, v + 2 * t * dim, BF16, rows, strip, 1, 1);
        if (t < last) weigh_tokens(sum, p + t, width, v + 2 * t * dim, BF16, rows, strip, 1, 0);
    }
    UNROLL for (int h = 0; h < rows; h++) UNROLL for (int i = 0; i < strip; i++)
        memcpy(acc + h * dim + i * LANES, &sum[h][i], sizeof(vec));
}

#define WEIGH(rows, strip)                                                                             \
    if (type == BF16) weigh_strip(acc + d, p, width, v + 4 * d, first, last, dim, BF16, rows, strip);   \
    else weigh_strip(acc + d, p, width, v + 4 * d, first, last, dim, FP32, rows, strip);

#define EACH_STRIP(rows)                                                       \
    for (; d + STRIP * LANES <= dim; d += STRIP * LANES) { WEIGH(rows, STRIP) } \
    for (; d + LANES <= dim; d += LANES) { WEIGH(rows, 1) }

static void weigh_block(float *acc, const float *p, int64_t width, const char *v, int64_t first, int64_t last,
                        int64_t dim, int type, int rows) {
    int64_t d = 0;
    switch (rows) {
    case 1: EACH_STRIP(1) break;
    case 2: EACH_STRIP(2) break;
#if defined(__AVX512F__)
    case 3: EACH_STRIP(3) break;
    case 4: EACH_STRIP(4) break;
#endif
    }
    for (; d < dim; d++) /* the last few numbers */
        for (int64_t t = first; t < last; t++) {
            uint32_t b;
            float f;
            memcpy(&b, v + 4 * ((type == BF16 ? t / 2 : t) * dim + d), 4);
            if (type == BF16) b = t % 2 ? b & 0xffff0000u : b << 16;
            memcpy(&f, &b, 4);
            for (int h = 0; h < rows; h++) acc[h * dim + d] += p[h * width + t] * f;
        }
}

/* How many heads from h on run together: those that read kv head g, MAX_ROWS at most. */
INLINE int few(int64_t g, int64_t group, int64_t h) {
    int64_t left = (g + 1) * group - h;
    return left < MAX_ROWS ? left : MAX_ROWS;
}

/* One decode, for kv heads first_g..last_g-1. work: scores [H, C padded], then sums [H, D]. */
static void attend(const Layer *l, const Rows *r, View q, char *out, int64_t s, int64_t first_g, int64_t last_g,
                   float *work) {
    const int32_t *blocks = r->blocks + r->begin[s];
    int64_t group = l->heads / l->kv_heads, T = l->block_size, dim = l->value_dim;
    int64_t length = r->length[s], row = r->row[s];
    int64_t start = l->window && length > l->window ? length - l->window : 0;
    int64_t first_b = start / T, last_b = (length + T - 1) / T, base = first_b * T, width = (last_b - first_b) * T;
    int64_t key_size = T * l->key_dim * size_of(l->type), value_size = T * dim * size_of(l->type);
    float *sums = work + l->heads * width;
    const char *queries[l->heads];
    for (int64_t h = 0; h < l->heads; h++) queries[h] = at(q.data, l->type, h * q.head + row * q.token);
    for (int64_t b = first_b; b < last_b; b++)
        for (int64_t g = first_g; g < last_g; g++) {
            if (b + 1 < last_b) fetch(l->keys + (blocks[b + 1] * l->kv_heads + g) * key_size, key_size);
            else fetch(l->values + (blocks[first_b] * l->kv_heads + g) * value_size, value_size);
            for (int64_t h = g * group; h < (g + 1) * group; h += MAX_ROWS)
                score_block(l, work + h * width + b * T - base, width, queries + h,
                            l->keys + (blocks[b] * l->kv_heads + g) * key_size, few(g, group, h));
        }
    for (int64_t h = first_g * group; h < last_g * group; h++) {
        softmax(work + h * width, start - base, length - base, width, l->scale, l->softcap);
        memset(sums + h * dim, 0, 4 * dim);
    }
    for (int64_t b = first_b; b < last_b; b++)
        for (int64_t g = first_g; g < last_g; g++) {
            int64_t from = b == first_b ? start - base : 0, to = b == last_b - 1 ? length - b * T : T;
            if (b + 1 < last_b) fetch(l->values + (blocks[b + 1] * l->kv_heads + g) * value_size, value_size);
            for (int64_t h = g * group; h < (g + 1) * group; h += MAX_ROWS)
                weigh_block(sums + h * dim, work + h * width + b * T - base, width,
                            l->values + (blocks[b] * l->kv_heads + g) * value_size, from, to, dim, l->type,
                            few(g, group, h));
        }
    for (int64_t h = first_g * group; h < last_g * group; h++)
        for (int64_t d = 0; d < dim; d += TILE)
            store_tile((char *)at(out, l->type, (row * l->heads + h) * dim + d), l->type, dim - d,
                       load_tile((const char *)(sums + h * dim + d), FP32, dim - d));
}
