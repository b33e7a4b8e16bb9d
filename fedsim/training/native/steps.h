/* Local steps on a chain of linear layers, client after client, every matrix in the cache while it is used.
 *
 * With A_0 the batch (an example is a row) and A_l = act_l(A_{l-1} W_l^T + b_l):
 *
 *     D_L = scale * d loss / d A_L            scale: rate / examples
 *     D_l = act_l'(A_l) * D_l                 dW_l = D_l^T A_{l-1}    db_l = sum D_l    D_{l-1} = D_l W_l
 *
 * What products.h says of the bits holds for all of it. Included once for every instruction set, after products.h. */

/* ---- activations and losses ------------------------------------------------------------------------ */

/* e^x to two units in the last place for -87.3 < x < 88.3, and the value at the limit beyond; coefficients of Cephes.
 */
HERE LANES VARIANT(exponential)(LANES x) {
    x = smaller(all(88.3762626647949f), larger(all(-87.3365478515625f), x));
    LANES whole = rounded(times(x, all(1.44269504088896341f)));
    x = fused(whole, all(-0.693359375f), x);
    x = fused(whole, all(2.12194440e-4f), x);
    LANES y = fused(all(1.9875691500e-4f), x, all(1.3981999507e-3f));
    y = fused(y, x, all(8.3334519073e-3f));
    y = fused(y, x, all(4.1665795894e-2f));
    y = fused(y, x, all(1.6666665459e-1f));
    y = fused(y, x, all(5.0000001201e-1f));
    y = add(fused(y, times(x, x), x), all(1.0f));
    return times(y, power_of_two(whole));
}

/* tanh x = (1 - e^{-2|x|}) / (1 + e^{-2|x|}) with the sign of x; near 0, where that cancels, a polynomial of Cephes. */
HERE LANES VARIANT(tangent)(LANES x) {
    LANES size = with_sign(x, all(0.0f)), square = times(x, x);
    LANES e = VARIANT(exponential)(times(size, all(-2.0f)));
    LANES far = with_sign(over(subtract(all(1.0f), e), add(all(1.0f), e)), x);
    LANES y = fused(all(-5.70498872745e-3f), square, all(2.06390887954e-2f));
    y = fused(y, square, all(-5.37397155531e-2f));
    y = fused(y, square, all(1.33314422036e-1f));
    y = fused(y, square, all(-3.33332819422e-1f));
    return at_most(size, all(0.625f), fused(times(y, square), x, x), far);
}

/* a <- act(a + bias) for a [rows, columns]; columns that only fill a block come to nothing anywhere. */
FOR_VARIANT static void VARIANT(activate)(float *a, int64_t rows, int64_t columns, const float *bias,
                                          int64_t activation) {
    int64_t stride = padded(columns);
    for (int64_t n = 0; n < columns; n += 16) {
        LANES shift = bias ? load_some(bias + n, (int)VARIANT(least)(columns - n, 16)) : all(0.0f);
        for (int64_t m = 0; m < rows; m++) {
            float *at = a + m * stride + n;
            LANES value = bias ? add(load(at), shift) : load(at);
            if (activation == RELU)
                value = larger(all(0.0f), value);
            if (activation == TANH)
                value = VARIANT(tangent)(value);
            store(at, value);
        }
    }
}

/* d <- act'(a) * d, both [rows, columns], from what the activation gave. */
FOR_VARIANT static void VARIANT(deactivate)(float *d, const float *a, int64_t rows, int64_t columns, int64_t activation) {
    int64_t stride = padded(columns);
    if (activation == NO_ACTIVATION)
        return;
    for (int64_t at = 0; at < rows * stride; at += 16) {
        LANES value = load(a + at), slope = load(d + at);
        if (activation == RELU) {
            store(d + at, at_most(value, all(0.0f), all(0.0f), slope));
        } else {
            store(d + at, times(slope, fused(times(value, all(-1.0f)), value, all(1.0f))));
        }
    }
}

/* d [columns] = scale * (softmax(a) - the target's unit vector). */
HERE void VARIANT(cross_entropy_slope)(float *d, const float *a, int64_t columns, int64_t target, float scale) {
    float most = a[0];
    for (int64_t n = 1; n < columns; n++)
        most = a[n] > most ? a[n] : most;
    LANES total = all(0.0f);
    for (int64_t n = 0; n < columns; n += 16) {
        int some = (int)VARIANT(least)(columns - n, 16);
        store_some(d + n, some, VARIANT(exponential)(subtract(load(a + n), all(most))));
        total = add(total, load_some(d + n, some));
    }
    LANES whole = all(sum(total));
    for (int64_t n = 0; n < columns; n += 16)
        store(d + n, over(load(d + n), whole));
    d[target] -= 1.0f;
    for (int64_t n = 0; n < columns; n += 16)
        store(d + n, times(load(d + n), all(scale)));
}

