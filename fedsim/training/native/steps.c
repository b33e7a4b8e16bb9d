/* The Python module: which instruction sets this machine has, a chain of layers, work done on it, and a layer alone.
 *
 * Tensors come as addresses. Whoever calls keeps them alive, dense and of the right type; what can be wrong with their
 * contents (an example that is not there, a class that is not there) is looked at here before anything is changed. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "chain.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_VARIANTS
#endif

/* Memory of one step, used again by the next. */
typedef struct {
    const float ***rows; /* for each layer, where each example of what goes into it begins */
    float **after;       /* for each layer [size, outputs padded]: what comes out of it */
    float **slope;       /* for each layer [size, outputs padded]: how the loss changes with that */
    const float **weights, **slopes;
    float *scale, *ones;
    stripe_t stripe;
    float *gradient; /* [parameters], where steps are more than plain ones */
} scratch_t;

#ifdef HAS_VARIANTS
#include "avx512.h"
#include "products.h"
#include "steps.h"

#include "avx2.h"
#include "products.h"
#include "steps.h"
#endif

/* What there is for every instruction set. */
typedef struct {
    const char *name;
    int (*train)(const chain_t *, const work_t *, scratch_t *);
    void (*forward)(const layer_t *, const float *, const float *const *, int64_t, float *);
    void (*slope_below)(const layer_t *, const float *, const float *, int64_t, int64_t, float *, int64_t, scratch_t *);
    void (*gradient)(const layer_t *, float *, int, const float *, int64_t, const float *const *, int64_t, scratch_t *);
} variant_t;

typedef struct {
    chain_t chain;
    int64_t examples;
    const variant_t *variant;
} kept_t;

/* ---- memory ----------------------------------------------------------------------------------------- */

static void free_scratch(scratch_t *scratch, int64_t layers) {
    for (int64_t l = 0; l < layers; l++) {
        if (scratch->rows)
            free(scratch->rows[l]);
        if (scratch->after)
            free(scratch->after[l]);
        if (scratch->slope)
            free(scratch->slope[l]);
    }
    free(scratch->rows), free(scratch->after), free(scratch->slope);
    free(scratch->weights), free(scratch->slopes), free(scratch->scale), free(scratch->ones), free(scratch->gradient);
    free(scratch->stripe.values), free(scratch->stripe.rows);
}

/* Whether there was memory for batches of `size` examples, and for a gradient if one is to be kept. */
static int make_scratch(scratch_t *scratch, const chain_t *chain, int64_t size, int gradient) {
    const size_t layers = (size_t)chain->layers, rows = (size_t)size;
    size_t widest = 0;
    memset(scratch, 0, sizeof *scratch);
    scratch->rows = calloc(layers, sizeof *scratch->rows);
    scratch->after = calloc(layers, sizeof *scratch->after);
    scratch->slope = calloc(layers, sizeof *scratch->slope);
    if (!scratch->rows || !scratch->after || !scratch->slope)
        return 0;
    for (size_t l = 0; l < layers; l++) {
        const size_t width = (size_t)padded(chain->layer[l].outputs);
        if (width > widest)
            widest = width;
        scratch->rows[l] = calloc(rows, sizeof **scratch->rows);
        scratch->after[l] = calloc(rows * width, sizeof(float));
        scratch->slope[l] = calloc(rows * width, sizeof(float));
        if (!scratch->rows[l] || !scratch->after[l] || !scratch->slope[l])
            return 0;
        for (size_t m = 0; l && m < rows; m++) {
            scratch->rows[l][m] = scratch->after[l - 1] + m * (size_t)padded(chain->layer[l].inputs);
        }
    }
    scratch->weights = calloc(widest, sizeof *scratch->weights);
    scratch->slopes = calloc(rows, sizeof *scratch->slopes);
    scratch->scale = calloc(rows, sizeof *scratch->scale);
    scratch->ones = calloc(1, sizeof *scratch->ones);
    const size_t terms = widest > rows ? widest : rows;
    scratch->stripe.values = malloc(terms * STRIPE_WIDTH * sizeof(float));
    scratch->stripe.rows = calloc(terms, sizeof *scratch->stripe.rows);
    if (!scratch->weights || !scratch->slopes || !scratch->scale || !scratch->ones || !scratch->stripe.values ||
        !scratch->stripe.rows)
        return 0;
    scratch->ones[0] = 1.0f;
    if (gradient)
        scratch->gradient = malloc((size_t)chain->parameters * sizeof *scratch->gradient);
    return !gradient || scratch->gradient;
}

/* ---- instruction sets -------------------------------------------------------------------------------- */

#ifdef HAS_VARIANTS
static const variant_t VARIANTS[] = {
    {"avx512", train_avx512, forward_avx512, slope_below_avx512, gradient_avx512},
    {"avx2", train_avx2, forward_avx2, slope_below_avx2, gradient_avx2},
};
#endif

