/* The group call for many rows on AMX tiles: the linears of prompts, base and adapters in one pass over y.
 *
 * A block of W is turned into tiles once and meets all rows, which are read where they lie. Behind the last input of W
 * a tile goes on with the ranks of B: the gated t of 16 rows is split into two bf16 numbers (high and low part, 16 bits
 * of mantissa), and rows that do not use a slot have zeros there, so a row's bits do not depend on who shares its tile.
 * A slot whose B is not finite would break that (zero times infinity): it is added row by row.
 *
 * Letters: I input width, O output width, N rows, P pairs, r rank of a slot.
 */
#if defined(__AMX_BF16__)
enum { ROWS = 2 * TILE, MANY = 160, TURNED_BYTES = 320 << 10, HALVES = RUN * 2 * TILE };

/* 16 ranks of one slot for 16 rows: `halves` is [16 rows][16 high parts, 16 low parts]. */
typedef struct {
    int32_t used, block; /* which of the slots in use, which 16 ranks of it */
    uint16_t *halves;
} Entry;

/* One member's pairs by rows: entries begin[n]..begin[n + 1] belong to rows 16 n..16 n + 15. */
typedef struct ManyPlan {
    int32_t *begin, *slots; /* slots: those in use, in the order in which they first act */
    int64_t num_slots, num_entries, num_blocks, ranks; /* ranks: blocks of 16 of the largest */
    Entry *entries;
} ManyPlan;

/* What is still to be written of 32 rows and 32 outputs. */
typedef struct {
    const float *sums; /* [2 halves of outputs][2 halves of rows][16][16] */
    char *y;
    int64_t stride, next, last, two;
    __m512 bias[2];
} Rest;

INLINE void write_rows(Rest *d, int64_t count) {
    for (int64_t end = d->next + count; d->next < end && d->next < d->last; d->next++) {
        const float *first = d->sums + TILE * d->next;
        char *y = d->y + d->next * d->stride;
        __m512 low = _mm512_add_ps(_mm512_load_ps(first), d->bias[0]);
        if (d->two) {
            __m512 high = _mm512_add_ps(_mm512_load_ps(first + ROWS * TILE), d->bias[1]);
            _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        } else {
            _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(low));
        }
    }
}

static int64_t find_slot(const int32_t *slots, int64_t count, int32_t slot) {
    for (int64_t i = 0; i < count; i++)
        if (slots[i] == slot) return i;
    return -1;
}

/* The slots that act on rows 16 n..16 n + 15, in the order of their first pair. Returns how many blocks of 16 ranks
 * they have together. */
static int64_t slots_of_rows(const Member *m, const Work *k, int64_t n, int64_t num_rows, int32_t *slots,
                             int64_t *count) {
    int64_t end = (n + 1) * RUN < num_rows ? (n + 1) * RUN : num_rows, ranks = 0;
    *count = 0;
    for (int32_t e = k->begin[n * RUN]; e < k->begin[end]; e++) {
        int32_t slot = m->pairs->slot[k->order[e]];
        if (slot < 0 || m->slots.rank[slot] == 0 || find_slot(slots, *count, slot) >= 0) continue;
        slots[(*count)++] = slot;
        ranks += (m->slots.rank[slot] + TILE - 1) / TILE;
    }
    return ranks;
}

/* Finds a member's slots and where the entries of its rows begin; begin [num_blocks + 1] and slots [2 P] are given. */
static void plan_rows(const Member *m, const Work *k, int64_t num_rows, ManyPlan *plan) {
    int32_t *own = plan->slots + m->pairs->num_pairs;
    plan->begin[0] = 0;
    for (int64_t n = 0; n < plan->num_blocks; n++) {
        int64_t count;
        plan->begin[n + 1] = plan->begin[n] + (int32_t)slots_of_rows(m, k, n, num_rows, own, &count);
        for (int64_t i = 0; i < count; i++) {
            if (find_slot(plan->slots, plan->num_slots, own[i]) >= 0) continue;
            int64_t ranks = (m->slots.rank[own[i]] + TILE - 1) / TILE;
            plan->slots[plan->num_slots++] = own[i];
            if (ranks > plan->ranks) plan->ranks = ranks;
        }
    }
    plan->num_entries = plan->begin[plan->num_blocks];
}

/* Fills the entries of rows 16 n..16 n + 15; `at_` is where they begin. */
static int64_t fill_rows(const Member *m, const Work *k, const ManyPlan *plan, int64_t n, int64_t num_rows,
                         int32_t *own, int64_t at_) {
    int64_t count, end = (n + 1) * RUN < num_rows ? (n + 1) * RUN : num_rows;
    slots_of_rows(m, k, n, num_rows, own, &count);
    for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; r < m->slots.rank[own[i]]; r += TILE, at_++) {
            float sums[RUN * TILE] = {0};
            for (int64_t d = n * RUN; d < end; d++)
                for (int32_t e = k->begin[d]; e < k->begin[d + 1]; e++) {
                    int32_t p = k->order[e];
                    if (m->pairs->slot[p] != own[i]) continue;
                    for (int64_t j = 0; j < TILE && r + j < m->slots.rank[own[i]]; j++)
                        sums[(d - n * RUN) * TILE + j] += k->u[p * k->max_rank + r + j];
                }
            Entry *entry = plan->entries + at_;
            entry->used = (int32_t)find_slot(plan->slots, plan->num_slots, own[i]);
            entry->block = (int32_t)(r / TILE);
            split_rows(sums, entry->halves);
        }
    return at_;
}

