/* act(gate) * up of a gated FFN in one pass.
 *
 * Why: a framework spends two calls and a trip through memory on it. The activation is rounded to the dtype before it
 * is multiplied, as there.
 */
#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lora_dot.h"
#include "functions.h"

enum { SILU = 0, GELU_TANH = 1 };
enum { MANY = 1 << 15 };

/* GELU by way of tanh(z) = 2 sigmoid(2 z) - 1 */
INLINE vec activate(vec x, int kind, int type) {
    if (kind == SILU) return times_sigmoid(x, x, type);
    return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x), type);
}

INLINE void gate_typed(const char *gate, const char *up, char *y, int64_t count, int type, int kind) {
    EACH_PART(count, {
        vec g = load_part(at(gate, type, i), type, left, whole), u = load_part(at(up, type, i), type, left, whole);
        store_part((char *)at(y, type, i), type, left, whole, to_type(activate(g, kind, type), type) * u);
    })
}

static void gate_some(const char *gate, const char *up, char *y, int64_t count, int type, int kind) {
    if (type == BF16 && kind == SILU) gate_typed(gate, up, y, count, BF16, SILU);
    else if (type == BF16) gate_typed(gate, up, y, count, BF16, GELU_TANH);
    else if (kind == SILU) gate_typed(gate, up, y, count, FP32, SILU);
    else gate_typed(gate, up, y, count, FP32, GELU_TANH);
}

/* y[i] = act(gate[i]) * up[i]; all contiguous, of one type. */
void loramux_gate(const char *gate, const char *up, char *y, int64_t count, int type, int kind, int threads) {
    int64_t share = count;
#ifdef _OPENMP
    if (threads > 1 && count > MANY) share = (count / threads + LANES) / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (share < count)
#endif
    for (int64_t i = 0; i < count; i += share) {
        int64_t part = count - i < share ? count - i : share;
        gate_some(at(gate, type, i), at(up, type, i), (char *)at(y, type, i), part, type, kind);
    }
    (void)threads;
}

int loramux_is_usable(void) { return 1; }
