/* RMS norm of rows in one pass: y = x / sqrt(mean(x^2) + eps), times the weight.
 *
 * Why: a framework spends six calls on it, each longer than the work. A row never depends on the
 * others.
 *
 * Letters: N rows, D width.
 */
#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lora_dot.h"
#include "functions.h"

/* When x / rms becomes the dtype of x: before the weight is applied, after it, or after weight + 1. */
enum { ROUND_FIRST = 0, ROUND_LAST = 1, SHIFTED = 2 };
enum { ROWS = 4 };

typedef struct {
    const void *weight;
    int64_t width;
    float eps;
    int32_t type, rule;
} Norm;

/* Four rows of lanes, each a short sum in fp32; the lanes are summed in fp64. */
INLINE double sum_of_squares(const char *x, int type, int64_t width) {
    vec sum[ROWS] = {0};
    int64_t d = 0;
    for (; d + ROWS * LANES <= width; d += ROWS * LANES)
        UNROLL for (int i = 0; i < ROWS; i++) {
            vec v = load_part(at(x, type, d + i * LANES), type, LANES, 1);
            sum[i] += v * v;
        }
    EACH_PART(width - d, {
        vec v = load_part(at(x, type, d + i), type, left, whole);
        sum[0] += v * v;
    })
    double total = 0;
    for (int i = 0; i < ROWS; i++) {
        float lane[LANES];
        memcpy(lane, &sum[i], sizeof lane);
        for (int j = 0; j < LANES; j++) total += lane[j];
    }
    return total;
}

INLINE void norm_typed(const Norm *n, const char *x, char *y, int type) {
    float mean = sum_of_squares(x, type, n->width) / n->width, by = 1.0f / sqrtf(mean + n->eps);
    EACH_PART(n->width, {
        vec v = load_part(at(x, type, i), type, left, whole) * by;
        vec w = load_part(at(n->weight, type, i), type, left, whole);
        if (n->rule == ROUND_FIRST) v = to_type(v, type);
        store_part((char *)at(y, type, i), type, left, whole, v * (n->rule == SHIFTED ? 1.0f + w : w));
    })
}

static void norm_row(const Norm *n, const char *x, char *y) {
    if (n->type == BF16) norm_typed(n, x, y, BF16);
    else norm_typed(n, x, y, FP32);
}

void loramux_norm(const Norm *n, const char *x, char *y, int64_t rows, int threads) {
    int64_t size = n->width * size_of(n->type);
#ifdef _OPENMP
    if (threads > 1 && rows * n->width > 1 << 15) {
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < rows; i++) norm_row(n, x + i * size, y + i * size);
        return;
    }
#endif
    (void)threads;
    for (int64_t i = 0; i < rows; i++) norm_row(n, x + i * size, y + i * size);
}

int loramux_is_usable(void) { return 1; }
