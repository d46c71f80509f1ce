/* The group call for few rows: W is streamed once, the sums of all rows wait in the caches for their pairs.
 *
 * Letters: I input width, O output width, N rows that W reads, D rows of y, P pairs.
 */
enum { STRIP = 2 * TILE, BLOCK_FLOATS = 1 << 16, MAX_BLOCK = 2048, PAD = TILE };

/* base[n][0..count) = outputs o.. of W for all rows */
static void base_block(const Call *c, const Member *m, int64_t o, int64_t count, float *base, int64_t pitch,
                       Stream *s) {
    int64_t d_in = c->group->d_in;
    int type = c->group->type;
    (void)s;
#if defined(__AMX_BF16__)
    if (c->packed && m->d_out % TILE == 0) {
        for (int64_t i = 0; i < count; i += STRIP)
            amx_strip(base + i, base + i + TILE, pitch, c->packed, m->w, o + i, m->d_out, d_in, c->num_base, s);
        return;
    }
#endif
    for (int64_t i = 0; i < count; i += TILE)
        for (int64_t n = 0; n < c->num_base; n += CHUNK) {
            int have = c->num_base - n < CHUNK ? (int)(c->num_base - n) : CHUNK;
            const char *x[CHUNK];
            tile out[CHUNK];
            for (int j = 0; j < have; j++) x[j] = at(c->rows, type, (n + j) * d_in);
            dot_tile(out, x, type, m->w, type, o + i, m->d_out, d_in, have);
            for (int j = 0; j < have; j++) memcpy(base + (n + j) * pitch + i, &out[j], sizeof(tile));
        }
}

/* Adds pair p to acc, outputs o..o+count; `change` is room for one row. */
static void add_pair(const Member *m, const Work *k, int32_t p, int is_new, int64_t o, int64_t count,
                     const float *base, int64_t pitch, float *acc, float *change, Stream *s) {
    int32_t slot = m->pairs->slot[p];
    if (slot < 0) return;
    int64_t rank = m->slots.rank[slot];
    int type = m->slots.type[slot];
    const float *u = k->u + p * k->max_rank;
    const char *b = at((const char *)m->slots.b[slot], type, o), *gain = (const char *)m->slots.gain[slot];
    if (!gain) {
        expand_row(acc, u, b, type, rank, m->d_out, count, is_new, s);
        return;
    }
    const float *from = base + m->pairs->src[p] * pitch;
    vec weight = m->pairs->weight[p] - (vec){0};
    memset(change, 0, 4 * (count + PAD));
    expand_row(change, u, b, type, rank, m->d_out, count, is_new, s);
    for (int64_t i = 0; i < count; i += TILE) {
        tile g = load_tile(gain + 4 * (o + i), FP32, count - i < TILE ? count - i : TILE), sum, w, d;
        memcpy(&sum, acc + i, sizeof sum);
        memcpy(&w, from + i, sizeof w);
        memcpy(&d, change + i, sizeof d);
        UNROLL for (int v = 0; v < PARTS; v++) sum.v[v] += g.v[v] * d.v[v] + weight * (g.v[v] - 1.0f) * w.v[v];
        memcpy(acc + i, &sum, sizeof sum);
    }
}

INLINE void store_row(char *out, const int type, const float *from, const char *bias, int64_t count) {
    for (int64_t i = 0; i < count; i += TILE) {
        int64_t have = count - i < TILE ? count - i : TILE;
        tile t;
        memcpy(&t, from + i, sizeof t);
        if (bias) {
            tile b = load_tile(at(bias, type, i), type, have);
            UNROLL for (int v = 0; v < PARTS; v++) t.v[v] += b.v[v];
        }
        store_tile(out + i * size_of(type), type, have, t);
    }
}

/* y[d] = base + bias + pairs for outputs o..o+count of all destinations */
static void finish_block(const Call *c, const Member *m, const Work *k, int64_t o, int64_t count, float *base,
                         int64_t pitch, float *row, Stream *s) {
    int type = c->group->type;
    int32_t before = -1;
    for (int64_t d = 0; d < c->num_dst; d++) {
        const float *from = base + (c->group->enter ? c->group->enter->token[d] : d) * pitch;
        char *out = (char *)at(k->y, type, d * m->d_out + o);
        int has_pairs = m->pairs && k->begin[d] < k->begin[d + 1];
        if (has_pairs) {
            float *change = row + c->block + PAD, *sum = row;
            /* Rows of one token share its base; otherwise the pairs may be added where it lies. */
            if (c->group->enter || k->has_gain)
                memcpy(row, from, 4 * count);
            else
                sum = base + d * pitch;
            for (int32_t e = k->begin[d]; e < k->begin[d + 1]; e++) {
                int32_t p = k->order[e], slot = m->pairs->slot[p];
                add_pair(m, k, p, slot != before, o, count, base, pitch, sum, change, s);
                before = slot;
            }
            from = sum;
        }
        const char *bias = m->bias ? at(m->bias, type, o) : NULL;
        if (type == BF16)
            store_row(out, BF16, from, bias, count);
        else
            store_row(out, FP32, from, bias, count);
    }
}

