/* The arithmetic of routing in C: token ids -> vector, cosines -> weights, clusters -> scores -> chosen row.

   router_core/kernels.py has the same in NumPy and says what each part computes. Every operation is done in the same
   precision and the same order here, so that both give the same bits. Compile with -ffp-contract=off, as hatch_build.py
   does: a fused multiply-add rounds once where NumPy rounds twice. Sums along a row are pairwise, as NumPy's are.

   Nothing is read or written outside of what a buffer says it has: formats, shapes, token ids, clusters and rows are
   checked before they are used. All work is done with the GIL held and runs no Python code once the buffers are taken,
   so that the scratch memory of an object serves one call at a time. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

/* As BATCH_ROWS in kernels.py: so many rows are added up before their sum is added to that of the rows before. */
#define BATCH_ROWS 256
/* NumPy adds up blocks of so many values at once. */
#define PAIRWISE_BLOCK 128

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)(address))
#endif

#define CACHE_LINE 64

/* Of this file, so that a part that was compiled from another version of it is told apart. */
#ifndef SOURCE_SHA256
#define SOURCE_SHA256 ""
#endif

/* ---- buffers ---- */

/* Take a C-contiguous buffer of values of one of `formats`, in native byte order; `length` < 0: of any length. */
static int
take(PyObject *object, Py_buffer *view, const char *name, const char *formats, Py_ssize_t itemsize, int dimensions,
     Py_ssize_t length, int writable)
{
    int flags = PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);

    if (PyObject_GetBuffer(object, view, flags) < 0) {
        return -1;
    }
    if (view->format == NULL || view->format[0] == '\0' || view->format[1] != '\0' ||
        strchr(formats, view->format[0]) == NULL || view->itemsize != itemsize) {
        PyErr_Format(PyExc_TypeError, "%s must hold values of the format %s, of %zd bytes each", name, formats,
                     itemsize);
    }
    else if (view->ndim != dimensions && dimensions > 0) {
        PyErr_Format(PyExc_ValueError, "%s must have %d dimensions, not %d", name, dimensions, view->ndim);
    }
    else if (length >= 0 && view->len != length * itemsize) {
        PyErr_Format(PyExc_ValueError, "%s must hold %zd values, not %zd", name, length, view->len / itemsize);
    }
    else {
        return 0;
    }
    PyBuffer_Release(view);
    view->obj = NULL;
    return -1;
}

#define FLOATS "f"
#define DOUBLES "d"
#define TOKENS "IL"   /* uint32 */
#define INTEGERS "lq" /* int64 */
#define BOOLEANS "?"
#define ANY_SHAPE 0

/* ---- sums as NumPy's ---- */

#define PAIRWISE_SUM(NAME, TYPE)                                                                                      \
    static TYPE NAME(const TYPE *values, Py_ssize_t count)                                                            \
    {                                                                                                                 \
        if (count < 8) {                                                                                              \
            TYPE sum = 0;                                                                                             \
            for (Py_ssize_t i = 0; i < count; i++) {                                                                  \
                sum += values[i];                                                                                     \
            }                                                                                                         \
            return sum;                                                                                               \
        }                                                                                                             \
        if (count <= PAIRWISE_BLOCK) {                                                                                \
            TYPE sums[8];                                                                                             \
            Py_ssize_t i;                                                                                             \
            memcpy(sums, values, sizeof sums);                                                                        \
            for (i = 8; i < count - count % 8; i += 8) {                                                              \
                for (int j = 0; j < 8; j++) {                                                                         \
                    sums[j] += values[i + j];                                                                         \
                }                                                                                                     \
            }                                                                                                         \
            TYPE sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));     \
            for (; i < count; i++) {                                                                                  \
                sum += values[i];                                                                                     \
            }                                                                                                         \
            return sum;                                                                                               \
        }                                                                                                             \
        Py_ssize_t half = count / 2;                                                                                  \
        half -= half % 8;                                                                                             \
        return NAME(values, half) + NAME(values + half, count - half);                                                \
    }

PAIRWISE_SUM(sum_of_floats, float)
PAIRWISE_SUM(sum_of_doubles, double)

/* ---- token ids -> vector ---- */

typedef struct {
    PyObject_HEAD
    Py_buffer rows;
    Py_ssize_t tokens, dimension;
    float *scratch; /* a batch's sum, then the vector */
} TokenTable;

