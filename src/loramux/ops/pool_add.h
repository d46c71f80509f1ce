/* y += LoRA for many rows: pairs come in runs of one slot, so 16 rows at a time meet the same rows of A and B.
 *
 * On AMX tiles t = A x is 16 rows of x against 16 packed ranks. The gated t is split into two bf16 numbers (high and
 * low part, 16 bits of mantissa), which meet the same ranks of B in one tile product.
 *
 * Letters: I input width, O output width, P pairs, r rank of a slot.
 */
enum { RUN = 16, PANEL = 4 * TILE };

typedef struct {
    Slots slots;
    const Pairs *pairs;
    int64_t d_in, d_out, capacity;
    int32_t type; /* of x and y */
} Add;

typedef struct {
    const Add *add;
    const char *x;
    char *y;
    float *u;         /* [P, pitch] gated A x */
    int64_t pitch;    /* the largest rank, in whole tiles */
    char *scratch;    /* per thread */
    int64_t scratch_len;
} AddCall;

/* Pairs from p on that name its slot, at most `limit`. */
static int64_t run_length(const Pairs *q, int64_t p, int64_t end, int64_t limit) {
    int64_t n = 1;
    while (n < limit && p + n < end && q->slot[p + n] == q->slot[p]) n++;
    return n;
}

static int is_tiled(const Add *a, int32_t slot) {
#if defined(__AMX_BF16__)
    return a->type == BF16 && a->slots.type[slot] == BF16 && a->d_in % STEP == 0 && a->d_out % TILE == 0;
#else
    (void)a, (void)slot;
    return 0;
#endif
}

/* The gates of pairs p..p+n on their t. */
static void gate_run(const AddCall *c, int64_t p, int64_t n) {
    const Pairs *q = c->add->pairs;
    int32_t slot = q->slot[p];
    int64_t rank = c->add->slots.rank[slot];
    for (int64_t i = p; i < p + n; i++) {
        float gate = c->add->slots.scale[slot] * q->weight[i], *u = c->u + i * c->pitch;
        for (int64_t r = 0; r < rank; r++)
            u[r] *= q->rank_weight ? gate * q->rank_weight[i * q->rank_stride + r] : gate;
    }
}

/* y[dst] += U B for outputs first..last, row by row. */
static void expand_run(const AddCall *c, int64_t p, int64_t n, int64_t first, int64_t last, float *row) {
    const Add *a = c->add;
    int32_t slot = a->pairs->slot[p];
    int64_t width = last - first;
    const char *b = at((const char *)a->slots.b[slot], a->slots.type[slot], first);
    Stream none = {.lead = MOST_LEAD};
    for (int64_t i = p; i < p + n; i++) {
        char *y = c->y + (a->pairs->dst[i] * a->d_out + first) * size_of(a->type);
        for (int64_t o = 0; o < width; o += TILE) {
            tile t = load_tile(at(y, a->type, o), a->type, width - o < TILE ? width - o : TILE);
            memcpy(row + o, &t, sizeof t);
        }
        expand_row(row, c->u + i * c->pitch, b, a->slots.type[slot], a->slots.rank[slot], a->d_out, width, 0, &none);
        for (int64_t o = 0; o < width; o += TILE) {
            tile t;
            memcpy(&t, row + o, sizeof t);
            store_tile(y + o * size_of(a->type), a->type, width - o < TILE ? width - o : TILE, t);
        }
    }
}

#if defined(__AMX_BF16__)
/* The rows of x that pairs p..p+n read, one after the other: where they lie, or copied. `room` holds 16 rows. */
static const char *gather(const AddCall *c, int64_t p, int64_t n, char *room) {
    const Pairs *q = c->add->pairs;
    int64_t bytes = 2 * c->add->d_in, is_run = n == RUN;
    for (int64_t i = 1; i < n; i++) is_run &= q->src[p + i] == q->src[p] + i;
    if (is_run) return c->x + q->src[p] * bytes;
    for (int64_t i = 0; i < n; i++) memcpy(room + i * bytes, c->x + q->src[p + i] * bytes, bytes);
    settle(room);
    return room;
}

