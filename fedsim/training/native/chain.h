/* What is trained: a chain of linear layers, the examples, and the loss. */

#pragma once
#include <stdint.h>

/* To be raised when the bits or what a function takes change, with REVISION in built.py. */
#define REVISION 3

enum activation { NO_ACTIVATION, RELU, TANH };
enum loss { CROSS_ENTROPY, BINARY, SQUARED };

typedef struct {
    int64_t inputs, outputs;
    int64_t weight; /* where W [outputs, inputs] begins in the parameters */
    int64_t bias;   /* where b [outputs] begins; -1 if there is none */
    int64_t activation;
} layer_t;

typedef struct {
    int64_t parameters; /* of all layers */
    int64_t layers;
    const layer_t *layer;
    int64_t loss;
    const float *inputs; /* [examples, inputs of the first layer] */
    const void *targets; /* [examples]: int64 classes for cross-entropy, else floats */
} chain_t;

/* What goes into a step beside the gradient. */
typedef struct {
    float clip; /* largest norm of the gradient; infinite if it may be anything */
    float weight_decay, prox, momentum;
} extras_t;

/* Some steps of some clients, the longest at work first. */
typedef struct {
    int64_t clients, steps, size;
    const int64_t *rows;    /* [steps, clients, size]: where the examples lie */
    const float *scale;     /* [steps, clients, size]: 1 / examples, 0 for what only fills a batch */
    const int64_t *running; /* [steps]: clients at work */
    const float *rate;      /* [clients]: learning rates */
    float *x;               /* [clients, x_stride]: parameters, changed in place unless `out` is there */
    int64_t x_stride;
    float *out; /* [clients, out_stride]: where the gradients of the one step are written */
    int64_t out_stride;
    const float *start; /* [clients, start_stride], or one for all with stride 0: what the clients downloaded */
    int64_t start_stride;
    int64_t first, last; /* whether x is to be filled from `start` before these steps, and to have it taken off after */
    uint8_t *finite;     /* [clients], with `last`: whether what is left then is finite everywhere */
    const extras_t *extras;   /* if steps are more than plain ones */
    float *velocity;          /* [clients, x_stride], with momentum; 0 before a client's first step */
    int (*interrupted)(void); /* whether the work is to be left as it is; asked now and then */
} work_t;

/* Products of an example with a parameter between two such questions: they take well under a second. */
enum { UNASKED = 1 << 30 };

/* What stays in a cache while it is used: columns of a product's tiles, and rows of its left side at a time; numbers of
 * a sum's right side, and columns of it at a time where that is too large. SPAN shows in the bits, the others do not.
 */
enum { SPAN = 1024, CHUNK = 125, STRIPE = 65536, STRIPE_WIDTH = 80 };

/* Some columns of a matrix, laid side by side. */
typedef struct {
    float *values; /* [terms, STRIPE_WIDTH] */
    const float **rows;
} stripe_t;

/* How far rows of activations are apart: full blocks of lanes, and no power of two, whose rows share places in the
 * caches. */
static inline int64_t padded(int64_t columns) { return ((columns + 15) / 16 | 1) * 16; }