static PyObject *
table_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"rows", NULL};
    PyObject *rows;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:TokenTable", names, &rows)) {
        return NULL;
    }
    TokenTable *self = (TokenTable *)PyType_GenericAlloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    if (take(rows, &self->rows, "rows", FLOATS, sizeof(float), 2, -1, 0) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    self->tokens = self->rows.shape[0];
    self->dimension = self->rows.shape[1];
    self->scratch = PyMem_Calloc(2 * (size_t)self->dimension + 1, sizeof(float));
    if (self->scratch == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void
table_dealloc(TokenTable *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);

    if (self->rows.obj != NULL) {
        PyBuffer_Release(&self->rows);
    }
    PyMem_Free(self->scratch);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static void
prefetch_row(const float *row, Py_ssize_t dimension)
{
    const char *start = (const char *)row;

    for (Py_ssize_t at = 0; at < dimension * (Py_ssize_t)sizeof(float); at += CACHE_LINE) {
        PREFETCH(start + at);
    }
}

/* Add up `count` rows, one after the other. Four at a time save loads and stores, and wait for memory together. */
static void
add_rows(const float *restrict table, Py_ssize_t dimension, const uint32_t *ids, Py_ssize_t count,
         float *restrict sum)
{
    Py_ssize_t i = 0;

    memset(sum, 0, (size_t)dimension * sizeof(float));
    for (; i + 4 <= count; i += 4) {
        const float *restrict a = table + (Py_ssize_t)ids[i] * dimension;
        const float *restrict b = table + (Py_ssize_t)ids[i + 1] * dimension;
        const float *restrict c = table + (Py_ssize_t)ids[i + 2] * dimension;
        const float *restrict d = table + (Py_ssize_t)ids[i + 3] * dimension;
        for (Py_ssize_t next = i + 4; next < count && next < i + 8; next++) {
            prefetch_row(table + (Py_ssize_t)ids[next] * dimension, dimension);
        }
        for (Py_ssize_t j = 0; j < dimension; j++) {
            sum[j] = (((sum[j] + a[j]) + b[j]) + c[j]) + d[j];
        }
    }
    for (; i < count; i++) {
        const float *restrict row = table + (Py_ssize_t)ids[i] * dimension;
        for (Py_ssize_t j = 0; j < dimension; j++) {
            sum[j] += row[j];
        }
    }
}

static PyObject *
table_embed(TokenTable *self, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer ids, out;
    PyObject *result = NULL;
    const Py_ssize_t dimension = self->dimension;
    float *vector = self->scratch, *batch = self->scratch + dimension;

    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "embed(ids, out) takes two arguments");
        return NULL;
    }
    if (take(args[0], &ids, "ids", TOKENS, sizeof(uint32_t), 1, -1, 0) < 0) {
        return NULL;
    }
    if (take(args[1], &out, "out", FLOATS, sizeof(float), ANY_SHAPE, dimension, 1) < 0) {
        PyBuffer_Release(&ids);
        return NULL;
    }
    const uint32_t *tokens = ids.buf;
    const Py_ssize_t length = ids.len / (Py_ssize_t)sizeof(uint32_t);
    for (Py_ssize_t i = 0; i < length; i++) {
        if ((Py_ssize_t)tokens[i] >= self->tokens) {
            PyErr_Format(PyExc_IndexError, "token %u is not in a table of %zd rows", tokens[i], self->tokens);
            goto done;
        }
    }
    memset(vector, 0, (size_t)dimension * sizeof(float));
    for (Py_ssize_t start = 0; start < length; start += BATCH_ROWS) {
        const Py_ssize_t left = length - start;
        add_rows(self->rows.buf, dimension, tokens + start, left < BATCH_ROWS ? left : BATCH_ROWS, batch);
        for (Py_ssize_t j = 0; j < dimension; j++) {
            vector[j] += batch[j];
        }
    }
    for (Py_ssize_t j = 0; j < dimension; j++) {
        batch[j] = vector[j] * vector[j];
    }
    const float norm = sqrtf(sum_of_floats(batch, dimension));
    if (norm > 0) {
        for (Py_ssize_t j = 0; j < dimension; j++) {
            vector[j] /= norm;
        }
    }
    memcpy(out.buf, vector, (size_t)dimension * sizeof(float));
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&ids);
    PyBuffer_Release(&out);
    return result;
}

/* ---- cosines -> weights ---- */

