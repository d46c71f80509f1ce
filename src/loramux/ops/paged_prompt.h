/* Attention of pieces of prompts on AMX tiles: 16 tokens of a piece at a time, over the keys and values of the pool.
 *
 * Why: a framework wants a sequence's blocks gathered into one tensor first, and takes twice as long. Keys lie in the
 * pool as the right side of a tile product; values of one head are put end to end once per piece. Weights are rounded
 * to bf16 before they meet the values, their sum is not. A token's result is made in the order of the tokens it sees,
 * so that it does not depend on where the prompt was cut.
 *
 * Include lora_amx.h, functions.h and the structs of paged.c first. Letters as there; M tokens of a tile (16).
 */
#if defined(__AMX_BF16__)
#define LOG2_E 1.44269504f
enum { WIDE = 64, PAIRED = 32 }; /* tokens of four key tiles, and of one tile of values */

typedef struct {
    int64_t base, width;  /* the first token of the first block, and how many tokens from there, padded to WIDE */
    char *values;         /* [width / 2, D, 2] of one kv head, zero where there is no token */
    float *scores, *sums; /* [M, width], [M, D of values] */
    char *weights, *query; /* bf16 [M, width], [M, D of keys] */
} Desk;

static int64_t desk_bytes(const Layer *l, int64_t width) {
    return width * l->value_dim * 2 + TILE * (4 * width + 4 * l->value_dim + 2 * width + 2 * l->key_dim) + 6 * 64;
}

static Desk lay_desk(const Layer *l, char *work, int64_t base, int64_t width) {
    Desk d = {.base = base, .width = width, .values = work};
    d.scores = (float *)(d.values + (width * l->value_dim * 2 + 63) / 64 * 64);
    d.sums = d.scores + TILE * width;
    d.weights = (char *)(d.sums + (TILE * l->value_dim + 15) / 16 * 16);
    d.query = d.weights + TILE * width * 2;
    return d;
}

/* Values of tokens base..total-1 of kv head g, end to end; what lies behind them is zero, whatever it was. */
static void line_up(const Layer *l, const Desk *d, const int32_t *blocks, int64_t total, int64_t g) {
    int64_t T = l->block_size, dim = l->value_dim, size = T * dim * 2, num = total - d->base;
    for (int64_t t = 0; t < num; t += T)
        memcpy(d->values + t * dim * 2, l->values + (blocks[(d->base + t) / T] * l->kv_heads + g) * size,
               (d->width - t < T ? d->width - t : T) * dim * 2);
    uint16_t *last = (uint16_t *)d->values + (num - 1) * dim;
    if (num % 2) {
        for (int64_t i = 0; i < dim; i++) last[2 * i + 1] = 0;
        num++;
    }
    memset(d->values + num * dim * 2, 0, (d->width - num) * dim * 2);
}

/* scores[m][t] for the tokens first..last-1 (from base; multiples of 16), four tiles of keys at a time */
static void score_tiles(const Layer *l, const Desk *d, const int32_t *blocks, const char *query, int64_t q_bytes,
                        int64_t g, int64_t first, int64_t last) {
    int64_t T = l->block_size, size = T * l->key_dim * 2, row = 4 * T, s_bytes = 4 * d->width;
    for (int64_t t = first; t < last; t += WIDE) {
        const char *k[4];
        for (int j = 0; j < 4; j++) {
            int64_t at = d->base + (t + j * TILE < last ? t + j * TILE : last - TILE);
            k[j] = l->keys + (blocks[at / T] * l->kv_heads + g) * size + at % T * 4;
        }
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < l->key_dim; i += STEP) {
            int64_t o = i / 2 * row;
            _tile_loadd(4, query + 2 * i, q_bytes);
            _tile_loadd(5, k[0] + o, row);
            _tile_loadd(6, k[1] + o, row);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(5, k[2] + o, row);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(6, k[3] + o, row);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 6);
        }
        /* Tiles past the last one land in the padding. */
        _tile_stored(0, d->scores + t, s_bytes);
        if (t + 1 * TILE < d->width) _tile_stored(1, d->scores + t + 1 * TILE, s_bytes);
        if (t + 2 * TILE < d->width) _tile_stored(2, d->scores + t + 2 * TILE, s_bytes);
        if (t + 3 * TILE < d->width) _tile_stored(3, d->scores + t + 3 * TILE, s_bytes);
    }
    settle(d->scores);
}

/* Which of the tokens t..t+15 lie in seen..end-1 */
INLINE __mmask16 lanes_in(int64_t t, int64_t seen, int64_t end) {
    __mmask16 in = 0xffff;
    if (seen > t) in &= seen - t < LANES ? 0xffff << (seen - t) : 0;
    if (end < t + LANES) in &= end > t ? 0xffff >> (t + LANES - end) : 0;
    return in;
}

/* One row of scores to weights 2^(factor * (s - largest)), for tokens seen..end-1; 0 elsewhere in first..last-1.
 * Returns their sum. */