/* The one of this name, if the machine has it; else an exception, and NULL. */
static const variant_t *variant(const char *name) {
#ifdef HAS_VARIANTS
    __builtin_cpu_init();
    const int here[] = {__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl"),
                        1};
    for (size_t i = 0; i < sizeof VARIANTS / sizeof *VARIANTS; i++) {
        if (!strcmp(name, VARIANTS[i].name) && here[i] && __builtin_cpu_supports("fma") &&
            __builtin_cpu_supports("avx2")) {
            return VARIANTS + i;
        }
    }
#endif
    return PyErr_Format(PyExc_ValueError, "this machine has no instruction set '%s'", name), NULL;
}

static PyObject *variants(PyObject *module, PyObject *none) {
    PyObject *found = PyList_New(0);
#ifdef HAS_VARIANTS
    for (size_t i = 0; found && i < sizeof VARIANTS / sizeof *VARIANTS; i++) {
        if (!variant(VARIANTS[i].name)) {
            PyErr_Clear();
            continue;
        }
        PyObject *name = PyUnicode_FromString(VARIANTS[i].name);
        if (!name || PyList_Append(found, name))
            Py_CLEAR(found);
        Py_XDECREF(name);
    }
#endif
    return found;
}

/* ---- chains ------------------------------------------------------------------------------------------ */

static const char KEPT[] = "fedsim.training.native.chain";

static void free_kept(PyObject *capsule) {
    kept_t *kept = PyCapsule_GetPointer(capsule, KEPT);
    if (kept)
        free((void *)kept->chain.layer);
    free(kept);
}

static PyObject *chain(PyObject *module, PyObject *args) {
    const char *name;
    unsigned long long layers, inputs, targets;
    long long parameters, count, loss, examples;
    if (!PyArg_ParseTuple(args, "sLKLLKKL", &name, &parameters, &layers, &count, &loss, &inputs, &targets, &examples))
        return NULL;
    const variant_t *found = variant(name);
    if (!found)
        return NULL;
    kept_t *kept = calloc(1, sizeof *kept);
    layer_t *layer = kept ? malloc((size_t)count * sizeof *layer) : NULL;
    if (!layer) {
        free(kept);
        return PyErr_NoMemory();
    }
    memcpy(layer, (const void *)(uintptr_t)layers, (size_t)count * sizeof *layer);
    kept->chain =
        (chain_t){parameters, count, layer, loss, (const float *)(uintptr_t)inputs, (const void *)(uintptr_t)targets};
    kept->examples = examples;
    kept->variant = found;
    return PyCapsule_New(kept, KEPT, free_kept);
}

/* ---- work -------------------------------------------------------------------------------------------- */

/* The first place whose example, or whose class, is not there; -1 if all are. */
static int64_t wrong_place(const kept_t *kept, const work_t *work) {
    const int64_t classes = kept->chain.loss == CROSS_ENTROPY ? kept->chain.layer[kept->chain.layers - 1].outputs : 0;
    for (int64_t i = 0; i < work->steps * work->clients * work->size; i++) {
        const int64_t example = work->rows[i];
        if (example < 0 || example >= kept->examples)
            return i;
        if (!classes)
            continue;
        const int64_t target = ((const int64_t *)kept->chain.targets)[example];
        if (target < 0 || target >= classes)
            return i;
    }
    return -1;
}

/* Whether a signal's handler has raised an exception, a second Ctrl-C say. */
static int interrupted(void) {
    const PyGILState_STATE state = PyGILState_Ensure();
    const int raised = PyErr_CheckSignals();
    PyGILState_Release(state);
    return raised;
}

static PyObject *train(PyObject *module, PyObject *args) {
    PyObject *capsule;
    unsigned long long rows, scale, running, rate, x, out, start, finite, velocity;
    long long clients, steps, size, x_stride, out_stride, start_stride, first, last, more;
    extras_t extras;
    if (!PyArg_ParseTuple(args, "O(LLL)(KKK)K(KL)(KL)(KLLLK)(LffffK)", &capsule, &steps, &clients, &size, &rows, &scale,
                          &running, &rate, &x, &x_stride, &out, &out_stride, &start, &start_stride, &first, &last,
                          &finite, &more, &extras.clip, &extras.weight_decay, &extras.prox, &extras.momentum,
                          &velocity)) {
        return NULL;
    }
    const kept_t *kept = PyCapsule_GetPointer(capsule, KEPT);
    if (!kept)
        return NULL;
    const work_t work = {
        clients,
        steps,
        size,
        (const int64_t *)(uintptr_t)rows,
        (const float *)(uintptr_t)scale,
        (const int64_t *)(uintptr_t)running,
        (const float *)(uintptr_t)rate,
        (float *)(uintptr_t)x,
        x_stride,
        (float *)(uintptr_t)out,
        out_stride,
        (const float *)(uintptr_t)start,
        start_stride,
        first,
        last,
        (uint8_t *)(uintptr_t)finite,
        more ? &extras : NULL,
        (float *)(uintptr_t)velocity,
        interrupted,
    };
    int64_t wrong = -1;
    int made, done = 1;
    scratch_t scratch;
    Py_BEGIN_ALLOW_THREADS made = make_scratch(&scratch, &kept->chain, size, work.extras != NULL);
    if (made)
        wrong = wrong_place(kept, &work);
    if (made && wrong < 0)
        done = kept->variant->train(&kept->chain, &work, &scratch);
    free_scratch(&scratch, kept->chain.layers);
    Py_END_ALLOW_THREADS if (!made) return PyErr_NoMemory();
    if (!done)
        return NULL;
    if (wrong >= 0)
        return PyErr_Format(PyExc_IndexError, "example %lld, or its class, is not there", (long long)work.rows[wrong]);
    Py_RETURN_NONE;
}