PyDoc_STRVAR(softmax_doc, "softmax(cosines, temperature)\n--\n\n"
             "Return exp((cosine - first cosine) / temperature) of each, as float32 bytes that sum to one.");

static PyObject *
softmax(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    Py_buffer cosines;

    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "softmax(cosines, temperature) takes two arguments");
        return NULL;
    }
    const double temperature = PyFloat_AsDouble(args[1]);
    if (temperature == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    if (take(args[0], &cosines, "cosines", FLOATS, sizeof(float), ANY_SHAPE, -1, 0) < 0) {
        return NULL;
    }
    const float *nearest = cosines.buf;
    const Py_ssize_t clusters = cosines.len / (Py_ssize_t)sizeof(float);
    double *exponents = PyMem_Calloc((size_t)clusters + 1, sizeof(double));
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, cosines.len);
    if (exponents != NULL && bytes != NULL) {
        float *weights = (float *)PyBytes_AsString(bytes);
        double sum = 0;
        for (Py_ssize_t k = 0; k < clusters; k++) {
            exponents[k] = exp(((double)nearest[k] - (double)nearest[0]) / temperature);
            sum += exponents[k];
        }
        for (Py_ssize_t k = 0; k < clusters; k++) {
            weights[k] = (float)(exponents[k] / sum);
        }
    }
    else {
        Py_CLEAR(bytes);
        PyErr_NoMemory();
    }
    PyMem_Free(exponents);
    PyBuffer_Release(&cosines);
    return bytes;
}

/* ---- clusters -> scores -> row ---- */

/* The columns of a pool, at one tier of its prices. */
enum { BY_CLUSTER, OUTPUT_CAPS, INPUT, OUTPUT, CACHED, PROFILED, COLUMNS };

typedef struct {
    PyObject_HEAD
    Py_buffer columns[COLUMNS];
    Py_ssize_t clusters, models;
    Py_ssize_t width; /* of BY_CLUSTER: errors, tokens and, if it is three times the models, seconds */
    double *scratch;  /* the expected values of these, USD, and tokens that are summed up; (M,) each */
} Scorer;

/* What ScoringTerms in kernels.py holds, in its order. */
enum {
    PROMPT_TOKENS,
    MAX_OUTPUT_TOKENS,
    ANSWERS,
    CACHED_ROW,
    CACHED_TOKENS,
    LATENCY_WEIGHT,
    LAMBDA,
    INPUT_REFERENCE,
    OUTPUT_REFERENCE,
    UNIT,
    TIE,
    TERMS
};

static PyObject *
scorer_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {
        "by_cluster", "output_caps", "input_price", "output_price", "cached_price", "profiled", NULL,
    };
    PyObject *given[COLUMNS];

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOOO:Scorer", names, &given[BY_CLUSTER], &given[OUTPUT_CAPS],
                                     &given[INPUT], &given[OUTPUT], &given[CACHED], &given[PROFILED])) {
        return NULL;
    }
    Scorer *self = (Scorer *)PyType_GenericAlloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    for (int at = BY_CLUSTER; at <= OUTPUT_CAPS; at++) {
        const int dimensions = at == BY_CLUSTER ? 2 : 1;
        if (take(given[at], &self->columns[at], names[at], DOUBLES, sizeof(double), dimensions, -1, 0) < 0) {
            goto failed;
        }
    }
    self->clusters = self->columns[BY_CLUSTER].shape[0];
    self->width = self->columns[BY_CLUSTER].shape[1];
    self->models = self->columns[OUTPUT_CAPS].shape[0];
    if (self->width != 2 * self->models && self->width != 3 * self->models) {
        PyErr_SetString(PyExc_ValueError, "by_cluster must have two or three columns for each model");
        goto failed;
    }
    for (int at = INPUT; at < PROFILED; at++) {
        if (take(given[at], &self->columns[at], names[at], DOUBLES, sizeof(double), 1, self->models, 0) < 0) {
            goto failed;
        }
    }
    if (take(given[PROFILED], &self->columns[PROFILED], names[PROFILED], BOOLEANS, 1, 1, self->models, 0) < 0) {
        goto failed;
    }
    self->scratch = PyMem_Calloc(5 * (size_t)self->models + 1, sizeof(double));
    if (self->scratch == NULL) {
        PyErr_NoMemory();
        goto failed;
    }
    return (PyObject *)self;
