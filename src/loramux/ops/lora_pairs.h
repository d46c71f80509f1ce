/* What C is told about a batch: pairs, FFN rows and their grouping, shared by all kernels. */
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#define BARRIER _Pragma("omp barrier")
#else
#define BARRIER
#endif

enum {
    OK = 0, NO_MEMORY = 1, BAD_SRC = 2, BAD_DST = 3, BAD_SLOT = 4, BAD_TOKEN = 5, BAD_RANK = 6, BAD_ROWS = 7,
    EMPTY_SLOT = 8, BAD_GATE = 9, GAIN_AT_EXIT = 10, GAIN_HERE = 11
};

typedef struct {
    const int32_t *src, *dst, *slot;
    float *weight;            /* late gates write it */
    const float *rank_weight; /* or NULL */
    int64_t num_pairs, num_src, num_dst, rank_stride;
} Pairs;

typedef struct {
    const int32_t *token;
    const float *weight;
    int64_t num_rows, num_tokens;
} RowMap;

static int check_rows(const RowMap *m) {
    for (int64_t i = 0; m && i < m->num_rows; i++)
        if (m->token[i] < 0 || m->token[i] >= m->num_tokens) return BAD_TOKEN;
    return OK;
}

/* Counting sort: order[begin[g]..begin[g+1]) are the items of group g, in their given order. */
static void group_items(const int32_t *group, int64_t num_items, int64_t num_groups, int32_t *begin, int32_t *order) {
    memset(begin, 0, (num_groups + 2) * sizeof *begin);
    for (int64_t i = 0; i < num_items; i++) begin[group[i] + 2]++;
    for (int64_t g = 2; g < num_groups + 2; g++) begin[g] += begin[g - 1];
    for (int64_t i = 0; i < num_items; i++) order[begin[group[i] + 1]++] = (int32_t)i;
}

/* folded = sum over rows order[first..last) of weight * x[row]; `width` inputs of a row. */
static void fold_rows(char *folded, const char *x, int type, const RowMap *map, const int32_t *order, int32_t first,
                      int32_t last, int64_t width) {
    for (int64_t k = 0; k < width; k += TILE) {
        int64_t count = width - k < TILE ? width - k : TILE;
        tile acc = {0};
        for (int32_t e = first; e < last; e++) {
            int32_t m = order[e];
            tile t = load_tile(at(x, type, m * width + k), type, count);
            UNROLL for (int v = 0; v < PARTS; v++) acc.v[v] += map->weight[m] * t.v[v];
        }
        store_tile((char *)at(folded, type, k), type, count, acc);
    }
}

static void *carve(char **from, int64_t bytes) {
    void *at_ = *from;
    *from += (bytes + 63) / 64 * 64;
    return at_;
}
