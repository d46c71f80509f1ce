/* Linears that read the same rows, with the adapters of a whole batch, in one call: see pool.py.
 *
 *     y_m[d] = W_m x[row(d)] + bias_m + sum over pairs p with dst[p] == d of
 *              B[slot]^T (scale * weight[p] * rank_weight[p] * (A[slot] x[src[p]]))
 *
 * where a slot with a DoRA gain c adds c * that + weight[p] * (c - 1) * W_m x[src[p]] instead.
 *
 * Why: a decode step is bound by reading weights and rows once each. Every slot says for itself where its rows lie and
 * of which type they are, so tenants of any rank meet in one call. Sums are fp32 and y is rounded once. Every sum is
 * made in one order, whatever the number of threads: a row's result never depends on its neighbours. (pool_few.h and
 * pool_many.h give the same base; their adapters differ by less than y's rounding.)
 *
 * Letters: I input width, O output width, N rows that W reads, D rows of y, P pairs, r rank of a slot, m linear.
 */
#include "lora_dot.h"
#include "lora_stream.h"
#include "lora_amx.h"
#include "lora_pairs.h"
#include "pool_lora.h"
#include "pool_gates.h"
#include "pool_types.h"
#include "pool_few.h"
#include "pool_add.h"
#include "pool_many.h"

static int check_member(const Group *g, const Member *m, Work *k, int64_t num_src, int64_t num_dst) {
    const Pairs *q = m->pairs;
    k->max_rank = k->has_gain = 0;
    k->is_half = 1;
    if (!q) return OK;
    if (q->num_src != num_src || q->num_dst != num_dst) return BAD_ROWS;
    for (int64_t p = 0; p < q->num_pairs; p++) {
        int32_t slot = q->slot[p];
        if (q->src[p] < 0 || q->src[p] >= num_src) return BAD_SRC;
        if (q->dst[p] < 0 || q->dst[p] >= num_dst) return BAD_DST;
        if (slot >= g->capacity) return BAD_SLOT;
        if (slot < 0) continue;
        int64_t rank = m->slots.rank[slot];
        if (rank < 0) return EMPTY_SLOT;
        if (q->rank_weight && rank > q->rank_stride) return BAD_RANK;
        if (m->slots.gain[slot] && g->exit) return GAIN_AT_EXIT;
        if (m->slots.gain[slot]) k->has_gain = 1;
        if (rank > 0 && m->slots.type[slot] != BF16) k->is_half = 0;
        if (rank > k->max_rank) k->max_rank = rank;
    }
    return OK;
}

/* An entry's pairs are of its token and of as many ranks as its gate reads. `widest`: most rank rows of an entry. */
static int check_late(const Group *g, int64_t *widest) {
    const Late *late = g->late;
    *widest = 0;
    if (!late) return OK;
    const Pairs *q = g->members->pairs;
    if (!q) return BAD_GATE;
    for (int64_t i = 0; i < late->num_entries; i++) {
        const LateGate *gate = late->gates + late->gate[i];
        int64_t rank = 0, first = late->pair[i];
        if (first < 0 || first + gate->num_experts > q->num_pairs) return BAD_GATE;
        for (int64_t p = first; p < first + gate->num_experts; p++) {
            if (q->slot[p] < 0 || q->src[p] != late->token[i]) return BAD_GATE;
            rank += g->members->slots.rank[q->slot[p]];
        }
        if (rank != gate->num_rows) return BAD_GATE;
        if (rank > *widest) *widest = rank;
    }
    return OK;
}

/* Outputs at a time: the sums of all rows stay in the second-level cache, and threads have something to share. */
static int64_t block_width(int64_t num_rows, int64_t d_out, int threads) {
    int64_t width = BLOCK_FLOATS / (num_rows ? num_rows : 1), part = (d_out + threads - 1) / threads;
    if (width > MAX_BLOCK) width = MAX_BLOCK;
    if (threads > 1 && width > part) width = part;
    return width < STRIP ? STRIP : (width + STRIP - 1) / STRIP * STRIP;
}