/* d = d loss / d a of a batch, each example by its scale, both [rows, columns]. */
FOR_VARIANT static void VARIANT(loss_slope)(float *d, const float *a, int64_t rows, int64_t columns,
                                            const chain_t *chain, const int64_t *example, const float *scale) {
    int64_t stride = padded(columns);
    for (int64_t m = 0; m < rows; m++, d += stride, a += stride) {
        if (chain->loss == CROSS_ENTROPY) {
            VARIANT(cross_entropy_slope)(d, a, columns, ((const int64_t *)chain->targets)[example[m]], scale[m]);
            continue;
        }
        LANES value = load(a), target = all(((const float *)chain->targets)[example[m]]);
        if (chain->loss == BINARY)
            value = over(all(1.0f), add(all(1.0f), VARIANT(exponential)(times(value, all(-1.0f)))));
        store(d, times(subtract(value, target), all(scale[m])));
    }
}

/* ---- layers ----------------------------------------------------------------------------------------- */

/* out [size, padded outputs] = what comes out of a layer. */
FOR_VARIANT static void VARIANT(forward)(const layer_t *layer, const float *x, const float *const *rows, int64_t size,
                                         float *out) {
    VARIANT(product)(rows, size, x + layer->weight, layer->outputs, layer->inputs, out, padded(layer->outputs));
    VARIANT(activate)(out, size, layer->outputs, layer->bias < 0 ? 0 : x + layer->bias, layer->activation);
}

/* below [size, below_stride] = d W, with the slope d [size, stride] by what comes out of a layer. */
FOR_VARIANT static void VARIANT(slope_below)(const layer_t *layer, const float *x, const float *d, int64_t stride,
                                             int64_t size, float *below, int64_t below_stride, scratch_t *scratch) {
    const int64_t inputs = layer->inputs, outputs = layer->outputs;
    for (int64_t n = 0; n < outputs; n++)
        scratch->weights[n] = x + layer->weight + n * inputs;
    VARIANT(write_sums)(d, stride, 1, outputs, scratch->weights, size, inputs, below, below_stride, &scratch->stripe);
}

/* A layer's gradient d^T rows, and the sum of d, written into a vector like the parameters, or taken off one. */
FOR_VARIANT static void VARIANT(gradient)(const layer_t *layer, float *to, int take_off, const float *d, int64_t stride,
                                          const float *const *rows, int64_t size, scratch_t *scratch) {
    const int64_t inputs = layer->inputs, outputs = layer->outputs;
    const float *one = scratch->ones;
    float *weight = to + layer->weight, *bias = to + layer->bias;
    stripe_t *stripe = &scratch->stripe;
    for (int64_t m = 0; m < size; m++)
        scratch->slopes[m] = d + m * stride;
    if (take_off) {
        VARIANT(take_off_sums)(d, 1, stride, size, rows, outputs, inputs, weight, inputs, stripe);
        if (layer->bias >= 0)
            VARIANT(take_off_sums)(one, 0, 0, size, scratch->slopes, 1, outputs, bias, 0, stripe);
    } else {
        VARIANT(write_sums)(d, 1, stride, size, rows, outputs, inputs, weight, inputs, stripe);
        if (layer->bias >= 0)
            VARIANT(write_sums)(one, 0, 0, size, scratch->slopes, 1, outputs, bias, 0, stripe);
    }
}

/* ---- steps ------------------------------------------------------------------------------------------ */

/* One step, or with `out` one gradient, of one client with parameters x, over `size` examples. */
FOR_VARIANT static void VARIANT(step)(const chain_t *chain, float *x, float *out, const int64_t *example,
                                      const float *scale, int64_t size, scratch_t *scratch) {
    const int64_t last = chain->layers - 1, width = chain->layer[0].inputs;
    for (int64_t m = 0; m < size; m++)
        scratch->rows[0][m] = chain->inputs + example[m] * width;
    for (int64_t l = 0; l <= last; l++)
        VARIANT(forward)(chain->layer + l, x, scratch->rows[l], size, scratch->after[l]);
    VARIANT(loss_slope)(scratch->slope[last], scratch->after[last], size, chain->layer[last].outputs, chain, example,
                        scale);
    for (int64_t l = last; l >= 0; l--) {
        const layer_t *layer = chain->layer + l;
        const int64_t stride = padded(layer->outputs);
        float *d = scratch->slope[l];
        VARIANT(deactivate)(d, scratch->after[l], size, layer->outputs, layer->activation);
        if (l)
            VARIANT(slope_below)(layer, x, d, stride, size, scratch->slope[l - 1], padded(layer->inputs), scratch);
        VARIANT(gradient)(layer, out ? out : x, !out, d, stride, scratch->rows[l], size, scratch);
    }
}