/* 32 rows by 32 outputs (16 where W ends): sums in registers from the first input to the last rank. `turned`: two
 * blocks of W as tiles; `b`: where the ranks of the entries' slots lie for these outputs. */
static void many_tile(const Call *c, const ManyPlan *plan, const char *x, int64_t n, const uint32_t *turned,
                      const uint32_t *b, int64_t b_step, const uint8_t *is_finite, int two, float *sums, Rest *rest) {
    int64_t d_in = c->group->d_in, drained = (ROWS * STEP + d_in - 1) / d_in;
    const char *second = x + 2 * RUN * d_in;
    const uint32_t *w1 = two ? turned + 8 * d_in : turned;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < d_in; k += STEP) {
        _tile_loadd(4, x + 2 * k, 2 * d_in);
        _tile_loadd(6, turned + 8 * k, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, second + 2 * k, 2 * d_in);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, w1 + 8 * k, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        write_rows(rest, drained);
    }
    for (int64_t i = 0; plan->begin && i < 2 && n + i < plan->num_blocks; i++)
        for (int32_t e = plan->begin[n + i]; e < plan->begin[n + i + 1]; e++) {
            const Entry *entry = plan->entries + e;
            const uint32_t *ranks = b + (entry->used * plan->ranks + entry->block) * b_step;
            if (!is_finite[entry->used]) continue;
            _tile_loadd(4, entry->halves, 64);
            _tile_loadd(6, ranks, 64);
            _tile_loadd(7, two ? ranks + TILE * TILE : ranks, 64);
            if (i == 0) {
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(2, 4, 7);
            } else {
                _tile_dpbf16ps(1, 4, 6);
                _tile_dpbf16ps(3, 4, 7);
            }
        }
    write_rows(rest, ROWS);
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + RUN * TILE, 64);
    _tile_stored(2, sums + ROWS * TILE, 64);
    _tile_stored(3, sums + (ROWS + RUN) * TILE, 64);
    settle(sums);
}

/* Pairs of slots whose B is not finite, outputs o..o + count. */
static void add_unsafe(const Member *m, const Work *k, const ManyPlan *plan, int64_t o, int64_t count,
                       const uint8_t *is_finite, float *row) {
    Stream none = {.lead = MOST_LEAD};
    for (int64_t p = 0; p < m->pairs->num_pairs; p++) {
        int32_t slot = m->pairs->slot[p];
        int64_t used = slot < 0 ? -1 : find_slot(plan->slots, plan->num_slots, slot);
        if (used < 0 || is_finite[used]) continue;
        char *y = (char *)k->y + 2 * (m->pairs->dst[p] * m->d_out + o);
        for (int64_t i = 0; i < count; i += TILE) {
            tile t = load_tile(y + 2 * i, BF16, TILE);
            memcpy(row + i, &t, sizeof t);
        }
        expand_row(row, k->u + p * k->max_rank, (const char *)m->slots.b[slot] + 2 * o, BF16, m->slots.rank[slot],
                   m->d_out, count, 0, &none);
        store_row(y, BF16, row, NULL, count);
    }
}

/* Outputs o..o + count of all rows. `scratch`: W and B as tiles, sums, flags. */
static void many_block(const Call *c, const Member *m, const Work *k, const ManyPlan *plan, int64_t o, int64_t count,
                       char *scratch, Stream *s) {
    int64_t d_in = c->group->d_in, tiles = count / TILE, b_step = tiles * TILE * TILE;
    uint32_t *turned = carve(&scratch, 2 * d_in * count);
    uint32_t *b = carve(&scratch, 4 * plan->num_slots * plan->ranks * b_step);
    float *sums = carve(&scratch, 2 * 4 * ROWS * 2 * TILE);
    uint8_t *is_finite = carve(&scratch, plan->num_slots);
    int64_t all_finite = 1, turn_ = 0;
    for (int64_t i = 0; i < count; i += TILE) {
        amx_pack_tile(turned + 8 * d_in * (i / TILE), at(m->w, BF16, (o + i) * d_in), TILE, d_in);
        advance(s, 2 * TILE * d_in, 0);
    }
    for (int64_t i = 0; i < plan->num_slots; i++) {
        int32_t slot = plan->slots[i];
        is_finite[i] = pack_b((const char *)m->slots.b[slot] + 2 * o, m->slots.rank[slot], m->d_out, count,
                              b + i * plan->ranks * b_step);
        all_finite &= is_finite[i];
    }
    Rest rest = {0};
    for (int64_t n = 0; n < c->num_base; n += ROWS)
        for (int64_t i = 0; i < count; i += 2 * TILE, turn_ ^= 1) {
            int64_t have = c->num_base - n < ROWS ? c->num_base - n : ROWS;
            const char *x = have < ROWS ? c->tail : at(c->rows, BF16, n * d_in);
            float *own = sums + turn_ * ROWS * 2 * TILE;
            int two = i + TILE < count;
            advance(s, 0, 2 * STRIP * ROWS * d_in / c->num_base);
            many_tile(c, plan, x, n / RUN, turned + 8 * d_in * (i / TILE), b + i * TILE, b_step, is_finite, two, own,
                      &rest);
            char *y = (char *)k->y + 2 * (n * m->d_out + o + i);
            rest = (Rest){.sums = own, .y = y, .stride = 2 * m->d_out, .last = have, .two = two};
            for (int j = 0; m->bias && j <= two; j++) {
                tile t = load_tile(at(m->bias, BF16, o + i + j * TILE), BF16, TILE);
                rest.bias[j] = (__m512)t.v[0];
            }
        }
    write_rows(&rest, ROWS);
    if (!all_finite) add_unsafe(m, k, plan, o, count, is_finite, (float *)turned);
}

