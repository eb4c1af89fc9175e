/* Optimizer steps over contiguous float arrays: one pass, no array besides those named.

   `in` holds the parameter and its state, `out` where their new values go: the same pointers
   for a step in place, others for a step that may be given up. `g` is the gradient. Every
   number is rounded as NumPy rounds the formula in the class of the optimizer. */
#ifndef DISTGRAD_OPTIM_KERNELS_H
#define DISTGRAD_OPTIM_KERNELS_H

#include <math.h>
#include <stddef.h>

#include "graph/kernels.h"

/* No element depends on another; `in` and `out` are equal or apart. */
#if defined(__clang__)
#define DG_EACH _Pragma("clang loop vectorize(assume_safety)") for (ptrdiff_t i = 0; i < n; i++)
#elif defined(__GNUC__)
#define DG_EACH _Pragma("GCC ivdep") for (ptrdiff_t i = 0; i < n; i++)
#else
#define DG_EACH for (ptrdiff_t i = 0; i < n; i++)
#endif

/* Settings as Python has them; the kernels round them to their own precision. */
struct dg_rates {
    double lr, decay, eps;      /* step size; weight decay, 0 for none; guard of divisors */
    double keep, take;          /* first running mean: what it keeps, what it takes */
    double keep2, take2;        /* second running mean */
    double scale, rest;         /* of the divisor; what decoupled weight decay leaves (Adam) */
    double low, high;           /* factors that shrink and grow a step size (Rprop) */
    double least, most;         /* bounds of a step size (Rprop) */
    int maximize, nesterov, centered;
    int first;                  /* there is no velocity yet */
};

#define DG_SETTINGS(T)                                                                      \
    const int decay = r->decay != 0, maximize = r->maximize;                                \
    const T lr = (T)r->lr, weight = (T)r->decay, eps = (T)r->eps;                           \
    const T keep = (T)r->keep, take = (T)r->take;                                           \
    const T *old = in[0];                                                                   \
    T *new = out[0];                                                                        \
    (void)eps, (void)keep, (void)take

/* The parameter, and the gradient as all optimizers want it. */
#define DG_DIRECTION(T)                                                                     \
    T p = old[i], d = maximize ? -g[i] : g[i];                                              \
    d = decay ? d + weight * p : d