/* u[p..p+n) = A x for up to 64 pairs of one slot and 16 ranks of it. `packed` is A as amx_pack makes it. */
static void shrink_panel(const AddCall *c, int64_t p, int64_t n, int64_t rank, const uint32_t *packed, char *room) {
    int64_t width = c->add->d_in;
    float sums[TILE * TILE] __attribute__((aligned(64)));
    const char *x[4];
    for (int64_t j = 0; j < 4; j++) {
        int64_t have = n - j * RUN < RUN ? n - j * RUN : RUN;
        x[j] = have > 0 ? gather(c, p + j * RUN, have, room + j * RUN * 2 * width) : x[0];
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < width; k += STEP) {
        _tile_loadd(4, packed + 8 * k, 64);
        _tile_loadd(5, x[0] + 2 * k, 2 * width);
        _tile_dpbf16ps(0, 5, 4);
        if (n <= RUN) continue;
        _tile_loadd(6, x[1] + 2 * k, 2 * width);
        _tile_dpbf16ps(1, 6, 4);
        _tile_loadd(5, x[2] + 2 * k, 2 * width);
        _tile_dpbf16ps(2, 5, 4);
        _tile_loadd(6, x[3] + 2 * k, 2 * width);
        _tile_dpbf16ps(3, 6, 4);
    }
    for (int64_t j = 0; j * RUN < n; j++) {
        if (j == 0) _tile_stored(0, sums, 64);
        else if (j == 1) _tile_stored(1, sums, 64);
        else if (j == 2) _tile_stored(2, sums, 64);
        else _tile_stored(3, sums, 64);
        settle(sums);
        for (int64_t i = 0; i < RUN && j * RUN + i < n; i++)
            memcpy(c->u + (p + j * RUN + i) * c->pitch + rank, sums + TILE * i, sizeof(tile));
    }
}

/* halves[i][0..16) the high bf16 parts of row i of u [16, 16], [16..32) the low ones. */
static void split_rows(const float *u, uint16_t *halves) {
    for (int64_t i = 0; i < RUN; i++, u += TILE, halves += 2 * TILE) {
        __m512 sum = _mm512_loadu_ps(u);
        __m256i high = (__m256i)_mm512_cvtneps_pbh(sum);
        __m512 low = _mm512_sub_ps(sum, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        /* Infinity minus itself is none; the high part alone says it. */
        low = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(low, low, _CMP_ORD_Q), low);
        _mm256_storeu_si256((__m256i *)halves, high);
        _mm256_storeu_si256((__m256i *)(halves + TILE), (__m256i)_mm512_cvtneps_pbh(low));
    }
}

/* halves[block]: 16 ranks of rows p..p + n each; ranks past the last are zero. */
static void split(const AddCall *c, int64_t p, int64_t n, int64_t rank, uint16_t *halves) {
    for (int64_t r = 0; r < rank; r += TILE, halves += RUN * 2 * TILE) {
        float sums[RUN * TILE] = {0};
        for (int64_t i = 0; i < n; i++)
            memcpy(sums + TILE * i, c->u + (p + i) * c->pitch + r, 4 * (rank - r < TILE ? rank - r : TILE));
        split_rows(sums, halves);
    }
}

/* turned[block][o / 16][16][16]: ranks 2i and 2i + 1 of 16 outputs as pairs in line i, and once more in line 8 + i.
 * Returns whether all of them are finite. */
static int pack_b(const char *b, int64_t rank, int64_t pitch, int64_t width, uint32_t *turned) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 endless = 0;
    for (int64_t r = 0; r < rank; r += TILE)
        for (int64_t o = 0; o < width; o += TILE, turned += TILE * TILE)
            for (int64_t i = 0; i < TILE / 2; i++) {
                __m512i even = _mm512_setzero_si512(), odd = even;
                const char *row = b + 2 * ((r + 2 * i) * pitch + o);
                if (r + 2 * i < rank) even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)row));
                row += 2 * pitch;
                if (r + 2 * i + 1 < rank) odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)row));
                even = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
                endless |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(even, exponent), exponent);
                _mm512_storeu_si512(turned + TILE * i, even);
                _mm512_storeu_si512(turned + TILE * (i + TILE / 2), even);
            }
    settle(turned);
    return !endless;
}

/* y[i] += sums[0..count)[i] for n rows of y and `count` tiles; `ahead` more bytes of each row are wanted next. */
INLINE void add_panel(char *const *y, int64_t n, const float (*sums)[TILE * TILE], const int64_t count, int64_t ahead) {
    for (int64_t i = 0; i < n; i++) {
        for (int64_t o = 0; o < ahead; o += LINE) __builtin_prefetch(y[i] + 2 * PANEL + o, 1, 3);
        for (int64_t j = 0; j < count; j++) {
            __m256i *at_ = (__m256i *)(y[i] + 2 * TILE * j);
            __m512 was = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at_)), 16);
            was = _mm512_add_ps(was, _mm512_load_ps(sums[j] + TILE * i));
            _mm256_storeu_si256(at_, (__m256i)_mm512_cvtneps_pbh(was));
        }
    }
}

