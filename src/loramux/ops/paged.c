/* New keys and values into the blocks of a pool, then attention of the sequences that are decoded: one call per layer.
 *
 *     out[row, h] = sum over t of softmax(scale * q[row, h] . k[t, g])[t] * v[t, g]      t = start .. length - 1
 *
 * Why: a framework gathers every sequence's blocks into one padded tensor before it can attend. Here they are read
 * where they lie, once, by all query heads that share them.
 *
 * Rows may be bf16 or fp32; products of bf16 are exact, scores, softmax and sums are fp32, the result is rounded once.
 * A sequence is walked in order by one thread, so nothing depends on its neighbours or on the number of threads.
 *
 * Letters: N tokens of the step, H query heads, G key/value heads, D head width, C tokens of context, T tokens of a
 * block.
 */
#include <math.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "lora_dot.h"
#include "lora_stream.h"
#include "lora_amx.h"
#include "functions.h"

enum { OK = 0, NO_MEMORY = 1, BAD_SLOT = 2, BAD_BLOCK = 3, BAD_ROW = 4 };
enum { ALONE = 1 << 14 }; /* tokens times heads that are not worth a second thread */

typedef struct {
    char *keys;   /* bf16: [blocks, G, D / 2, T, 2], fp32: [blocks, G, D, T] */
    char *values; /* bf16: [blocks, G, T / 2, D, 2], fp32: [blocks, G, T, D] */
    int64_t heads, kv_heads, key_dim, value_dim, block_size, window; /* window 0: all */
    float scale, softcap; /* softcap 0: none */
    int32_t type;
} Layer;

typedef struct {
    const int64_t *slot; /* [N] */
    const int32_t *row, *length, *begin, *blocks; /* decodes; begin has one more entry, `blocks` serves pieces, too */
    const int32_t *piece_first, *piece_end, *piece_start, *piece_begin;
    int64_t num_tokens, num_decodes, num_pieces, num_blocks; /* num_blocks: entries of `blocks` */
} Rows;

typedef struct {
    const char *data;
    int64_t head, token; /* strides, in numbers */
} View;

/* Keys: numbers d, d + 1 (bf16; fp32: d alone) of the 16 tokens of a block lie in one vector. */
static void put_key(const Layer *l, View from, int64_t n, int64_t slot) {
    int64_t T = l->block_size, block = slot / T, place = slot % T, size = l->key_dim * size_of(l->type);
    for (int64_t g = 0; g < l->kv_heads; g++) {
        const char *key = at(from.data, l->type, g * from.head + n * from.token);
        char *to = l->keys + (block * l->kv_heads + g) * T * size + 4 * place;
        for (int64_t i = 0; i < size; i += 4) memcpy(to + i * T, key + i, 4);
    }
}

/* Values: numbers of tokens t, t + 1 (bf16; fp32: t alone) lie side by side. */
static void put_value(const Layer *l, View from, int64_t n, int64_t slot) {
    int64_t T = l->block_size, block = slot / T, place = slot % T, dim = l->value_dim;
    for (int64_t g = 0; g < l->kv_heads; g++) {
        const char *value = at(from.data, l->type, g * from.head + n * from.token);
        char *to = l->values + (block * l->kv_heads + g) * T * dim * size_of(l->type);
        if (l->type == FP32) {
            memcpy(to + 4 * place * dim, value, 4 * dim);
            continue;
        }
        uint16_t *pairs = (uint16_t *)to + place / 2 * 2 * dim + place % 2;
        for (int64_t d = 0; d < dim; d++) memcpy(pairs + 2 * d, value + 2 * d, 2);
    }
}

#include "paged_decode.h"
#include "paged_prompt.h"

/* Once per step: whether the rows fit a pool, so that no layer reads or writes outside it. */
int loramux_paged_check(const Rows *r, int64_t num_blocks, int64_t block_size) {
    for (int64_t n = 0; n < r->num_tokens; n++)
        if (r->slot[n] < 0 || r->slot[n] >= num_blocks * block_size) return BAD_SLOT;
    for (int64_t i = 0; i < r->num_blocks; i++)
        if (r->blocks[i] < 0 || r->blocks[i] >= num_blocks) return BAD_BLOCK;
    for (int64_t s = 0; s < r->num_decodes; s++) {
        int64_t held = (r->begin[s + 1] - r->begin[s]) * block_size;
        if (r->row[s] < 0 || r->row[s] >= r->num_tokens || r->length[s] < 1 || r->length[s] > held) return BAD_ROW;
        if (r->begin[s] < 0 || r->begin[s + 1] > r->num_blocks) return BAD_ROW;
    }
    for (int64_t p = 0; p < r->num_pieces; p++) {
        int64_t first = r->piece_first[p], end = r->piece_end[p], start = r->piece_start[p];
        int64_t held = (r->piece_begin[p + 1] - r->piece_begin[p]) * block_size;
        if (first < 0 || end <= first || end > r->num_tokens || start < 0 || start + end - first > held) return BAD_ROW;
        if (r->piece_begin[p] < 0 || r->piece_begin[p + 1] > r->num_blocks) return BAD_ROW;
    }
    return OK;
}

