/* A linear and its LoRA in one pass over the weight, for few rows.
 *
 *     y[d] = W x[row(d)] + bias + sum over pairs p with dst[p] == d of
 *            B[slot]^T (scale * weight[p] * rank_weight[p] * (A[slot] x[src[p]]))
 *
 * Why: at 1..16 rows a linear is bound by reading W once; every further call of a framework costs more than the LoRA.
 *
 * Rows may be bf16 or fp32 and A, B either; all sums are fp32 and y is rounded once. One accumulator per (row, output)
 * walks the input in one order and is folded by one tree, whatever the number of rows or threads: a row's result never
 * depends on its neighbours.
 *
 * Letters: I input width, O output width, N rows of x, D rows of y, P pairs, r rank of a slot.
 */
#include "lora_dot.h"
#include "lora_stream.h"
#include "lora_amx.h"
#include "lora_pairs.h"

enum { STRIP = 2 * TILE, BLOCK = 32 };

typedef struct {
    const void *w, *bias, *a, *b;
    const int32_t *start, *rank;
    const float *scale;
    int64_t d_in, d_out, num_slots, max_rank;
    int32_t type, a_type, b_type; /* type: x, W, bias and y */
} Site;

typedef struct {
    const Site *site;
    const Pairs *pairs;
    const RowMap *enter, *exit;
    const char *x;      /* rows that A reads */
    char *folded;       /* rows that W reads when exit folds them, else NULL */
    uint32_t *packed;   /* the rows that W reads as AMX tiles want them, or NULL */
    char *y;
    float *u;           /* [P, max_rank] gated A x */
    int32_t *begin, *order;           /* pairs by destination, in their given order */
    int32_t *row_begin, *row_order;   /* FFN rows by token */
    float *scratch;     /* per thread: base tiles [2, N, 16], then one B tile [max_rank, 16] */
    int64_t scratch_len, num_base, num_dst;
} Call;

/* u[p] = scale * weight[p] * rank_weight[p] * (A[slot] x[src]) */
static void shrink(const Call *c, int64_t p) {
    const Site *s = c->site;
    const Pairs *q = c->pairs;
    int32_t slot = q->slot[p];
    if (slot < 0) return;
    int64_t rank = s->rank[slot];
    const char *a = at(s->a, s->a_type, (int64_t)s->start[slot] * s->d_in);
    const char *x[1] = {at(c->x, s->type, (int64_t)q->src[p] * s->d_in)};
    float gate = s->scale[slot] * q->weight[p];
    for (int64_t r = 0; r < rank; r += TILE) {
        tile t;
        float f[TILE];
        dot_tile(&t, x, s->type, a, s->a_type, r, rank, s->d_in, 1);
        memcpy(f, &t, sizeof f);
        for (int64_t i = r; i < rank && i < r + TILE; i++)
            c->u[p * s->max_rank + i] =
                f[i - r] * (q->rank_weight ? gate * q->rank_weight[p * q->rank_stride + i] : gate);
    }
}