enum { FIRST, SECOND, ROOMS, KEPT = 64 << 20 };

/* Working memory of the calling thread, kept: freshly mapped pages cost as much as a small linear. */
static char *room(int which, int64_t bytes) {
    static _Thread_local char *memory[ROOMS];
    static _Thread_local int64_t size[ROOMS];
    if (bytes > size[which] || size[which] > KEPT) {
        free(memory[which]);
        size[which] = (bytes + bytes / 2 + 63) / 64 * 64;
        memory[which] = aligned_alloc(64, size[which]);
        if (!memory[which]) size[which] = 0;
    }
    return memory[which];
}

#if defined(__AMX_BF16__)
/* Whether the call goes the way of many rows: bf16 throughout, whole tiles, no gains, no rows made of tokens. */
static int is_many(const Group *g, const Work *work, int64_t num_rows) {
    int fits = num_rows >= MANY && g->type == BF16 && g->d_in % STEP == 0 && !g->enter;
    for (int64_t i = 0; i < g->num_members; i++)
        fits &= g->members[i].d_out % TILE == 0 && !work[i].has_gain && work[i].is_half;
    return fits;
}
#endif

/* What is worked out once for both ways; `from` is memory that measure() asked for. */
static void prepare(Call *c, int64_t rows, int64_t folded, char **from) {
    const Group *g = c->group;
    for (int64_t i = 0; i < g->num_members; i++) {
        const Pairs *q = g->members[i].pairs;
        if (!q) continue;
        c->work[i].u = carve(from, 4 * q->num_pairs * c->work[i].max_rank);
        c->work[i].order = carve(from, 4 * q->num_pairs);
        c->work[i].begin = carve(from, 4 * (c->num_dst + 2));
        group_items(q->dst, q->num_pairs, c->num_dst, c->work[i].begin, c->work[i].order);
    }
    if (!g->exit) return;
    c->row_order = carve(from, 4 * rows);
    c->row_begin = carve(from, 4 * (c->num_base + 2));
    c->rows = carve(from, folded);
    group_items(g->exit->token, rows, c->num_base, c->row_begin, c->row_order);
}

static int64_t prepared_bytes(const Call *c, int64_t rows, int64_t folded) {
    const Group *g = c->group;
    int64_t bytes = 0;
    for (int64_t i = 0; i < g->num_members; i++) {
        const Pairs *q = g->members[i].pairs;
        if (q) bytes += 4 * (q->num_pairs * (c->work[i].max_rank + 1) + c->num_dst + 2) + 3 * 64;
    }
    return bytes + (g->exit ? 4 * (rows + c->num_base + 2) + folded + 3 * 64 : 0);
}

static int run_few(Call *c, int64_t rows, int64_t num_pairs, int threads) {
    const Group *g = c->group;
    int64_t widest = 0, folded = g->exit ? c->num_base * g->d_in * size_of(g->type) : 0, packed = 0;
    for (int64_t i = 0; i < g->num_members; i++) {
        if (g->members[i].d_out > widest) widest = g->members[i].d_out;
#if defined(__AMX_BF16__)
        if (g->members[i].d_out % TILE == 0 && g->type == BF16 && g->d_in % STEP == 0)
            packed = 2 * g->d_in * (c->num_base + 16);
#endif
    }
    c->block = block_width(c->num_base, widest, threads);
    c->scratch_len = (c->num_base + 2) * (c->block + PAD);
    for (int64_t i = 0; i < g->num_members; i++) {
        const Member *m = g->members + i;
        c->work[i].num_blocks = (m->d_out + c->block - 1) / c->block;
        c->num_segments += (m->pairs ? m->pairs->num_pairs : 0) * (c->work[i].num_blocks + 1) + c->work[i].num_blocks;
    }
    int64_t segments = threads * c->num_segments * sizeof(Segment);
    char *from = room(FIRST, 4 * threads * (c->scratch_len + c->late_rows) + packed + segments
                                 + prepared_bytes(c, rows, folded) + 4 * 64);
    if (!from) return NO_MEMORY;
    c->scratch = carve(&from, 4 * threads * c->scratch_len);
    c->segments = carve(&from, segments);
    c->late = carve(&from, 4 * threads * c->late_rows);
    if (packed && c->num_base) c->packed = carve(&from, packed);
    prepare(c, rows, folded, &from);
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        share(c, num_pairs, omp_get_thread_num(), omp_get_num_threads());
    } else
