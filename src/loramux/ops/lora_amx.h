/* The base linear on AMX tiles: 32 outputs of up to 32 rows per pass, W read where it lies.
 *
 * Why: a bf16 dot product instruction takes as many steps as there are rows; a tile takes 16 rows of x in the steps of
 * one, so up to 32 rows cost what reading W costs. The left tile is 16 rows of W, the right one x transposed and packed
 * in pairs (the small side, once per call). One tile entry is one (row, output) sum, made in the order of the input.
 *
 * Letters: I input width, N rows of x, C columns of a tile (16, or N if smaller).
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

INLINE int64_t amx_columns(int64_t num_rows) { return num_rows < 16 ? num_rows : 16; }

static void amx_configure(int64_t num_rows) {
    TileConfig config = {.palette = 1};
    for (int t = 0; t < 8; t++) { /* 0-3 sums, 4-5 W, 6-7 x */
        config.rows[t] = 16;
        config.row_bytes[t] = t == 4 || t == 5 ? 64 : 4 * amx_columns(num_rows);
    }
    settle(&config);
    _tile_loadconfig(&config);
}

/* packed[block][k / 2][column] = x[block * C + column][k, k + 1]; columns past the last row are zero. */
static void amx_pack(uint32_t *packed, const char *x, int64_t num_rows, int64_t width) {
    int64_t columns = amx_columns(num_rows), half = width / 2;
    for (int64_t n = 0; n < (num_rows + columns - 1) / columns * columns; n++) {
        uint32_t *to = packed + n / columns * half * columns + n % columns;
        for (int64_t k = 0; k < half; k++) {
            uint32_t pair = 0;
            if (n < num_rows) memcpy(&pair, x + 4 * (n * half + k), 4);
            to[k * columns] = pair;
        }
    }
    settle(packed);
}

/* base[n][i] = sums[i][n] for the rows from `first` on that exist */
INLINE void amx_turn(float *base, const float *sums, int64_t first, int64_t columns, int64_t num_rows) {
    for (int64_t n = first; n < first + columns && n < num_rows; n++)
        for (int i = 0; i < TILE; i++) base[n * TILE + i] = sums[i * columns + n - first];
}

/* base[2][N][16]: outputs o..o+31; the second half is left alone where W ends. */
static void amx_strip(float *base, const uint32_t *packed, const char *w, int64_t o, int64_t num_w, int64_t width,
                      int64_t num_rows) {
    float sums[TILE * TILE];
    int64_t columns = amx_columns(num_rows), block = width / 2 * columns;
    const char *w0 = w + 2 * o * width, *w1 = o + TILE < num_w ? w0 + 2 * TILE * width : w0;
    for (int64_t n = 0; n < num_rows; n += 2 * columns) {
        const uint32_t *x0 = packed + n / columns * block, *x1 = n + columns < num_rows ? x0 + block : NULL;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < width; k += STEP) {
            for (int j = 0; j < 2 * TILE && !n; j++) __builtin_prefetch(w0 + 2 * ((2 * TILE + j) * width + k), 0, 2);
            _tile_loadd(4, w0 + 2 * k, 2 * width);
            _tile_loadd(5, w1 + 2 * k, 2 * width);
            _tile_loadd(6, x0 + k / 2 * columns, 4 * columns);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (!x1) continue;
            _tile_loadd(7, x1 + k / 2 * columns, 4 * columns);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        float *second = base + num_rows * TILE;
        _tile_stored(0, sums, 4 * columns);
        amx_turn(base, sums, n, columns, num_rows);
        _tile_stored(1, sums, 4 * columns);
        if (w1 != w0) amx_turn(second, sums, n, columns, num_rows);
        if (!x1) continue;
        _tile_stored(2, sums, 4 * columns);
        amx_turn(base, sums, n + columns, columns, num_rows);
        _tile_stored(3, sums, 4 * columns);
        if (w1 != w0) amx_turn(second, sums, n + columns, columns, num_rows);
    }
}
#endif