/* expand_run on tiles: up to 16 pairs, `turned` from pack_b. */
static void expand_tiles(const AddCall *c, int64_t p, int64_t n, int64_t first, int64_t last, const uint16_t *halves,
                         const uint32_t *turned) {
    float sums[4][TILE * TILE] __attribute__((aligned(64)));
    char *y[RUN];
    int64_t rank = c->add->slots.rank[c->add->pairs->slot[p]], step = (last - first) * TILE;
    for (int64_t i = 0; i < n; i++) {
        y[i] = c->y + 2 * (c->add->pairs->dst[p + i] * c->add->d_out + first);
        for (int64_t o = 0; o < 2 * PANEL; o += LINE) __builtin_prefetch(y[i] + o, 1, 3);
    }
    for (int64_t o = first; o < last; o += PANEL, turned += PANEL * TILE) {
        int64_t count = last - o < PANEL ? (last - o) / TILE : 4;
        const uint32_t *b = turned;
        const uint16_t *u = halves;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t r = 0; r < rank; r += TILE, b += step, u += RUN * 2 * TILE) {
            _tile_loadd(4, u, 64);
            _tile_loadd(5, b, 64);
            _tile_dpbf16ps(0, 4, 5);
            if (count < 2) continue;
            _tile_loadd(6, b + TILE * TILE, 64);
            _tile_dpbf16ps(1, 4, 6);
            if (count < 3) continue;
            _tile_loadd(5, b + 2 * TILE * TILE, 64);
            _tile_dpbf16ps(2, 4, 5);
            if (count < 4) continue;
            _tile_loadd(6, b + 3 * TILE * TILE, 64);
            _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        settle(sums);
        if (count == 4)
            add_panel(y, n, sums, 4, o + PANEL < last ? 2 * PANEL : 0);
        else
            add_panel(y, n, sums, count, 0);
        for (int64_t i = 0; i < n; i++) y[i] += 2 * PANEL;
    }
}

static void shrink_tiled(const AddCall *c, int64_t p, int64_t n, char *scratch) {
    const Add *a = c->add;
    int32_t slot = a->pairs->slot[p];
    int64_t rank = a->slots.rank[slot];
    uint32_t *packed = (uint32_t *)scratch;
    char *room = scratch + 32 * a->d_in;
    for (int64_t r = 0; r < rank; r += TILE) {
        amx_pack_tile(packed, (const char *)a->slots.a[slot] + 2 * r * a->d_in, rank - r, a->d_in);
        for (int64_t i = 0; i < n; i += 4 * RUN)
            shrink_panel(c, p + i, n - i < 4 * RUN ? n - i : 4 * RUN, r, packed, room);
    }
}

static void expand_tiled(const AddCall *c, int64_t p, int64_t n, int64_t first, int64_t last, char *scratch) {
    const Add *a = c->add;
    int32_t slot = a->pairs->slot[p];
    int64_t rank = a->slots.rank[slot];
    uint16_t *halves = (uint16_t *)scratch;
    uint32_t *turned = (uint32_t *)(scratch + 64 * RUN * c->pitch / TILE);
    pack_b((const char *)a->slots.b[slot] + 2 * first, rank, a->d_out, last - first, turned);
    for (int64_t i = 0; i < n; i += RUN) {
        int64_t have = n - i < RUN ? n - i : RUN;
        split(c, p + i, have, rank, halves);
        settle(halves);
        expand_tiles(c, p + i, have, first, last, halves, turned);
    }
}
#endif

static void share_add(const AddCall *c, int me, int threads) {
    const Add *a = c->add;
    const Pairs *q = a->pairs;
    char *scratch = c->scratch + me * c->scratch_len;
    int64_t panels = (a->d_out + PANEL - 1) / PANEL, first = panels * me / threads * PANEL;
    int64_t last = panels * (me + 1) / threads * PANEL, end = q->num_pairs * (me + 1) / threads;
    if (last > a->d_out) last = a->d_out;
    Stream none = {.lead = MOST_LEAD};
#if defined(__AMX_BF16__)
    amx_configure(TILE);
#endif
    for (int64_t p = q->num_pairs * me / threads, n; p < end; p += n) {
        n = run_length(q, p, end, end);
        int32_t slot = q->slot[p];
        if (slot < 0 || a->slots.rank[slot] == 0) continue;
#if defined(__AMX_BF16__)
        if (is_tiled(a, slot)) shrink_tiled(c, p, n, scratch);
#endif
        for (int64_t i = p; !is_tiled(a, slot) && i < p + n; i++)
            shrink_row(c->u + i * c->pitch, at(c->x, a->type, q->src[i] * a->d_in), a->type,
                       (const char *)a->slots.a[slot], a->slots.type[slot], a->slots.rank[slot], a->d_in, 0, &none);
        gate_run(c, p, n);
    }
    BARRIER
    for (int64_t p = 0, n; p < q->num_pairs && first < last; p += n) {
        n = run_length(q, p, q->num_pairs, q->num_pairs);
        int32_t slot = q->slot[p];
        if (slot < 0 || a->slots.rank[slot] == 0) continue;
#if defined(__AMX_BF16__)
        if (is_tiled(a, slot)) expand_tiled(c, p, n, first, last, scratch);
#endif
        if (!is_tiled(a, slot)) expand_run(c, p, n, first, last, (float *)scratch);
    }
#if defined(__AMX_BF16__)
    _tile_release();
#endif
}