static float weigh_row(float *scores, char *weights, int64_t first, int64_t last, int64_t seen, int64_t end,
                       float factor) {
    int64_t lo = seen > first ? seen / LANES * LANES : first, hi = (end + LANES - 1) / LANES * LANES;
    memset(weights + 2 * first, 0, 2 * (lo - first));
    memset(weights + 2 * hi, 0, 2 * (last - hi));
    __m512 by = _mm512_set1_ps(factor), top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t t = lo; t < hi; t += LANES)
        top = _mm512_mask_max_ps(top, lanes_in(t, seen, end), _mm512_mul_ps(_mm512_loadu_ps(scores + t), by), top);
    __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t t = lo; t < hi; t += LANES) {
        __m512 e = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + t), by, most));
        e = _mm512_maskz_mov_ps(lanes_in(t, seen, end), e);
        sum = _mm512_add_ps(sum, e);
        _mm256_storeu_si256((__m256i *)(weights + 2 * t), (__m256i)_mm512_cvtneps_pbh(e));
    }
    return _mm512_reduce_add_ps(sum);
}

/* softcap * tanh(scale * s / softcap) of one row */
static void cap_row(const Layer *l, float *scores, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t += LANES) {
        vec s = tanh_of(widen((const char *)(scores + t), FP32) * (l->scale / l->softcap)) * l->softcap;
        memcpy(scores + t, &s, sizeof s);
    }
}

/* sums[m] = sum of weights[m][t] v[t] over first..last-1 (multiples of PAIRED), up to 64 numbers at a time */
static void weigh_tiles(const Layer *l, const Desk *d, int64_t first, int64_t last) {
    int64_t dim = l->value_dim, w_bytes = 2 * d->width, s_bytes = 4 * dim;
    for (int64_t i = 0; i < dim; i += 4 * TILE) {
        int64_t o1 = i + TILE < dim ? i + TILE : i, o2 = i + 2 * TILE < dim ? i + 2 * TILE : i;
        int64_t o3 = i + 3 * TILE < dim ? i + 3 * TILE : i;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t t = first; t < last; t += PAIRED) {
            const char *v = d->values + 2 * t * dim;
            _tile_loadd(4, d->weights + 2 * t, w_bytes);
            _tile_loadd(5, v + 4 * i, 4 * dim);
            _tile_loadd(6, v + 4 * o1, 4 * dim);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(5, v + 4 * o2, 4 * dim);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(6, v + 4 * o3, 4 * dim);
            _tile_dpbf16ps(2, 4, 5);
            _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(3, d->sums + o3, s_bytes); /* those past the last number are stored first, and overwritten */
        _tile_stored(2, d->sums + o2, s_bytes);
        _tile_stored(1, d->sums + o1, s_bytes);
        _tile_stored(0, d->sums + i, s_bytes);
    }
    settle(d->sums);
}

/* 16 tokens (or what is left) of a piece, one head: rows n.. of the step, at positions `at`.. of the sequence */
static void attend_tile(const Layer *l, const Desk *d, const int32_t *blocks, View q, char *out, int64_t h, int64_t n,
                        int64_t at_token, int64_t rows) {
    int64_t g = h / (l->heads / l->kv_heads), dim = l->value_dim, q_bytes = 2 * q.token;
    int64_t from = l->window && at_token >= l->window ? at_token - l->window + 1 : 0;
    int64_t seen_by_last = at_token + rows - d->base, last_scored = (seen_by_last + TILE - 1) / TILE * TILE;
    int64_t first = (from - d->base) / PAIRED * PAIRED, last = (seen_by_last + PAIRED - 1) / PAIRED * PAIRED;
    const char *query = at(q.data, BF16, h * q.head + n * q.token);
    if (rows < TILE) {
        for (int64_t m = 0; m < rows; m++) memcpy(d->query + m * l->key_dim * 2, query + m * q_bytes, l->key_dim * 2);
        query = d->query;
        q_bytes = 2 * l->key_dim; /* rows past the last may hold anything: no row of a product depends on another */
    }
    settle(query);
    score_tiles(l, d, blocks, query, q_bytes, g, first, last_scored);
    float total[TILE], factor = LOG2_E * (l->softcap > 0 ? 1.0f : l->scale);
    for (int64_t m = 0; m < rows; m++) {
        int64_t end = at_token + m + 1 - d->base, seen = l->window && end + d->base > l->window ? end - l->window : 0;
        float *scores = d->scores + m * d->width;
        if (l->softcap > 0) cap_row(l, scores, first, last_scored);
        total[m] = weigh_row(scores, d->weights + m * d->width * 2, first, last, seen, end, factor);
    }
    settle(d->weights);
    weigh_tiles(l, d, first, last);
    for (int64_t m = 0; m < rows; m++) {
        float share = 1.0f / total[m];
        for (int64_t i = 0; i < dim; i += LANES)
            store_part(out + 2 * (((n + m) * l->heads + h) * dim + i), BF16, LANES, 1,
                       widen((const char *)(d->sums + m * dim + i), FP32) * share);
    }
}

static void attend_piece(const Layer *l, const Rows *r, View q, char *out, int64_t p, int64_t g, char *work) {
    const int32_t *blocks = r->blocks + r->piece_begin[p];
    int64_t first = r->piece_first[p], end = r->piece_end[p], start = r->piece_start[p], T = l->block_size;
    int64_t total = start + end - first, group = l->heads / l->kv_heads;
    int64_t from = l->window && start >= l->window ? start - l->window + 1 : 0, base = from / T * T;
    Desk d = lay_desk(l, work, base, (total - base + WIDE - 1) / WIDE * WIDE);
    line_up(l, &d, blocks, total, g);
    for (int64_t n = first; n < end; n += TILE)
        for (int64_t h = g * group; h < (g + 1) * group; h++)
            attend_tile(l, &d, blocks, q, out, h, n, start + n - first, end - n < TILE ? end - n : TILE);
}
#endif
