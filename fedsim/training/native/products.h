/* Products of matrices, row by row in memory, in tiles that stay in registers.
 *
 * Every sum has one order, over sixteen lanes where it runs along a row, and products are always rounded together with
 * the sum they go into: the bits depend on this text alone and not on the instruction set. Included once for every
 * instruction set, after a header that defines LANES and what can be done with them, and before steps.h. */

#define load VARIANT(load)
#define load_some VARIANT(load_some)
#define store VARIANT(store)
#define store_some VARIANT(store_some)
#define all VARIANT(all)
#define add VARIANT(add)
#define subtract VARIANT(subtract)
#define times VARIANT(times)
#define over VARIANT(over)
#define fused VARIANT(fused)
#define larger VARIANT(larger)
#define smaller VARIANT(smaller)
#define at_most VARIANT(at_most)
#define with_sign VARIANT(with_sign)
#define rounded VARIANT(rounded)
#define power_of_two VARIANT(power_of_two)
#define sum VARIANT(sum)
#define UNROLL _Pragma("GCC unroll 8")

/* out[m][n] = a[m] . w_n, or that much more, over `length` columns from `first` on, for a tile of `rows` by `outputs`.
 */
HERE void VARIANT(dot_tile)(int rows, int outputs, const float *const *a, const float *w, int64_t w_stride,
                            int64_t first, int64_t length, float *out, int64_t out_stride) {
    LANES total[TILE_ROWS][TILE_BLOCKS];
    UNROLL
    for (int m = 0; m < rows; m++) {
        UNROLL
        for (int n = 0; n < outputs; n++)
            total[m][n] = all(0.0f);
    }
    int64_t i = first;
    const int64_t end = first + length;
    for (; i + 16 <= end; i += 16) {
        LANES right[TILE_BLOCKS];
        UNROLL
        for (int n = 0; n < outputs; n++)
            right[n] = load(w + n * w_stride + i);
        UNROLL
        for (int m = 0; m < rows; m++) {
            LANES left = load(a[m] + i);
            UNROLL
            for (int n = 0; n < outputs; n++)
                total[m][n] = fused(left, right[n], total[m][n]);
        }
    }
    if (i < end) {
        int rest = (int)(end - i);
        UNROLL
        for (int m = 0; m < rows; m++) {
            LANES left = load_some(a[m] + i, rest);
            UNROLL
            for (int n = 0; n < outputs; n++)
                total[m][n] = fused(left, load_some(w + n * w_stride + i, rest), total[m][n]);
        }
    }
    UNROLL
    for (int m = 0; m < rows; m++) {
        UNROLL
        for (int n = 0; n < outputs; n++)
            out[m * out_stride + n] = (first ? out[m * out_stride + n] : 0.0f) + sum(total[m][n]);
    }
}

/* out[m][columns] = (or -=) sum over k of a[m, k] * b[k][columns], for `rows` rows and `blocks` times sixteen columns,
 * or fewer than sixteen if `some` is not 0. */
HERE void VARIANT(sum_tile)(int rows, int blocks, int some, int take_off, const float *a, int64_t a_row, int64_t a_term,
                            int64_t terms, const float *const *b, int64_t column, float *out, int64_t out_stride) {
    LANES total[TILE_ROWS][TILE_BLOCKS];
    UNROLL
    for (int m = 0; m < rows; m++) {
        UNROLL
        for (int n = 0; n < blocks; n++)
            total[m][n] = all(0.0f);
    }
    for (int64_t k = 0; k < terms; k++) {
        LANES right[TILE_BLOCKS];
        const float *row = b[k] + column;
        UNROLL
        for (int n = 0; n < blocks; n++)
            right[n] = some ? load_some(row, some) : load(row + 16 * n);
        UNROLL
        for (int m = 0; m < rows; m++) {
            LANES left = all(a[m * a_row + k * a_term]);
            UNROLL
            for (int n = 0; n < blocks; n++)
                total[m][n] = fused(left, right[n], total[m][n]);
        }
    }
    UNROLL
    for (int m = 0; m < rows; m++) {
        float *to = out + m * out_stride + column;
        UNROLL
        for (int n = 0; n < blocks; n++) {
            if (some) {
                store_some(to, some, take_off ? subtract(load_some(to, some), total[m][n]) : total[m][n]);
            } else {
                store(to + 16 * n, take_off ? subtract(load(to + 16 * n), total[m][n]) : total[m][n]);
            }
        }
    }
}

#if TILE_ROWS == 5 && TILE_BLOCKS == 5
#define EACH_ROWS(TILE, n) TILE(1, n) TILE(2, n) TILE(3, n) TILE(4, n) TILE(5, n)
#define EACH_TILE(TILE) EACH_ROWS(TILE, 1) EACH_ROWS(TILE, 2) EACH_ROWS(TILE, 3) EACH_ROWS(TILE, 4) EACH_ROWS(TILE, 5)
#else
#define EACH_ROWS(TILE, n) TILE(1, n) TILE(2, n) TILE(3, n)
#define EACH_TILE(TILE) EACH_ROWS(TILE, 1) EACH_ROWS(TILE, 2)
#endif