/* Whether pieces of prompts are attended to here, too; elsewhere they are the caller's. */
int loramux_paged_takes_pieces(const Layer *l) {
#if defined(__AMX_BF16__)
    return l->type == BF16 && l->key_dim % STEP == 0 && l->value_dim % TILE == 0 && l->block_size % TILE == 0;
#else
    (void)l;
    return 0;
#endif
}

static int decode(const Layer *l, const Rows *r, View q, char *out, int threads) {
    int64_t longest = 0, tokens = 0;
    for (int64_t s = 0; s < r->num_decodes; s++) {
        tokens += r->length[s];
        longest = r->length[s] > longest ? r->length[s] : longest;
    }
    if (tokens * l->heads < ALONE) threads = 1;
    int64_t share = 4 * l->heads * (longest + 2 * l->block_size + l->value_dim);
    char *work = aligned_alloc(LINE, (share * threads + LINE - 1) / LINE * LINE);
    if (!work) return NO_MEMORY;
    if (threads > 1) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic)
        for (int64_t i = 0; i < r->num_decodes * l->kv_heads; i++)
            attend(l, r, q, out, i / l->kv_heads, i % l->kv_heads, i % l->kv_heads + 1,
                   (float *)(work + omp_get_thread_num() * share));
#endif
    } else
        for (int64_t s = 0; s < r->num_decodes; s++) attend(l, r, q, out, s, 0, l->kv_heads, (float *)work);
    free(work);
    return OK;
}

#if defined(__AMX_BF16__)
static int read_prompts(const Layer *l, const Rows *r, View q, char *out, int threads) {
    int64_t longest = 0, items = r->num_pieces * l->kv_heads;
    for (int64_t p = 0; p < r->num_pieces; p++) {
        int64_t total = r->piece_start[p] + r->piece_end[p] - r->piece_first[p];
        longest = total > longest ? total : longest;
    }
    int64_t share = (desk_bytes(l, (longest + WIDE - 1) / WIDE * WIDE) + LINE - 1) / LINE * LINE;
    char *work = aligned_alloc(LINE, share * threads);
    if (!work) return NO_MEMORY;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
    {
        char *own = work;
        amx_configure(TILE);
#ifdef _OPENMP
        own += omp_get_thread_num() * share;
#pragma omp for schedule(dynamic)
#endif
        for (int64_t i = 0; i < items; i++) attend_piece(l, r, q, out, i / l->kv_heads, i % l->kv_heads, own);
        _tile_release();
    }
    free(work);
    return OK;
}
#endif

/* q, k, v: [H or G, N, D], any stride but the last; out: [N, H, D of values], contiguous, rows of decodes are written,
 * and those of pieces where they are taken here. The rows must have been checked. */
int loramux_paged(const Layer *l, const Rows *r, const void *q, int64_t q_head, int64_t q_token, const void *k,
                  int64_t k_head, int64_t k_token, const void *v, int64_t v_head, int64_t v_token, void *out,
                  int threads) {
    View queries = {q, q_head, q_token}, keys = {k, k_head, k_token}, values = {v, v_head, v_token};
    int bad = OK;
#ifndef _OPENMP
    threads = 1;
#endif
    for (int64_t n = 0; n < r->num_tokens; n++) {
        put_key(l, keys, n, r->slot[n]);
        put_value(l, values, n, r->slot[n]);
    }
    if (r->num_decodes) bad = decode(l, r, queries, out, threads);
#if defined(__AMX_BF16__)
    if (!bad && r->num_pieces && loramux_paged_takes_pieces(l)) bad = read_prompts(l, r, queries, out, threads);
#endif
    return bad;
}

int loramux_is_usable(void) {
#if defined(__AMX_BF16__)
    return amx_is_allowed();
#else
    return 1;
#endif
}
