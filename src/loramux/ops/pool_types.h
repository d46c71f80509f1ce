/* The group call: what it is told, what it works out, and what few and many rows share.
 *
 * Letters: I input width, O output width, N rows that W reads, D rows of y, P pairs, r rank of a slot, m linear.
 */
typedef struct {
    const void *w, *bias;
    const Pairs *pairs; /* or NULL */
    Slots slots;
    int64_t d_out;
} Member;

typedef struct {
    const Member *members;
    const RowMap *enter, *exit;
    const Late *late; /* reads the first member */
    void *const *y;   /* by member */
    int64_t num_members, d_in, capacity;
    int32_t type; /* of x, W, bias and y */
} Group;

/* What is worked out for one member. */
typedef struct {
    void *y;
    float *u;       /* [P, max_rank]: A x, then gated */
    int64_t max_rank, has_gain, is_half; /* is_half: all rows are bf16 */
    int32_t *begin, *order; /* pairs by destination, in their given order */
    int64_t num_blocks;
} Work;

typedef struct {
    const Group *group;
    Work *work;
    const char *x;    /* rows that A reads */
    const char *rows; /* rows that W reads */
    uint32_t *packed; /* those rows as AMX tiles want them, or NULL */
    int32_t *row_begin, *row_order;
    float *scratch; /* per thread: base [N, block + PAD], one row, one row of a gain's pair */
    Segment *segments; /* per thread */
    float *late;       /* per thread: t of one entry */
    char *tail;        /* many rows: the last few, filled up with zeros */
    struct ManyPlan *plans;
    int64_t late_rows, scratch_len, num_base, num_dst, block, num_segments;
} Call;

static void gate_pair(const Call *c, int64_t p) {
    for (int64_t i = 0; i < c->group->num_members; i++) {
        const Member *m = c->group->members + i;
        const Pairs *q = m->pairs;
        if (!q || p >= q->num_pairs || q->slot[p] < 0) continue;
        float gate = m->slots.scale[q->slot[p]] * q->weight[p], *u = c->work[i].u + p * c->work[i].max_rank;
        for (int64_t r = 0; r < m->slots.rank[q->slot[p]]; r++)
            u[r] *= q->rank_weight ? gate * q->rank_weight[p * q->rank_stride + r] : gate;
    }
}

/* Entry i of the late gates: t of its pairs, end to end, decides their weights. */
static void gate_late(const Call *c, int64_t i, float *t) {
    const Late *late = c->group->late;
    const LateGate *g = late->gates + late->gate[i];
    const Member *m = c->group->members;
    int64_t at_ = 0;
    for (int64_t p = late->pair[i]; p < late->pair[i] + g->num_experts; p++) {
        int64_t rank = m->slots.rank[m->pairs->slot[p]];
        memcpy(t + at_, c->work->u + p * c->work->max_rank, 4 * rank);
        at_ += rank;
    }
    float *weight = (float *)m->pairs->weight + late->pair[i];
    late_weights(g, t, weight);
    for (int64_t j = 0; j < late->num_also; j++) memcpy(late->also[j] + late->pair[i], weight, 4 * g->num_experts);
}

/* The blocks of a thread: blocks first..last of all members' blocks together. */
typedef struct {
    int64_t first, last;
} Part;

/* Blocks of member i that are the part's, given how many come before that member. */
static Part part_of(Part all, int64_t before, int64_t num_blocks) {
    Part own = {all.first > before ? all.first - before : 0, all.last - before};
    if (own.last > num_blocks) own.last = num_blocks;
    return own;
}
