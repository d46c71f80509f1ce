/* What will be read, in the order in which it will be: asked for a little ahead, line by line, by whoever computes.
 *
 * Why: weights and the rows of many tenants come from memory, and a core keeps its memory busy only while somebody
 * asks. Left alone, memory rests whenever something is computed from the caches.
 */
enum { LINE = 64, LEAST_LEAD = 64 << 10, MOST_LEAD = 256 << 10 }; /* bytes */

typedef struct {
    const char *start;
    int64_t bytes, pieces, pitch; /* `pieces` runs of `bytes`, `pitch` bytes apart */
} Segment;

typedef struct {
    Segment *segments;
    int64_t num_segments, next, piece, lead; /* lead: bytes asked for and not yet used */
    const char *at, *end;
} Stream;

static void add_segment(Stream *s, const void *start, int64_t bytes, int64_t pieces, int64_t pitch) {
    if (pitch == bytes) bytes *= pieces, pieces = 1;
    if (bytes > 0 && pieces > 0) s->segments[s->num_segments++] = (Segment){start, bytes, pieces, pitch};
}

/* Moves on to the next run; 0 where there is none. */
static int next_run(Stream *s) {
    s->lead -= s->at - s->end;
    for (; s->next < s->num_segments; s->next++, s->piece = 0) {
        const Segment *g = s->segments + s->next;
        if (s->piece == g->pieces) continue;
        const char *start = g->start + s->piece++ * g->pitch;
        s->at = (const char *)((uintptr_t)start / LINE * LINE);
        s->lead -= start - s->at;
        s->end = start + g->bytes;
        return 1;
    }
    s->at = s->end = NULL;
    return 0;
}

/* `used` bytes of the stream were used, and there is time to ask for `spare` more. */
INLINE void advance(Stream *s, int64_t used, int64_t spare) {
    s->lead -= used;
    int64_t until = s->lead + spare < LEAST_LEAD ? LEAST_LEAD : s->lead + spare;
    if (until > MOST_LEAD) until = MOST_LEAD;
    for (; s->lead < until; s->lead += LINE, s->at += LINE) {
        if (s->at >= s->end && !next_run(s)) {
            s->lead = MOST_LEAD;
            return;
        }
        __builtin_prefetch(s->at, 0, 2);
    }
}