/* 16 columns of rows first..last-1: the pairs are added to base [N, 16] + bias, or to y itself where base is NULL. */
static void expand(const Call *c, int64_t o, int64_t first, int64_t last, const float *base, float *b_tile) {
    const Site *s = c->site;
    const Pairs *q = c->pairs;
    int64_t count = s->d_out - o < TILE ? s->d_out - o : TILE;
    int32_t loaded = -1;
    tile bias = {0};
    if (base && s->bias) bias = load_tile(at(s->bias, s->type, o), s->type, count);
    for (int64_t d = first; d < last; d++) {
        char *out = (char *)at(c->y, s->type, d * s->d_out + o);
        if (!base && c->begin[d] == c->begin[d + 1]) continue;
        tile acc;
        if (base) {
            memcpy(&acc, base + TILE * (c->enter ? c->enter->token[d] : d), sizeof acc);
            UNROLL for (int v = 0; v < PARTS; v++) acc.v[v] += bias.v[v];
        } else {
            acc = load_tile(out, s->type, count);
        }
        for (int32_t e = q ? c->begin[d] : 0; q && e < c->begin[d + 1]; e++) {
            int32_t p = c->order[e], slot = q->slot[p];
            if (slot < 0) continue;
            if (slot != loaded) {
                const char *b = at(s->b, s->b_type, s->start[slot] * s->d_out + o);
                for (int32_t i = 0; i < s->rank[slot]; i++) {
                    tile t = load_tile(at(b, s->b_type, i * s->d_out), s->b_type, count);
                    memcpy(b_tile + TILE * i, &t, sizeof t);
                }
                loaded = slot;
            }
            for (int32_t i = 0; i < s->rank[slot]; i++) {
                float u = c->u[p * s->max_rank + i];
                UNROLL for (int v = 0; v < PARTS; v++)
                    acc.v[v] += u * *(const vec *)(b_tile + TILE * i + v * LANES);
            }
        }
        store_tile(out, s->type, count, acc);
    }
}

/* base[2][N][16] = 32 outputs of W (rows of x) + bias */
static void base_strip(const Call *c, int64_t o, float *base, Stream *stream) {
    const Site *s = c->site;
    const char *rows = c->folded ? c->folded : c->x;
#if defined(__AMX_BF16__)
    if (c->packed) {
        amx_strip(base, base + TILE * c->num_base, TILE, c->packed, s->w, o, s->d_out, s->d_in, c->num_base,
                  stream);
        return;
    }
#endif
    for (int64_t end = o + STRIP; o < end && o < s->d_out; o += TILE, base += TILE * c->num_base)
        for (int64_t n = 0; n < c->num_base; n += CHUNK) {
            int have = c->num_base - n < CHUNK ? (int)(c->num_base - n) : CHUNK;
            const char *x[CHUNK];
            tile out[CHUNK];
            for (int i = 0; i < have; i++) x[i] = at(rows, s->type, (n + i) * s->d_in);
            dot_tile(out, x, s->type, s->w, s->type, o, s->d_out, s->d_in, have);
            memcpy(base + TILE * n, out, have * sizeof(tile));
        }
}

static void share(const Call *c, int me, int threads) {
    const Site *s = c->site;
    float *base = c->scratch + me * c->scratch_len, *b_tile = base + STRIP * c->num_base;
    int64_t strips = (s->d_out + STRIP - 1) / STRIP, blocks = (c->num_dst + BLOCK - 1) / BLOCK;
    for (int64_t p = me; c->pairs && p < c->pairs->num_pairs; p += threads) shrink(c, p);
    for (int64_t n = me; c->folded && n < c->num_base; n += threads)
        fold_rows((char *)at(c->folded, s->type, n * s->d_in), c->x, s->type, c->exit, c->row_order, c->row_begin[n],
                  c->row_begin[n + 1], s->d_in);
    BARRIER
#if defined(__AMX_BF16__)
    if (c->packed && me == 0) amx_pack(c->packed, c->folded ? c->folded : c->x, c->num_base, s->d_in);
    if (c->packed) amx_configure(c->num_base);
    BARRIER
#endif
    if (!s->w) {
        for (int64_t b = blocks * me / threads; b < blocks * (me + 1) / threads; b++)
            for (int64_t o = 0; o < s->d_out; o += TILE)
                expand(c, o, b * BLOCK, (b + 1) * BLOCK < c->num_dst ? (b + 1) * BLOCK : c->num_dst, NULL, b_tile);
        return;
    }
    Segment segment;
    Stream stream = {.segments = &segment};
    int64_t first = strips * me / threads, last = strips * (me + 1) / threads;
    int64_t outputs = (last * STRIP < s->d_out ? last * STRIP : s->d_out) - first * STRIP;
    add_segment(&stream, at(s->w, s->type, first * STRIP * s->d_in), outputs * s->d_in * size_of(s->type), 1, 0);
    for (int64_t t = first; t < last; t++) {
        base_strip(c, t * STRIP, base, &stream);
        for (int64_t o = t * STRIP, i = 0; i < 2 && o < s->d_out; o += TILE, i++)
            expand(c, o, 0, c->num_dst, base + i * TILE * c->num_base, b_tile);
    }
#if defined(__AMX_BF16__)
    if (c->packed) _tile_release();
#endif
}