static void many_shrink(const Call *c, Part pairs, char *scratch) {
    const Group *g = c->group;
    for (int64_t i = 0; i < g->num_members; i++) {
        const Member *m = g->members + i;
        if (!m->pairs) continue;
        Add add = {m->slots, m->pairs, g->d_in, m->d_out, g->capacity, BF16};
        AddCall call = {.add = &add, .x = c->x, .u = c->work[i].u, .pitch = c->work[i].max_rank};
        int64_t end = pairs.last < m->pairs->num_pairs ? pairs.last : m->pairs->num_pairs;
        for (int64_t p = pairs.first, n; p < end; p += n) {
            n = run_length(m->pairs, p, end, end);
            int32_t slot = m->pairs->slot[p];
            if (slot >= 0 && m->slots.rank[slot] > 0) shrink_tiled(&call, p, n, scratch);
        }
    }
}

static void share_many(const Call *c, int64_t num_pairs, int me, int threads) {
    const Group *g = c->group;
    int64_t num_blocks = 0;
    for (int64_t i = 0; i < g->num_members; i++) num_blocks += c->work[i].num_blocks;
    Part pairs = {num_pairs * me / threads, num_pairs * (me + 1) / threads};
    Part blocks = {num_blocks * me / threads, num_blocks * (me + 1) / threads};
    char *scratch = (char *)(c->scratch + me * c->scratch_len);
    Stream s = {.segments = c->segments + me * c->num_segments};
    amx_configure(TILE);
    many_shrink(c, pairs, scratch);
    for (int64_t n = me; g->exit && n < c->num_base; n += threads)
        fold_rows((char *)at(c->rows, g->type, n * g->d_in), c->x, g->type, g->exit, c->row_order, c->row_begin[n],
                  c->row_begin[n + 1], g->d_in);
    BARRIER
    for (int64_t i = me; g->late && i < g->late->num_entries; i += threads)
        gate_late(c, i, c->late + me * c->late_rows);
    if (g->late) {
        BARRIER
    }
    for (int64_t p = pairs.first; p < pairs.last; p++) gate_pair(c, p);
    if (me == 0) {
        int64_t left = c->num_base % ROWS, bytes = 2 * g->d_in;
        memset(c->tail, 0, ROWS * bytes);
        memcpy(c->tail, c->rows + (c->num_base - left) * bytes, left * bytes);
        settle(c->tail);
    }
    BARRIER
    for (int64_t i = 0; i < g->num_members; i++) {
        ManyPlan *plan = c->plans + i;
        for (int64_t n = plan->num_blocks * me / threads; plan->begin && n < plan->num_blocks * (me + 1) / threads; n++)
            fill_rows(g->members + i, c->work + i, plan, n, c->num_base, (int32_t *)scratch, plan->begin[n]);
    }
    settle(c->tail);
    BARRIER
    for (int64_t i = 0, before = 0; i < g->num_members; before += c->work[i++].num_blocks) {
        const Member *m = g->members + i;
        Part own = part_of(blocks, before, c->work[i].num_blocks);
        if (own.first < own.last) {
            int64_t first = own.first * c->block, last = own.last * c->block;
            if (last > m->d_out) last = m->d_out;
            add_segment(&s, at(m->w, BF16, first * g->d_in), 2 * (last - first) * g->d_in, 1, 0);
        }
    }
    for (int64_t i = 0, before = 0; i < g->num_members; before += c->work[i++].num_blocks) {
        const Member *m = g->members + i;
        Part own = part_of(blocks, before, c->work[i].num_blocks);
        for (int64_t b = own.first; b < own.last; b++) {
            int64_t o = b * c->block, count = m->d_out - o < c->block ? m->d_out - o : c->block;
            many_block(c, m, c->work + i, c->plans + i, o, count, scratch, &s);
        }
    }
    _tile_release();
}
#endif