/* |a|: the squares added in stretches of 4,096, so that a long vector loses no digits. */
FOR_VARIANT static float VARIANT(norm)(const float *a, int64_t length) {
    LANES total = all(0.0f);
    for (int64_t first = 0; first < length; first += 4096) {
        const int64_t end = VARIANT(least)(first + 4096, length);
        LANES part = all(0.0f);
        for (int64_t i = first; i < end; i += 16) {
            LANES value = load_some(a + i, (int)VARIANT(least)(end - i, 16));
            part = fused(value, value, part);
        }
        total = add(total, part);
    }
    return sqrtf(sum(total));
}

/* x <- x - rate * v with v <- momentum * v + g, g the gradient clipped, with what the penalties add. */
FOR_VARIANT static void VARIANT(follow)(float *x, const float *gradient, const float *start, float *velocity,
                                        float rate, const extras_t *extras, int64_t length) {
    const float norm = extras->clip < INFINITY ? VARIANT(norm)(gradient, length) : 0.0f;
    const LANES shrunk = all(norm > extras->clip ? extras->clip / norm : 1.0f), minus = all(-1.0f);
    const LANES decay = all(extras->weight_decay), prox = all(extras->prox), momentum = all(extras->momentum),
                down = all(-rate);
    for (int64_t i = 0; i < length; i += 16) {
        const int some = (int)VARIANT(least)(length - i, 16);
        const LANES here = load_some(x + i, some);
        LANES g = times(load_some(gradient + i, some), shrunk);
        if (extras->weight_decay)
            g = fused(decay, here, g);
        if (extras->prox)
            g = fused(prox, fused(minus, load_some(start + i, some), here), g);
        if (velocity) {
            g = fused(momentum, load_some(velocity + i, some), g);
            store_some(velocity + i, some, g);
        }
        store_some(x + i, some, fused(down, g, here));
    }
}

/* x <- x - start; whether that is finite everywhere. */
HERE uint8_t VARIANT(leave)(float *x, const float *start, int64_t length) {
    LANES nothing = all(0.0f);
    for (int64_t i = 0; i < length; i += 16) {
        const int some = (int)VARIANT(least)(length - i, 16);
        const LANES left = subtract(load_some(x + i, some), load_some(start + i, some));
        nothing = fused(left, all(0.0f), nothing); /* not a number from the first that is not finite on */
        store_some(x + i, some, left);
    }
    return sum(nothing) == 0.0f;
}

/* All the work of one client after another; 0 if it was interrupted. */
FOR_VARIANT static int VARIANT(train)(const chain_t *chain, const work_t *work, scratch_t *scratch) {
    const int64_t size = work->size, length = chain->parameters;
    int64_t unasked = 0;
    for (int64_t client = 0; client < work->clients; client++) {
        float *x = work->x + client * work->x_stride, *out = work->out ? work->out + client * work->out_stride : 0;
        float *velocity = work->velocity ? work->velocity + client * work->x_stride : 0;
        const float *start = work->start + client * work->start_stride;
        if (work->first)
            memcpy(x, start, (size_t)length * sizeof *x);
        for (int64_t step = 0; step < work->steps && client < work->running[step]; step++) {
            const int64_t at = (step * work->clients + client) * size;
            const float *scale = work->scale + at;
            if ((unasked += size * length) > UNASKED) {
                if (work->interrupted())
                    return 0;
                unasked = 0;
            }
            if (work->extras) {
                VARIANT(step)(chain, x, scratch->gradient, work->rows + at, scale, size, scratch);
                VARIANT(follow)(x, scratch->gradient, start, velocity, work->rate[client], work->extras, length);
                continue;
            }
            if (work->rate) {
                for (int64_t m = 0; m < size; m++)
                    scratch->scale[m] = scale[m] * work->rate[client];
                scale = scratch->scale;
            }
            VARIANT(step)(chain, x, out, work->rows + at, scale, size, scratch);
        }
        if (work->last)
            work->finite[client] = VARIANT(leave)(x, start, length);
    }
    return 1;
}

#undef load
#undef load_some
#undef store
#undef store_some
#undef all
#undef add
#undef subtract
#undef times
#undef over
#undef fused
#undef larger
#undef smaller
#undef at_most
#undef with_sign
#undef rounded
#undef power_of_two
#undef sum
#undef UNROLL
#undef EACH_ROWS
#undef EACH_TILE
#undef TILE_ROWS
#undef TILE_BLOCKS
#undef LANES
#undef VARIANT
#undef FOR_VARIANT
#undef HERE