#endif
        share(c, num_pairs, 0, 1);
    return OK;
}

#if defined(__AMX_BF16__)
static int run_many(Call *c, int64_t rows, int64_t num_pairs, int threads) {
    const Group *g = c->group;
    ManyPlan plans[g->num_members];
    int64_t folded = g->exit ? c->num_base * g->d_in * 2 : 0, planned = 0, blocks = (c->num_base + RUN - 1) / RUN;
    for (int64_t i = 0; i < g->num_members; i++) {
        c->work[i].max_rank = (c->work[i].max_rank + TILE - 1) / TILE * TILE;
        planned += 4 * (blocks + 1) + (g->members[i].pairs ? 8 * g->members[i].pairs->num_pairs : 0) + 2 * 64;
    }
    int64_t tail = ROWS * 2 * g->d_in, segments = threads * g->num_members * sizeof(Segment);
    char *from = room(FIRST, tail + segments + planned + 4 * threads * c->late_rows + prepared_bytes(c, rows, folded)
                                 + 3 * 64);
    if (!from) return NO_MEMORY;
    c->tail = carve(&from, tail);
    c->segments = carve(&from, segments);
    c->late = carve(&from, 4 * threads * c->late_rows);
    c->num_segments = g->num_members;
    c->plans = plans;
    prepare(c, rows, folded, &from);
    c->block = TURNED_BYTES / (2 * g->d_in) / STRIP * STRIP;
    if (c->block < STRIP) c->block = STRIP;
    int64_t entries = 0, ranks = 0, most_pairs = 0;
    for (int64_t i = 0; i < g->num_members; i++) {
        const Member *m = g->members + i;
        plans[i] = (ManyPlan){.num_blocks = blocks};
        c->work[i].num_blocks = (m->d_out + c->block - 1) / c->block;
        if (!m->pairs) continue;
        plans[i].begin = carve(&from, 4 * (blocks + 1));
        plans[i].slots = carve(&from, 8 * m->pairs->num_pairs);
        plan_rows(m, c->work + i, c->num_base, plans + i);
        entries += plans[i].num_entries;
        if (plans[i].num_slots * plans[i].ranks > ranks) ranks = plans[i].num_slots * plans[i].ranks;
        if (m->pairs->num_pairs > most_pairs) most_pairs = m->pairs->num_pairs;
    }
    int64_t shrinking = 32 * g->d_in + 4 * RUN * 2 * g->d_in, listing = 4 * most_pairs;
    int64_t tiling = 2 * g->d_in * c->block + 64 * c->block * ranks + 2 * 4 * ROWS * 2 * TILE + ranks + 4 * 64;
    int64_t bytes = shrinking > tiling ? shrinking : tiling;
    c->scratch_len = ((bytes > listing ? bytes : listing) + 63) / 64 * 16;
    from = room(SECOND, 4 * threads * c->scratch_len + entries * (sizeof(Entry) + 2 * HALVES) + 3 * 64);
    if (!from) return NO_MEMORY;
    c->scratch = carve(&from, 4 * threads * c->scratch_len);
    uint16_t *halves = carve(&from, entries * 2 * HALVES);
    Entry *all = carve(&from, entries * sizeof(Entry));
    for (int64_t i = 0; i < entries; i++) all[i].halves = halves + i * HALVES;
    for (int64_t i = 0; i < g->num_members; all += plans[i++].num_entries) plans[i].entries = all;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        share_many(c, num_pairs, omp_get_thread_num(), omp_get_num_threads());
    } else
#endif
        share_many(c, num_pairs, 0, 1);
    return OK;
}
#endif