failed:
    Py_DECREF(self);
    return NULL;
}

static void
scorer_dealloc(Scorer *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);

    for (int at = 0; at < COLUMNS; at++) {
        if (self->columns[at].obj != NULL) {
            PyBuffer_Release(&self->columns[at]);
        }
    }
    PyMem_Free(self->scratch);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* As NumPy's minimum: NaN if the value is NaN. */
static double
at_most(double value, double limit)
{
    return value < limit || value != value ? value : limit;
}

/* Add up the rows of the clusters, each times its weight, one after the other. */
static void
expect(const double *restrict by_cluster, Py_ssize_t width, const int64_t *ids, const float *weights, Py_ssize_t count,
       double *restrict expected)
{
    Py_ssize_t k = 0;

    memset(expected, 0, (size_t)width * sizeof(double));
    for (; k + 4 <= count; k += 4) {
        const double *restrict a = by_cluster + ids[k] * width, *restrict b = by_cluster + ids[k + 1] * width;
        const double *restrict c = by_cluster + ids[k + 2] * width, *restrict d = by_cluster + ids[k + 3] * width;
        const double p = weights[k], q = weights[k + 1], r = weights[k + 2], s = weights[k + 3];
        for (Py_ssize_t j = 0; j < width; j++) {
            expected[j] = (((expected[j] + a[j] * p) + b[j] * q) + c[j] * r) + d[j] * s;
        }
    }
    for (; k < count; k++) {
        const double *restrict row = by_cluster + ids[k] * width;
        const double weight = weights[k];
        for (Py_ssize_t j = 0; j < width; j++) {
            expected[j] += row[j] * weight;
        }
    }
}

/* Fill `usd`, (M,), and return the USD that a cost of one is. */
static double
price(const Scorer *self, const double *terms, const double *tokens, double *restrict usd, double *restrict summed)
{
    const double *caps = self->columns[OUTPUT_CAPS].buf, *input = self->columns[INPUT].buf;
    const double *output = self->columns[OUTPUT].buf, *cached = self->columns[CACHED].buf;
    const unsigned char *profiled = self->columns[PROFILED].buf;
    const Py_ssize_t row = (Py_ssize_t)terms[CACHED_ROW];
    Py_ssize_t counted = 0;

    for (Py_ssize_t m = 0; m < self->models; m++) {
        const double capped = at_most(at_most(tokens[m], caps[m]), terms[MAX_OUTPUT_TOKENS]);
        const double billed = capped * terms[ANSWERS];
        usd[m] = input[m] * terms[PROMPT_TOKENS] + output[m] * billed;
        if (profiled[m]) {
            summed[counted++] = billed;
        }
        if (m == row) {
            const double fresh = terms[PROMPT_TOKENS] - terms[CACHED_TOKENS];
            usd[m] = (input[m] * fresh + cached[m] * terms[CACHED_TOKENS]) + output[m] * billed;
        }
    }
    if (terms[UNIT] > 0) {
        return terms[UNIT];
    }
    const double mean = counted ? sum_of_doubles(summed, counted) / (double)counted : 0.0;
    const double prompt_tokens = terms[PROMPT_TOKENS] > 1 ? terms[PROMPT_TOKENS] : 1.0;
    return prompt_tokens * terms[INPUT_REFERENCE] + mean * terms[OUTPUT_REFERENCE];
}

/* Return the place of the cheapest among those within `tie` of the best score; of equals, the first. */
static Py_ssize_t
argmin_with_ties(const double *scores, const double *costs, Py_ssize_t count, double tie)
{
    double best = scores[0], least = 0;
    Py_ssize_t chosen = -1;

    for (Py_ssize_t k = 1; k < count; k++) {
        if (scores[k] < best || scores[k] != scores[k]) {
            best = scores[k];
        }
        if (best != best) {
            return 0;
        }
    }
    for (Py_ssize_t k = 0; k < count; k++) {
        const double cost = scores[k] <= best + tie ? costs[k] : (double)INFINITY;
        if (chosen < 0 || cost < least || cost != cost) {
            chosen = k;
            least = cost;
        }
        if (least != least) {
            break;
        }
    }
    return chosen;
}

/* Errors, costs, scores and USD. */
#define FIGURES 4

