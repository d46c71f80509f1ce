/* The base linear on AMX tiles: 32 outputs of up to 32 rows per pass, W read where it lies.
 *
 * Why: a bf16 dot product instruction takes as many steps as there are rows; a tile takes 16 rows of x in the steps of
 * one, so up to 32 rows cost what reading W costs. The left tile is 16 rows of W, the right one x transposed and packed
 * in pairs (the small side, once per call). One tile entry is one (row, output) sum, made in the order of the input.
 *
 * Letters: I input width, N rows of x, C columns of a tile (16, or 1 for a single row).
 */
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

enum { STEP = 32, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };

/* Linux hands out tile registers on request, once per process. */
static int amx_is_allowed(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

/* GCC's tile intrinsics do not say which memory they read: without this, stores before them are moved or dropped. */
INLINE void settle(const void *memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

INLINE int64_t amx_columns(int64_t num_rows) { return num_rows == 1 ? 1 : 16; }

static void amx_configure(int64_t num_rows) {
    TileConfig config = {.palette = 1};
    for (int t = 0; t < 8; t++) { /* 0-3 sums, 4-5 W, 6-7 x */
        config.rows[t] = 16;
        config.row_bytes[t] = t == 4 || t == 5 ? 64 : 4 * amx_columns(num_rows);
    }
    settle(&config);
    _tile_loadconfig(&config);
}

/* 16 x 16 words: r[i][j] becomes r[j][i]. */
INLINE void turn(__m512i *r) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; j++) {
        t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
        t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* packed[k / 2][column] = x[column][k, k + 1] for 16 columns; those past the last row are zero. */
static void amx_pack_tile(uint32_t *packed, const char *x, int64_t num_rows, int64_t width) {
    for (int64_t k = 0; k < width; k += STEP) {
        __m512i r[16];
        UNROLL for (int i = 0; i < 16; i++)
            r[i] = i < num_rows ? _mm512_loadu_si512(x + 2 * (i * width + k)) : _mm512_setzero_si512();
        turn(r);
        UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(packed + 8 * k + 16 * i, r[i]);
    }
    settle(packed);
}

/* packed[block][k / 2][column] = x[block * C + column][k, k + 1]; columns past the last row are zero. */
static void amx_pack(uint32_t *packed, const char *x, int64_t num_rows, int64_t width) {
    if (num_rows == 1) {
        memcpy(packed, x, 2 * width);
        settle(packed);
        return;
    }
    for (int64_t n = 0; n < num_rows; n += 16)
        amx_pack_tile(packed + n * width / 2, x + 2 * n * width, num_rows - n, width);
}

/* base[n][i] = sums[i][n] for the rows from `first` on that exist */
INLINE void amx_turn(float *base, int64_t pitch, const float *sums, int64_t first, int64_t num_rows) {
    __m512i r[16];
    if (num_rows == 1) {
        memcpy(base, sums, 4 * TILE);
        return;
    }
    UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + 16 * i);
    turn(r);
    int64_t have = num_rows - first < 16 ? num_rows - first : 16;
    UNROLL for (int i = 0; i < 16; i++)
        if (i < have) _mm512_storeu_si512(base + (first + i) * pitch, r[i]);
}

/* Row n of the outputs o..o+15 goes to base + n * pitch, that of o+16..o+31 to `second` + n * pitch, left alone where
 * W ends. */
static void amx_strip(float *base, float *second, int64_t pitch, const uint32_t *packed, const char *w, int64_t o,
                      int64_t num_w, int64_t width, int64_t num_rows, Stream *s) {
    float sums[TILE * TILE] __attribute__((aligned(64)));
    int64_t columns = amx_columns(num_rows), block = width / 2 * columns;
    const char *w0 = w + 2 * o * width, *w1 = o + TILE < num_w ? w0 + 2 * TILE * width : w0;
    for (int64_t n = 0; n < num_rows; n += 2 * columns) {
        const uint32_t *x0 = packed + n / columns * block, *x1 = n + columns < num_rows ? x0 + block : NULL;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < width; k += STEP) {
            if (!n) advance(s, w1 == w0 ? TILE * LINE : 2 * TILE * LINE, 0);
            _tile_loadd(4, w0 + 2 * k, 2 * width);
            _tile_loadd(6, x0 + k / 2 * columns, 4 * columns);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, w1 + 2 * k, 2 * width);
            _tile_dpbf16ps(1, 5, 6);
            if (!x1) continue;
            _tile_loadd(7, x1 + k / 2 * columns, 4 * columns);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int t = 0; t < (x1 ? 4 : 2); t++) {
            if (t == 0) _tile_stored(0, sums, 4 * columns);
            else if (t == 1) _tile_stored(1, sums, 4 * columns);
            else if (t == 2) _tile_stored(2, sums, 4 * columns);
            else _tile_stored(3, sums, 4 * columns);
            settle(sums);
            if (t % 2 == 0 || w1 != w0) amx_turn(t % 2 ? second : base, pitch, sums, n + t / 2 * 16, num_rows);
        }
    }
}
#endif
