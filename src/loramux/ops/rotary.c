/* Rotary position embedding of queries and keys in one pass.
 *
 * Why: a framework spends sixteen calls on it, and writes every step in between to memory. Each step is rounded to the
 * dtype here as well, so that the numbers are the same to the bit.
 *
 * Letters: N tokens, H heads, D head width, R numbers of a head that are rotated.
 */
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lora_dot.h"
#include "functions.h"

enum { MANY = 1 << 15 };

typedef struct {
    const char *x;
    int64_t heads, x_head, x_token; /* strides, in numbers */
    char *y;
    int64_t y_head, y_token;
} Turn;

/* One head of one token: y = x * cos + rotate_half(x) * sin for its first R numbers, the others as they are. */
INLINE void turn_head(const char *x, char *y, const char *cos, const char *sin, int64_t turned, int64_t dim, int type) {
    int64_t half = turned / 2;
    const char *x2 = at(x, type, half), *cos2 = at(cos, type, half), *sin2 = at(sin, type, half);
    char *y2 = (char *)at(y, type, half);
    EACH_PART(half, {
        int64_t o = i * size_of(type);
        vec a = load_part(x + o, type, left, whole), b = load_part(x2 + o, type, left, whole);
        vec ca = load_part(cos + o, type, left, whole), cb = load_part(cos2 + o, type, left, whole);
        vec sa = load_part(sin + o, type, left, whole), sb = load_part(sin2 + o, type, left, whole);
        store_part(y + o, type, left, whole, to_type(a * ca, type) - to_type(b * sa, type));
        store_part(y2 + o, type, left, whole, to_type(b * cb, type) + to_type(a * sb, type));
    })
    if (turned < dim) memcpy(y + turned * size_of(type), at(x, type, turned), (dim - turned) * size_of(type));
}

static void turn_token(const Turn *t, const char *cos, const char *sin, int64_t n, int64_t turned, int64_t dim,
                       int type) {
    for (int64_t h = 0; h < t->heads; h++) {
        const char *x = at(t->x, type, n * t->x_token + h * t->x_head);
        char *y = (char *)at(t->y, type, n * t->y_token + h * t->y_head);
        if (type == BF16) turn_head(x, y, cos, sin, turned, dim, BF16);
        else turn_head(x, y, cos, sin, turned, dim, FP32);
    }
}

/* Heads are [H, N, D] of any strides but the last; cos and sin [N, R] contiguous. */
void loramux_rotary(const Turn *q, const Turn *k, const char *cos, const char *sin, int64_t tokens, int64_t turned,
                    int64_t dim, int type, int threads) {
#ifdef _OPENMP
    if (tokens * (q->heads + k->heads) * dim <= MANY) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
    for (int64_t n = 0; n < tokens; n++) {
        const char *c = at(cos, type, n * turned), *s = at(sin, type, n * turned);
        turn_token(q, c, s, n, turned, dim, type);
        turn_token(k, c, s, n, turned, dim, type);
    }
    (void)threads;
}

int loramux_is_usable(void) { return 1; }