/* Add to (M,) errors what (M,) doubts of the same models say, up to one. `added`: memory for as many. */
static void
add_doubts(double *restrict errors, const double *doubts, double *restrict added, Py_ssize_t models)
{
    memset(added, 0, (size_t)models * sizeof(double));
    for (Py_ssize_t s = 0; s < models; s++) {
        if (doubts[s] == 0) {
            continue;
        }
        const double more = doubts[s] * (1.0 - errors[s]);
        for (Py_ssize_t m = 0; m < models; m++) {
            /* As NumPy's maximum: NaN if either is. */
            if ((m == s || errors[m] > errors[s]) && (more > added[m] || more != more)) {
                added[m] = more;
            }
        }
    }
    for (Py_ssize_t m = 0; m < models; m++) {
        errors[m] = at_most(errors[m] + added[m], 1.0);
    }
}

/* Fill `out`, (FIGURES, m), with errors, costs, scores and USD of the rows, and return the place of the chosen one.
   `doubts`: (M,) shares of what each model is expected to get right that count as errors, or NULL. */
static Py_ssize_t
score(const Scorer *self, const double *terms, const int64_t *ids, const float *weights, Py_ssize_t count,
      const int64_t *rows, const double *doubts, Py_ssize_t models, double *restrict out)
{
    double *expected = self->scratch, *seconds = expected + 2 * self->models, *usd = seconds + self->models;
    const double latency_weight = terms[LATENCY_WEIGHT]; /* 0 where there are no seconds */
    double *errors = out, *costs = out + models, *scores = out + 2 * models, *paid = out + 3 * models;

    expect(self->columns[BY_CLUSTER].buf, self->width, ids, weights, count, expected);
    const double unit = price(self, terms, expected + self->models, usd, usd + self->models);
    if (doubts != NULL) {
        add_doubts(expected, doubts, usd + self->models, self->models);
    }
    for (Py_ssize_t k = 0; k < models; k++) {
        const Py_ssize_t m = rows == NULL ? k : (Py_ssize_t)rows[k];
        double total = usd[m];
        if (latency_weight != 0) {
            total += latency_weight * seconds[m];
        }
        errors[k] = expected[m];
        paid[k] = usd[m];
        costs[k] = total / unit;
        scores[k] = isinf(terms[LAMBDA]) ? costs[k] : errors[k] + terms[LAMBDA] * costs[k];
    }
    return argmin_with_ties(scores, costs, models, terms[TIE]);
}

/* Whether all of `values` are from 0 to below `end`. */
static int
within(const int64_t *values, Py_ssize_t count, Py_ssize_t end, const char *what)
{
    for (Py_ssize_t k = 0; k < count; k++) {
        if (values[k] < 0 || values[k] >= end) {
            PyErr_Format(PyExc_IndexError, "there is no %s %lld", what, (long long)values[k]);
            return 0;
        }
    }
    return 1;
}

/* Read the numbers of a tuple. */
static int
read_terms(PyObject *tuple, double *terms)
{
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != TERMS) {
        PyErr_Format(PyExc_TypeError, "terms must be a tuple of %d numbers", TERMS);
        return -1;
    }
    for (int at = 0; at < TERMS; at++) {
        terms[at] = PyFloat_AsDouble(PyTuple_GetItem(tuple, at));
        if (terms[at] == -1.0 && PyErr_Occurred()) {
            return -1;
        }
    }
    return 0;
}

PyDoc_STRVAR(choose_doc,
             "choose(ids, weights, rows, terms, doubts=None)\n--\n\n"
             "Return the place of the chosen row, and the errors, costs, scores and USD of the rows as float64 bytes.");

