/* Loops over contiguous float arrays. With GCC and glibc on x86-64 each is compiled three
   times and the loader picks the one for this processor (before a sanitizer has started, so
   not under one); elsewhere it is plain C. The build
   switches contraction off, so that all of them round alike. */
#ifndef DISTGRAD_GRAPH_KERNELS_H
#define DISTGRAD_GRAPH_KERNELS_H

#include <fenv.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define DG_LINE 64  /* bytes of a cache line, and of the widest vector */
#define DG_CLONES static __attribute__((unused))
#if defined(__has_attribute) && defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) \
    && !DISTGRAD_DEBUG && !DISTGRAD_SANITIZE
#if __has_attribute(target_clones)
#undef DG_CLONES
#define DG_CLONES static __attribute__((unused, noinline, target_clones("default", "avx2", "avx512f")))
#endif
#endif

enum dg_kernel {
    DG_NONE, DG_ADD, DG_SUBTRACT, DG_MULTIPLY, DG_DIVIDE, DG_NEGATIVE,
    DG_EXP, DG_TANH, DG_SQRT, DG_SQUARE, DG_RELU, DG_SIGMOID,
    DG_SUM, DG_RESHAPE, DG_GETITEM  /* these have functions of their own */
};

/* Floating-point exceptions since the flags were cleared. `fetestexcept` also asks the x87 unit,
   which no loop here uses, and so takes longer than a small loop. */
static inline int dg_raised(int flags) {
#ifdef __x86_64__
    return (int)__builtin_ia32_stmxcsr() & flags;
#else
    return fetestexcept(flags);
#endif
}

/* A step is 1, or 0 where one number stands for all elements. */
#define DG_LOOP(T, result)                                                             \
    if (step_a && step_b)                                                              \
        for (ptrdiff_t i = 0; i < n; i++) { T x = a[i], y = b[i]; (void)x; (void)y; out[i] = result; } \
    else if (step_b) {                                                                 \
        T x = *a; (void)x;                                                             \
        for (ptrdiff_t i = 0; i < n; i++) { T y = b[i]; (void)y; out[i] = result; }    \
    } else {                                                                           \
        T y = *b; (void)y;                                                             \
        for (ptrdiff_t i = 0; i < n; i++) { T x = a[i]; (void)x; out[i] = result; }    \
    }                                                                                  \
    return

#define DG_DEFINE(T, suffix)                                                           \
    /* Forward of the binary operations; ``a * derivative(b)`` of the others, where b  \
       is their result, for SQUARE their argument. `out` overlaps neither. */          \
    DG_CLONES void dg_run_##suffix(int kernel, const T *restrict a, ptrdiff_t step_a,  \
                                   const T *restrict b, ptrdiff_t step_b,              \
                                   T *restrict out, ptrdiff_t n) {                     \
        switch (kernel) {                                                              \
        case DG_ADD: DG_LOOP(T, x + y);                                                \
        case DG_SUBTRACT: DG_LOOP(T, x - y);                                           \
        case DG_EXP:                                                                   \
        case DG_MULTIPLY: DG_LOOP(T, x * y);                                           \
        case DG_DIVIDE: DG_LOOP(T, x / y);                                             \
        case DG_NEGATIVE: DG_LOOP(T, -x);                                              \
        case DG_TANH: DG_LOOP(T, x * (1 - y * y));                                     \
        case DG_SQRT: DG_LOOP(T, x / (2 * y));                                         \
        case DG_SQUARE: DG_LOOP(T, x * (2 * y));                                       \
        case DG_RELU: DG_LOOP(T, x * (y > 0));                                         \
        case DG_SIGMOID: DG_LOOP(T, x * y * (1 - y));                                  \
        }                                                                              \
    }                                                                                  \
                                                                                       \
    /* From where `sum` is aligned: a store across two cache lines takes twice as long. */ \
    DG_CLONES void dg_add_into_##suffix(T *restrict sum, const T *restrict part, ptrdiff_t n) { \
        ptrdiff_t i = 0, head = (ptrdiff_t)(-(uintptr_t)sum % DG_LINE / sizeof(T));    \
        if (head > n) head = n;                                                        \
        for (; i < head; i++) sum[i] += part[i];                                       \
        _Pragma("GCC unroll 4")                                                        \
        for (; i < n; i++) sum[i] += part[i];                                          \
    }                                                                                  \
                                                                                       \
    DG_CLONES void dg_fill_##suffix(T *out, T value, ptrdiff_t n) {                    \
        for (ptrdiff_t i = 0; i < n; i++) out[i] = value;                              \
    }                                                                                  \
                                                                                       \
    /* Pairwise, in the order in which NumPy adds: eight lanes up to 128 elements,     \
       above that by halves. */                                                        \
    static __attribute__((unused)) T dg_sum_##suffix(const T *a, ptrdiff_t n) {        \
        if (n < 8) {                                                                   \
            T sum = 0;                                                                 \
            for (ptrdiff_t i = 0; i < n; i++) sum += a[i];                             \
            return sum;                                                                \
        }                                                                              \
        if (n <= 128) {                                                                \
            T lane[8];                                                                 \
            ptrdiff_t i = 8;                                                           \
            memcpy(lane, a, sizeof lane);                                              \
            for (; i + 8 <= n; i += 8)                                                 \
                for (int k = 0; k < 8; k++) lane[k] += a[i + k];                       \
            T sum = ((lane[0] + lane[1]) + (lane[2] + lane[3]))                        \
                  + ((lane[4] + lane[5]) + (lane[6] + lane[7]));                       \
            for (; i < n; i++) sum += a[i];                                            \
            return sum;                                                                \
        }                                                                              \
        ptrdiff_t half = n / 2 - (n / 2) % 8;                                          \
        return dg_sum_##suffix(a, half) + dg_sum_##suffix(a + half, n - half);         \
    }

DG_DEFINE(double, f64)
DG_DEFINE(float, f32)

#endif