/* `rows` rows of x. Writes every member's y. Returns OK or what was wrong; nothing is written then. */
int loramux_group(const Group *g, const void *x, int64_t rows, int threads) {
    Work work[g->num_members];
    Call c = {.group = g, .work = work, .x = x, .rows = x};
    int64_t num_pairs = 0;
    int bad;
#ifndef _OPENMP
    threads = 1;
#endif
    if ((bad = check_rows(g->enter)) || (bad = check_rows(g->exit))) return bad;
    if ((g->exit && g->exit->num_rows != rows) || (g->enter && g->enter->num_tokens != rows)) return BAD_ROWS;
    c.num_base = g->exit ? g->exit->num_tokens : rows;
    c.num_dst = g->enter ? g->enter->num_rows : c.num_base;
    for (int64_t i = 0; i < g->num_members; i++) {
        const Pairs *q = g->members[i].pairs;
        work[i].y = g->y[i];
        if ((bad = check_member(g, g->members + i, work + i, rows, c.num_dst))) return bad;
        if (q && q->num_pairs > num_pairs) num_pairs = q->num_pairs;
    }
    if ((bad = check_late(g, &c.late_rows))) return bad;
#if defined(__AMX_BF16__)
    if (is_many(g, work, c.num_base)) return run_many(&c, rows, num_pairs, threads);
#endif
    return run_few(&c, rows, num_pairs, threads);
}

static int check_add(const Add *a, int64_t *max_rank) {
    const Pairs *q = a->pairs;
    *max_rank = 0;
    for (int64_t p = 0; p < q->num_pairs; p++) {
        int32_t slot = q->slot[p];
        if (q->src[p] < 0 || q->src[p] >= q->num_src) return BAD_SRC;
        if (q->dst[p] < 0 || q->dst[p] >= q->num_dst) return BAD_DST;
        if (slot >= a->capacity) return BAD_SLOT;
        if (slot < 0) continue;
        if (a->slots.rank[slot] < 0) return EMPTY_SLOT;
        if (q->rank_weight && a->slots.rank[slot] > q->rank_stride) return BAD_RANK;
        if (a->slots.gain[slot]) return GAIN_HERE;
        if (a->slots.rank[slot] > *max_rank) *max_rank = a->slots.rank[slot];
    }
    return OK;
}

/* y [num_dst, O] += LoRA of x [num_src, I]. */
int loramux_add(const Add *a, const void *x, void *y, int threads) {
    AddCall c = {.add = a, .x = x, .y = y};
    int64_t max_rank;
    int bad = check_add(a, &max_rank);
    if (bad || !max_rank) return bad;
#ifndef _OPENMP
    threads = 1;
#endif
    c.pitch = (max_rank + TILE - 1) / TILE * TILE;
    /* Shrinking: 16 ranks and 64 rows of x. Expanding: 16 rows of u, then B; or one row of y. */
    int64_t shrinking = 32 * a->d_in + 4 * RUN * 2 * a->d_in;
    int64_t expanding = 64 * RUN * c.pitch / TILE + 64 * c.pitch / TILE * (a->d_out + PANEL) + 4 * (a->d_out + PANEL);
    c.scratch_len = ((shrinking > expanding ? shrinking : expanding) + 63) / 64 * 64;
    char *from = room(FIRST, threads * c.scratch_len + 4 * a->pairs->num_pairs * c.pitch + 64);
    if (!from) return NO_MEMORY;
    c.scratch = carve(&from, threads * c.scratch_len);
    c.u = carve(&from, 4 * a->pairs->num_pairs * c.pitch);
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        share_add(&c, omp_get_thread_num(), omp_get_num_threads());
    } else
#endif
        share_add(&c, 0, 1);
    return OK;
}

/* Decides all entries for the rows of x. */
int loramux_top_k(const TopK *c, const void *x, int64_t rows, int64_t most_experts) {
    float p[most_experts + TILE];
    if (rows != c->num_tokens) return BAD_ROWS;
    for (int64_t i = 0; i < c->num_entries; i++) top_k(c, i, x, p);
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