/* ---- a layer alone ----------------------------------------------------------------------------------- */

/* What both ways through a layer need. */
typedef struct {
    const variant_t *variant;
    layer_t layer;
    int64_t size;
    float *x;
    scratch_t scratch;
} pass_t;

/* A pass from (variant, (inputs, outputs, weight, bias), size, x, (a, stride)): whether it could be made. If not, there
 * is an exception; else its scratch is to be freed. */
static int make_pass(pass_t *pass, PyObject *told) {
    const char *name;
    unsigned long long x, a;
    long long inputs, outputs, weight, bias, size, stride;
    if (!PyArg_ParseTuple(told, "s(LLLL)LK(KL)", &name, &inputs, &outputs, &weight, &bias, &size, &x, &a, &stride) ||
        !(pass->variant = variant(name)))
        return 0;
    pass->layer = (layer_t){inputs, outputs, weight, bias, NO_ACTIVATION};
    pass->size = size;
    pass->x = (float *)(uintptr_t)x;
    const chain_t alone = {.layers = 1, .layer = &pass->layer};
    if (!make_scratch(&pass->scratch, &alone, size, 0)) {
        free_scratch(&pass->scratch, 1);
        PyErr_NoMemory();
        return 0;
    }
    for (int64_t m = 0; m < size; m++)
        pass->scratch.rows[0][m] = (const float *)(uintptr_t)a + m * stride;
    return 1;
}

static PyObject *forward(PyObject *module, PyObject *args) {
    PyObject *told;
    unsigned long long out;
    pass_t pass;
    if (!PyArg_ParseTuple(args, "O!K", &PyTuple_Type, &told, &out) || !make_pass(&pass, told))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    pass.variant->forward(&pass.layer, pass.x, pass.scratch.rows[0], pass.size, (float *)(uintptr_t)out);
    free_scratch(&pass.scratch, 1);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *backward(PyObject *module, PyObject *args) {
    PyObject *told;
    unsigned long long slope, below, to;
    long long stride, take_off;
    float factor;
    pass_t pass;
    if (!PyArg_ParseTuple(args, "O!(KL)K(KLf)", &PyTuple_Type, &told, &slope, &stride, &below, &to, &take_off, &factor) ||
        !make_pass(&pass, told))
        return NULL;
    const layer_t *layer = &pass.layer;
    const float *d = (const float *)(uintptr_t)slope;
    float *scaled = pass.scratch.slope[0];
    const int64_t width = padded(layer->outputs);
    Py_BEGIN_ALLOW_THREADS;
    if (below)
        pass.variant->slope_below(layer, pass.x, d, stride, pass.size, (float *)(uintptr_t)below, layer->inputs,
                                  &pass.scratch);
    for (int64_t m = 0; m < pass.size; m++) {
        for (int64_t n = 0; n < layer->outputs; n++)
            scaled[m * width + n] = factor * d[m * stride + n];
    }
    pass.variant->gradient(layer, (float *)(uintptr_t)to, take_off != 0, scaled, width, pass.scratch.rows[0], pass.size,
                           &pass.scratch);
    free_scratch(&pass.scratch, 1);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"variants", variants, METH_NOARGS, "Names of the instruction sets this machine has, the fastest first."},
    {"chain", chain, METH_VARARGS,
     "chain(variant, parameters, layers, count, loss, inputs, targets, examples): what train() works on."},
    {"train", train, METH_VARARGS,
     "train(chain, (steps, clients, size), (rows, scale, running), rate, (x, stride), (out, stride), (start, stride, "
     "first, last, finite), "
     "(more, clip, weight_decay, prox, momentum, velocity)): see work_t."},
    {"forward", forward, METH_VARARGS,
     "forward((variant, (inputs, outputs, weight, bias), size, x, (a, stride)), out): out [size, padded outputs] = "
     "a W^T + b."},
    {"backward", backward, METH_VARARGS,
     "backward((as for forward), (d, stride), below, (to, take_off, factor)): below [size, inputs] = d W unless it is 0; "
     "then the gradient, times the factor, is written to where parameters like x lie, or taken off them."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_steps", "Local steps on chains of linear layers.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__steps(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "REVISION", REVISION))
        Py_CLEAR(module);
    return module;
}