#define DG_UPDATES(T, suffix, SQRT, FABS)                                                   \
    DG_CLONES void dg_sgd_##suffix(ptrdiff_t n, T **in, T **out, const T *g,    \
                                   const struct dg_rates *r) {                              \
        DG_SETTINGS(T);                                                                     \
        DG_EACH { DG_DIRECTION(T); new[i] = p - lr * d; }                                    \
    }                                                                                       \
                                                                                            \
    /* state: velocity */                                                                   \
    DG_CLONES void dg_momentum_##suffix(ptrdiff_t n, T **in, T **out,           \
                                        const T *g, const struct dg_rates *r) {             \
        DG_SETTINGS(T);                                                                     \
        const int first = r->first, nesterov = r->nesterov;                                 \
        const T *v = in[1];                                                                 \
        T *nv = out[1];                                                                     \
        DG_EACH {                                                                           \
            DG_DIRECTION(T);                                                                \
            T velocity = first ? d : v[i] * keep + take * d;                                \
            new[i] = p - lr * (nesterov ? d + keep * velocity : velocity);                   \
            nv[i] = velocity;                                                               \
        }                                                                                   \
    }                                                                                       \
                                                                                            \
    /* state: mean, square, and with AMSGrad the largest square */                          \
    DG_CLONES void dg_adam_##suffix(ptrdiff_t n, T **in, T **out, const T *g,   \
                                    const struct dg_rates *r) {                             \
        DG_SETTINGS(T);                                                                     \
        const T scale = (T)r->scale, keep2 = (T)r->keep2, take2 = (T)r->take2;              \
        const T rest = (T)r->rest;                                                          \
        const T *m = in[1], *s = in[2];                                                     \
        T *nm = out[1], *ns = out[2];                                                       \
        if (in[3] == NULL)                                                                  \
            DG_EACH {                                                                       \
                DG_DIRECTION(T);                                                            \
                p = p * rest;                                                               \
                T mean = m[i] * keep + take * d, square = s[i] * keep2 + take2 * d * d;     \
                new[i] = p - mean / (SQRT(square) / scale + eps) * lr;                       \
                nm[i] = mean;                                                               \
                ns[i] = square;                                                             \
            }                                                                               \
        else {                                                                              \
            const T *x = in[3];                                                             \
            T *nx = out[3];                                                                 \
            DG_EACH {                                                                       \
                DG_DIRECTION(T);                                                            \
                p = p * rest;                                                               \
                T mean = m[i] * keep + take * d, square = s[i] * keep2 + take2 * d * d;     \
                T largest = x[i] >= square || x[i] != x[i] ? x[i] : square;                 \
                new[i] = p - mean / (SQRT(largest) / scale + eps) * lr;                      \
                nm[i] = mean;                                                               \
                ns[i] = square;                                                             \
                nx[i] = largest;                                                            \
            }                                                                               \
        }                                                                                   \
    }                                                                                       \
                                                                                            \
    /* state: sum */                                                                        \
    DG_CLONES void dg_adagrad_##suffix(ptrdiff_t n, T **in, T **out,            \
                                       const T *g, const struct dg_rates *r) {              \
        DG_SETTINGS(T);                                                                     \
        const T *s = in[1];                                                                 \
        T *ns = out[1];                                                                     \
        DG_EACH {                                                                           \
            DG_DIRECTION(T);                                                                \
            T sum = s[i] + d * d;                                                           \
            new[i] = p - lr * d / (SQRT(sum) + eps);                                         \
            ns[i] = sum;                                                                    \
        }                                                                                   \
    }                                                                                       \
                                                                                            \
    /* state: square; mean if centered; velocity with momentum */                           \
    DG_CLONES void dg_rmsprop_##suffix(ptrdiff_t n, T **in, T **out,            \
                                       const T *g, const struct dg_rates *r) {              \
        DG_SETTINGS(T);                                                                     \
        const int centered = r->centered;                                                   \
        const T momentum = (T)r->keep2;                                                     \
        const T *s = in[1], *m = in[2], *v = in[2 + centered];                              \
        T *ns = out[1], *nm = out[2], *nv = out[2 + centered];                              \
        for (ptrdiff_t i = 0; i < n; i++) {                                                 \
            DG_DIRECTION(T);                                                                \
            T square = s[i] * keep + take * (d * d), spread = square;                       \
            if (centered) {                                                                 \
                T mean = m[i] * keep + take * d;                                            \
                spread = square - mean * mean;                                              \
                nm[i] = mean;                                                               \
            }                                                                               \
            ns[i] = square;                                                                 \
            d = d / (SQRT(spread) + eps);                                                   \
            if (v != NULL) {                                                                \
                d = v[i] * momentum + d;                                                    \
                nv[i] = d;                                                                  \
            }                                                                               \
            new[i] = p - lr * d;                                                             \
        }                                                                                   \
    }                                                                                       \
                                                                                            \
    /* state: square, moved */                                                              \
    DG_CLONES void dg_adadelta_##suffix(ptrdiff_t n, T **in, T **out,           \
                                        const T *g, const struct dg_rates *r) {             \
        DG_SETTINGS(T);                                                                     \
        const T *s = in[1], *u = in[2];                                                     \
        T *ns = out[1], *nu = out[2];                                                       \
        DG_EACH {                                                                           \
            DG_DIRECTION(T);                                                                \
            T square = s[i] * keep + take * (d * d);                                        \
            T delta = SQRT(u[i] + eps) / SQRT(square + eps) * d;                            \
            new[i] = p - lr * delta;                                                         \
            ns[i] = square;                                                                 \
            nu[i] = u[i] * keep + take * (delta * delta);                                   \
        }                                                                                   \
    }                                                                                       \
                                                                                            \
    /* state: mean, norm */                                                                 \
    DG_CLONES void dg_adamax_##suffix(ptrdiff_t n, T **in, T **out,             \
                                      const T *g, const struct dg_rates *r) {               \
        DG_SETTINGS(T);                                                                     \
        const T keep2 = (T)r->keep2;                                                        \
        const T *m = in[1], *u = in[2];                                                     \
        T *nm = out[1], *nu = out[2];                                                       \
        DG_EACH {                                                                           \
            DG_DIRECTION(T);                                                                \
            T mean = m[i] * keep + take * d, kept = u[i] * keep2, size = FABS(d) + eps;     \
            T norm = kept >= size || kept != kept ? kept : size;                            \
            new[i] = p - lr * mean / norm;                                                   \
            nm[i] = mean;                                                                   \
            nu[i] = norm;                                                                   \
        }                                                                                   \
    }                                                                                       \
                                                                                            \
    /* state: previous, size */                                                             \
    DG_CLONES void dg_rprop_##suffix(ptrdiff_t n, T **in, T **out,              \
                                     const T *g, const struct dg_rates *r) {                \
        DG_SETTINGS(T);                                                                     \
        const T shrink = (T)r->low, grow = (T)r->high, least = (T)r->least, most = (T)r->most; \
        const T *b = in[1], *z = in[2];                                                     \
        T *nb = out[1], *nz = out[2];                                                       \
        (void)lr;                                                                           \
        DG_EACH {                                                                           \
            DG_DIRECTION(T);                                                                \
            T agreement = d * b[i];                                                         \
            T size = z[i] * (agreement > 0 ? grow : agreement < 0 ? shrink : (T)1);         \
            size = size < least ? least : size;                                             \
            size = size > most ? most : size;                                               \
            d = agreement < 0 ? (T)0 : d;                                                   \
            new[i] = p - (d > 0 ? (T)1 : d < 0 ? (T)-1 : d) * size;                          \
            nb[i] = d;                                                                      \
            nz[i] = size;                                                                   \
        }                                                                                   \
    }

DG_UPDATES(double, f64, sqrt, fabs)
DG_UPDATES(float, f32, sqrtf, fabsf)

#endif