static int check_pairs(const Site *s, const Pairs *q) {
    for (int64_t p = 0; p < q->num_pairs; p++) {
        if (q->src[p] < 0 || q->src[p] >= q->num_src) return BAD_SRC;
        if (q->dst[p] < 0 || q->dst[p] >= q->num_dst) return BAD_DST;
        if (q->slot[p] >= s->num_slots) return BAD_SLOT;
        if (q->rank_weight && q->slot[p] >= 0 && s->rank[q->slot[p]] > q->rank_stride) return BAD_RANK;
    }
    return OK;
}

/* `rows` rows of x; with w NULL the pairs are added to y, else y is written. Returns OK or what was wrong. */
int loramux_linear(const Site *s, const Pairs *pairs, const RowMap *enter, const RowMap *exit, const void *x, void *y,
                   int64_t rows, int threads) {
    Call c = {.site = s, .pairs = pairs, .enter = enter, .exit = exit, .x = x, .y = y};
    int64_t num_pairs = pairs ? pairs->num_pairs : 0;
    int bad = pairs ? check_pairs(s, pairs) : OK;
    if (bad || (bad = check_rows(enter)) || (bad = check_rows(exit))) return bad;
    if (exit && exit->num_rows != rows) return BAD_ROWS;
    c.num_base = !s->w ? 0 : exit ? exit->num_tokens : rows;
    c.num_dst = enter ? enter->num_rows : s->w ? c.num_base : pairs->num_dst;
    if (enter && enter->num_tokens != rows) return BAD_ROWS;
    if (pairs && (pairs->num_src != rows || pairs->num_dst != c.num_dst)) return BAD_ROWS;
    c.scratch_len = STRIP * c.num_base + TILE * s->max_rank;
#ifndef _OPENMP
    threads = 1;
#endif
    int64_t row_bytes = exit ? c.num_base * s->d_in * size_of(s->type) : 0;
    int64_t packed_bytes = 0;
#if defined(__AMX_BF16__)
    if (s->w && s->type == BF16 && s->d_in % STEP == 0 && s->d_out % TILE == 0)
        packed_bytes = 2 * s->d_in * (c.num_base + 16);
#endif
    int64_t total = 4 * (num_pairs * s->max_rank + num_pairs + c.num_dst + rows + c.num_base + threads * c.scratch_len)
                    + row_bytes + packed_bytes + 10 * 64;
    char *work = aligned_alloc(64, (total + 63) / 64 * 64), *from = work;
    if (!work) return NO_MEMORY;
    c.scratch = carve(&from, 4 * threads * c.scratch_len);
    c.u = carve(&from, 4 * num_pairs * s->max_rank);
    c.order = carve(&from, 4 * num_pairs);
    c.begin = carve(&from, 4 * (c.num_dst + 2));
    if (pairs) group_items(pairs->dst, num_pairs, c.num_dst, c.begin, c.order);
    if (exit) {
        c.row_order = carve(&from, 4 * rows);
        c.row_begin = carve(&from, 4 * (c.num_base + 2));
        c.folded = carve(&from, row_bytes);
        group_items(exit->token, rows, c.num_base, c.row_begin, c.row_order);
    }
    if (packed_bytes && c.num_base) c.packed = carve(&from, packed_bytes);
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        share(&c, omp_get_thread_num(), omp_get_num_threads());
    } else
#endif
        share(&c, 0, 1);
    free(work);
    return OK;
}

/* Whether this process may use what the file was compiled for. */
int loramux_is_usable(void) {
#if defined(__AMX_BF16__)
    return amx_is_allowed();
#else
    return 1;
#endif
}