/* u = A x, for pair p at every member: their rows lie next to each other. */
static void shrink_pair(const Call *c, int64_t p, int64_t first, Stream *s) {
    const Group *g = c->group;
    for (int64_t i = 0; i < g->num_members; i++) {
        const Member *m = g->members + i;
        if (!m->pairs || p >= m->pairs->num_pairs || m->pairs->slot[p] < 0) continue;
        int32_t slot = m->pairs->slot[p];
        int is_new = p == first || slot != m->pairs->slot[p - 1];
        shrink_row(c->work[i].u + p * c->work[i].max_rank, at(c->x, g->type, m->pairs->src[p] * g->d_in), g->type,
                   (const char *)m->slots.a[slot], m->slots.type[slot], m->slots.rank[slot], g->d_in,
                   is_new, s);
    }
}

/* A of the pairs first..last, then W and B of the blocks. */
static void plan_stream(const Call *c, Part pairs, Part blocks, Stream *s) {
    const Group *g = c->group;
    for (int64_t p = pairs.first; p < pairs.last; p++)
        for (int64_t i = 0; i < g->num_members; i++) {
            const Member *m = g->members + i;
            int32_t slot = m->pairs && p < m->pairs->num_pairs ? m->pairs->slot[p] : -1;
            if (slot < 0 || (p > pairs.first && slot == m->pairs->slot[p - 1])) continue;
            int64_t bytes = m->slots.rank[slot] * g->d_in * size_of(m->slots.type[slot]);
            add_segment(s, (void *)m->slots.a[slot], bytes, 1, 0);
        }
    for (int64_t i = 0, before = 0; i < g->num_members; before += c->work[i++].num_blocks) {
        const Member *m = g->members + i;
        Part own = part_of(blocks, before, c->work[i].num_blocks);
        for (int64_t b = own.first; b < own.last; b++) {
            int64_t o = b * c->block, count = m->d_out - o < c->block ? m->d_out - o : c->block;
            if (c->packed && m->d_out % TILE == 0)
                add_segment(s, at(m->w, BF16, o * g->d_in), 2 * count * g->d_in, 1, 0);
            int32_t last = -1;
            for (int64_t e = 0; m->pairs && e < m->pairs->num_pairs; e++) {
                int32_t slot = m->pairs->slot[c->work[i].order[e]];
                if (slot < 0 || slot == last) continue;
                int type = m->slots.type[slot];
                add_segment(s, at((void *)m->slots.b[slot], type, o), count * size_of(type), m->slots.rank[slot],
                            m->d_out * size_of(type));
                last = slot;
            }
        }
    }
}

static void share(const Call *c, int64_t num_pairs, int me, int threads) {
    const Group *g = c->group;
    int64_t num_blocks = 0, pitch = c->block + PAD;
    for (int64_t i = 0; i < g->num_members; i++) num_blocks += c->work[i].num_blocks;
    Part pairs = {num_pairs * me / threads, num_pairs * (me + 1) / threads};
    Part blocks = {num_blocks * me / threads, num_blocks * (me + 1) / threads};
    float *base = c->scratch + me * c->scratch_len, *row = base + c->num_base * pitch;
    Stream s = {.segments = c->segments + me * c->num_segments};
    plan_stream(c, pairs, blocks, &s);
    for (int64_t p = pairs.first; p < pairs.last; p++) shrink_pair(c, p, pairs.first, &s);
    for (int64_t n = me; g->exit && n < c->num_base; n += threads)
        fold_rows((char *)at(c->rows, g->type, n * g->d_in), c->x, g->type, g->exit, c->row_order, c->row_begin[n],
                  c->row_begin[n + 1], g->d_in);
    BARRIER
#if defined(__AMX_BF16__)
    if (c->packed && me == 0) amx_pack(c->packed, c->rows, c->num_base, g->d_in);
    if (c->packed) amx_configure(c->num_base);
#endif
    for (int64_t i = me; g->late && i < g->late->num_entries; i += threads)
        gate_late(c, i, c->late + me * c->late_rows);
    if (g->late) {
        BARRIER
    }
    for (int64_t p = pairs.first; p < pairs.last; p++) gate_pair(c, p);
    BARRIER
    for (int64_t i = 0, before = 0; i < g->num_members; before += c->work[i++].num_blocks) {
        const Member *m = g->members + i;
        Part own = part_of(blocks, before, c->work[i].num_blocks);
        for (int64_t b = own.first; b < own.last; b++) {
            int64_t o = b * c->block, count = m->d_out - o < c->block ? m->d_out - o : c->block;
            base_block(c, m, o, count, base, pitch, &s);
            finish_block(c, m, c->work + i, o, count, base, pitch, row, &s);
        }
    }
#if defined(__AMX_BF16__)
    if (c->packed) _tile_release();
#endif
}
