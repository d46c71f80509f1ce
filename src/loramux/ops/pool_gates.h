/* Routers of a decode step: token top-k over experts, late gates that read t = A x. The definitions are in gates.py.
 *
 * A row that is not a number gets weights that are none, and valid experts: it never reaches a neighbour.
 *
 * Letters: D width, E experts, k chosen, R rank rows of a late gate's experts, n entries.
 */
#include <math.h>

typedef struct {
    const float *weight;  /* [E, D] */
    const int32_t *slots; /* [E] */
    int64_t num_experts, k;
    int32_t normalise;
} TopKGate;

typedef struct {
    const TopKGate *gates;
    const int32_t *token, *gate, *pair, *row; /* [n] */
    int32_t *enter_slot, *exit_slot;
    float *exit_weight, *row_weight;
    int64_t num_entries, width, num_tokens;
    int32_t type; /* of x */
} TopK;

typedef struct {
    const float *be, *mean, *gram, *total; /* [R, E], [R], [R, R], [E] */
    const uint8_t *mask;                   /* [E] or NULL */
    int64_t num_rows, num_experts;
    float inv_tau, eps;
} LateGate;

typedef struct {
    const LateGate *gates;
    const int32_t *token, *gate, *pair; /* [n] */
    float *const *also;                 /* [num_also]: weights of other sites, over pairs that lie alike */
    int64_t num_entries, num_also;
} Late;

/* In place; entries with a mask of 0 get weight 0. */
static void softmax(float *p, const uint8_t *mask, int64_t count) {
    float top = -INFINITY, sum = 0;
    for (int64_t e = 0; e < count; e++)
        if ((!mask || mask[e]) && p[e] > top) top = p[e];
    for (int64_t e = 0; e < count; e++) {
        p[e] = mask && !mask[e] ? 0.0f : expf(p[e] - top);
        sum += p[e];
    }
    for (int64_t e = 0; e < count; e++) p[e] /= sum;
}

static void top_k(const TopK *c, int64_t i, const char *x, float *p) {
    const TopKGate *g = c->gates + c->gate[i];
    const char *row[1] = {at(x, c->type, c->token[i] * c->width)};
    for (int64_t e = 0; e < g->num_experts; e += TILE) {
        tile t;
        dot_tile(&t, row, c->type, (const char *)g->weight, FP32, e, g->num_experts, c->width, 1);
        memcpy(p + e, &t, sizeof t);
    }
    softmax(p, NULL, g->num_experts);
    float sum = 0, *weight = c->exit_weight + c->pair[i];
    for (int64_t j = 0; j < g->k; j++) {
        int64_t best = -1; /* the first that is left, or any that is larger: what is no number never is */
        for (int64_t e = 0; e < g->num_experts; e++)
            if (p[e] != -INFINITY && (best < 0 || p[e] > p[best])) best = e;
        c->enter_slot[c->pair[i] + j] = c->exit_slot[c->pair[i] + j] = g->slots[best];
        weight[j] = p[best];
        sum += p[best];
        p[best] = -INFINITY;
    }
    for (int64_t j = 0; j < g->k; j++) {
        if (g->normalise) weight[j] /= sum;
        c->row_weight[c->row[i] + j] = weight[j];
    }
}

/* What the gate makes of t: [E] weights. */
static void late_weights(const LateGate *g, const float *t, float *weight) {
    float mean = 0, square = 0;
    for (int64_t r = 0; r < g->num_rows; r++) {
        float sum = 0;
        for (int64_t j = 0; j < g->num_rows; j++) sum += g->gram[r * g->num_rows + j] * t[j];
        square += sum * t[r];
        mean += g->mean[r] * t[r];
    }
    float variance = square - mean * mean;
    float norm = 1.0f / sqrtf((variance < 0 ? 0.0f : variance) + g->eps);
    for (int64_t e = 0; e < g->num_experts; e++) weight[e] = -mean * g->total[e];
    for (int64_t r = 0; r < g->num_rows; r++)
        for (int64_t e = 0; e < g->num_experts; e++) weight[e] += g->be[r * g->num_experts + e] * t[r];
    for (int64_t e = 0; e < g->num_experts; e++) weight[e] *= norm * g->inv_tau;
    softmax(weight, g->mask, g->num_experts);
}