static inline int64_t VARIANT(least)(int64_t a, int64_t b) { return a < b ? a : b; }

/* out [rows, outputs] = a w^T, for rows a[m] [length] and w [outputs, length]: in stretches of SPAN columns, whose sums
 * are added, so that a tile of both stays in the nearest cache, and for CHUNK rows at a time in the next. */
FOR_VARIANT static void VARIANT(product)(const float *const *a, int64_t rows, const float *w, int64_t outputs,
                                         int64_t length, float *out, int64_t out_stride) {
    for (int64_t first = 0; first < length; first += SPAN) {
        const int64_t span = VARIANT(least)(length - first, SPAN);
        for (int64_t chunk = 0; chunk < rows; chunk += CHUNK) {
            const int64_t end = VARIANT(least)(rows, chunk + CHUNK);
            for (int64_t n = 0; n < outputs; n += TILE_BLOCKS) {
                for (int64_t m = chunk; m < end; m += TILE_ROWS) {
                    const float *right = w + n * length;
                    float *to = out + m * out_stride + n;
                    switch (8 * VARIANT(least)(end - m, TILE_ROWS) + VARIANT(least)(outputs - n, TILE_BLOCKS)) {
#define TILE(i, j)                                                                                                     \
    case 8 * i + j:                                                                                                    \
        VARIANT(dot_tile)(i, j, a + m, right, length, first, span, to, out_stride);                                    \
        break;
                        EACH_TILE(TILE)
#undef TILE
                    }
                }
            }
        }
    }
}

/* out [rows, columns] = (or -=) sum over k of a[m, k] * b[k][columns]. */
HERE void VARIANT(tiles)(int take_off, const float *a, int64_t a_row, int64_t a_term, int64_t terms,
                         const float *const *b, int64_t rows, int64_t columns, float *out, int64_t out_stride) {
    for (int64_t m = 0; m < rows; m += TILE_ROWS) {
        int64_t some_rows = VARIANT(least)(rows - m, TILE_ROWS), n = 0;
        const float *left = a + m * a_row;
        float *to = out + m * out_stride;
        for (; n + 16 <= columns; n += 16 * TILE_BLOCKS) {
            switch (8 * some_rows + VARIANT(least)((columns - n) / 16, TILE_BLOCKS)) {
#define TILE(i, j)                                                                                                     \
    case 8 * i + j:                                                                                                    \
        VARIANT(sum_tile)(i, j, 0, take_off, left, a_row, a_term, terms, b, n, to, out_stride);                        \
        break;
                EACH_TILE(TILE)
#undef TILE
            }
        }
        n = columns / 16 * 16;
        if (n < columns) {
            switch (some_rows) {
#define TILE(i, j)                                                                                                     \
    case i:                                                                                                            \
        VARIANT(sum_tile)(i, 1, (int)(columns - n), take_off, left, a_row, a_term, terms, b, n, to, out_stride);       \
        break;
                EACH_ROWS(TILE, 1)
#undef TILE
            }
        }
    }
}

/* The same. Of a large b that many rows need, stripes that stay in the cache are laid side by side first. */
HERE void VARIANT(sums)(int take_off, const float *a, int64_t a_row, int64_t a_term, int64_t terms,
                        const float *const *b, int64_t rows, int64_t columns, float *out, int64_t out_stride,
                        stripe_t *stripe) {
    if (terms * columns <= STRIPE || rows <= 4 * TILE_ROWS) {
        VARIANT(tiles)(take_off, a, a_row, a_term, terms, b, rows, columns, out, out_stride);
        return;
    }
    for (int64_t n = 0; n < columns; n += STRIPE_WIDTH) {
        const int64_t width = VARIANT(least)(columns - n, STRIPE_WIDTH);
        for (int64_t k = 0; k < terms; k++) {
            stripe->rows[k] = stripe->values + k * STRIPE_WIDTH;
            memcpy(stripe->values + k * STRIPE_WIDTH, b[k] + n, (size_t)width * sizeof(float));
        }
        VARIANT(tiles)(take_off, a, a_row, a_term, terms, stripe->rows, rows, width, out + n, out_stride);
    }
}

FOR_VARIANT static void VARIANT(write_sums)(const float *a, int64_t a_row, int64_t a_term, int64_t terms,
                                            const float *const *b, int64_t rows, int64_t columns, float *out,
                                            int64_t out_stride, stripe_t *stripe) {
    VARIANT(sums)(0, a, a_row, a_term, terms, b, rows, columns, out, out_stride, stripe);
}

FOR_VARIANT static void VARIANT(take_off_sums)(const float *a, int64_t a_row, int64_t a_term, int64_t terms,
                                               const float *const *b, int64_t rows, int64_t columns, float *out,
                                               int64_t out_stride, stripe_t *stripe) {
    VARIANT(sums)(1, a, a_row, a_term, terms, b, rows, columns, out, out_stride, stripe);
}