static PyObject *
scorer_choose(Scorer *self, PyObject *const *args, Py_ssize_t count)
{
    enum { IDS, WEIGHTS, ROWS, GIVEN_TERMS, DOUBTS, ARGUMENTS };
    Py_buffer views[ARGUMENTS] = {{0}};
    double terms[TERMS];
    Py_ssize_t models = self->models;
    PyObject *result = NULL;

    if (count != DOUBTS && count != ARGUMENTS) {
        PyErr_SetString(PyExc_TypeError, "choose(ids, weights, rows, terms, doubts=None) takes four or five arguments");
        return NULL;
    }
    if (read_terms(args[GIVEN_TERMS], terms) < 0) {
        return NULL;
    }
    /* Written so that NaN is refused. */
    if (!(terms[CACHED_ROW] >= -1 && terms[CACHED_ROW] < (double)models)) {
        PyErr_SetString(PyExc_IndexError, "there is no such cached_row");
        return NULL;
    }
    if (terms[LATENCY_WEIGHT] != 0 && self->width == 2 * self->models) {
        PyErr_SetString(PyExc_ValueError, "a latency weight needs the columns of seconds");
        return NULL;
    }
    if (take(args[IDS], &views[IDS], "ids", INTEGERS, sizeof(int64_t), ANY_SHAPE, -1, 0) < 0) {
        return NULL;
    }
    const Py_ssize_t placed = views[IDS].len / (Py_ssize_t)sizeof(int64_t);
    if (take(args[WEIGHTS], &views[WEIGHTS], "weights", FLOATS, sizeof(float), ANY_SHAPE, placed, 0) < 0) {
        goto done;
    }
    if (count == ARGUMENTS && args[DOUBTS] != Py_None &&
        take(args[DOUBTS], &views[DOUBTS], "doubts", DOUBLES, sizeof(double), 1, self->models, 0) < 0) {
        goto done;
    }
    if (args[ROWS] != Py_None) {
        if (take(args[ROWS], &views[ROWS], "rows", INTEGERS, sizeof(int64_t), 1, -1, 0) < 0) {
            goto done;
        }
        models = views[ROWS].len / (Py_ssize_t)sizeof(int64_t);
    }
    if (models == 0) {
        PyErr_SetString(PyExc_ValueError, "there is no row to choose from");
        goto done;
    }
    if (!within(views[IDS].buf, placed, self->clusters, "cluster") ||
        (views[ROWS].obj != NULL && !within(views[ROWS].buf, models, self->models, "row"))) {
        goto done;
    }
    PyObject *figures = PyBytes_FromStringAndSize(NULL, FIGURES * models * (Py_ssize_t)sizeof(double));
    if (figures == NULL) {
        goto done;
    }
    /* The memory of bytes is aligned for any type. */
    const Py_ssize_t chosen = score(self, terms, views[IDS].buf, views[WEIGHTS].buf, placed, views[ROWS].buf,
                                    views[DOUBTS].buf, models, (double *)(void *)PyBytes_AsString(figures));
    result = Py_BuildValue("nN", chosen, figures);
done:
    for (int at = 0; at < ARGUMENTS; at++) {
        if (views[at].obj != NULL) {
            PyBuffer_Release(&views[at]);
        }
    }
    return result;
}

/* ---- the module ---- */

PyDoc_STRVAR(embed_doc, "embed(ids, out)\n--\n\n"
             "Write into `out` the unit vector of the sum of the rows `ids`, or zeros.");

static PyMethodDef table_methods[] = {
    {"embed", (PyCFunction)(void (*)(void))table_embed, METH_FASTCALL, embed_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot table_slots[] = {
    {Py_tp_new, table_new},
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_methods, table_methods},
    {0, NULL},
};

static PyType_Spec table_spec = {
    .name = "router_core._compiled.TokenTable",
    .basicsize = sizeof(TokenTable),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = table_slots,
};

static PyMethodDef scorer_methods[] = {
    {"choose", (PyCFunction)(void (*)(void))scorer_choose, METH_FASTCALL, choose_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot scorer_slots[] = {
    {Py_tp_new, scorer_new},
    {Py_tp_dealloc, scorer_dealloc},
    {Py_tp_methods, scorer_methods},
    {0, NULL},
};

static PyType_Spec scorer_spec = {
    .name = "router_core._compiled.Scorer",
    .basicsize = sizeof(Scorer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = scorer_slots,
};

static PyMethodDef functions[] = {
    {"softmax", (PyCFunction)(void (*)(void))softmax, METH_FASTCALL, softmax_doc},
    {NULL, NULL, 0, NULL},
};

static int
fill_module(PyObject *module)
{
    PyType_Spec *specs[] = {&table_spec, &scorer_spec};

    for (int at = 0; at < 2; at++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[at], NULL);
        if (type == NULL) {
            return -1;
        }
        const int added = PyModule_AddType(module, (PyTypeObject *)type);
        Py_DECREF(type);
        if (added < 0) {
            return -1;
        }
    }
    return PyModule_AddStringConstant(module, "SOURCE_SHA256", SOURCE_SHA256);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, fill_module},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "router_core._compiled",
    .m_doc = "The arithmetic of routing in C; see kernels.py.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__compiled(void)
{
    return PyModuleDef_Init(&definition);
}
