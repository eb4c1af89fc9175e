/* Time, flags, and bells that threads sleep by. */
#ifndef DISTGRAD_WAIT_H
#define DISTGRAD_WAIT_H

#include <errno.h>
#include <linux/futex.h>
#include <math.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static inline void distgrad_set(volatile int *flag, int value)
{
    __atomic_store_n(flag, value, __ATOMIC_SEQ_CST);
}

static inline int distgrad_get(volatile int *flag)
{
    return __atomic_load_n(flag, __ATOMIC_SEQ_CST);
}

static inline double distgrad_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* epoll_wait with a time-out to the nanosecond where kernel (5.11) and sandbox allow it, else
   to the next millisecond. */
static inline int distgrad_epoll_wait(int fd, struct epoll_event *events, int most, double timeout_s)
{
#ifdef SYS_epoll_pwait2
    static int missing = 0;
    if (!missing) {
        struct timespec limit;
        limit.tv_sec = (time_t)timeout_s;
        limit.tv_nsec = (long)((timeout_s - (double)limit.tv_sec) * 1e9);
        int n = (int)syscall(SYS_epoll_pwait2, fd, events, most, &limit, NULL, 0);
        if (n >= 0 || (errno != ENOSYS && errno != EPERM))
            return n;
        missing = 1;
    }
#endif
    return epoll_wait(fd, events, most, (int)(timeout_s * 1e3 + 0.999));
}

/* A bell is an int: 0 until it is rung. One thread sleeps by it; it stays rung. */
static inline void distgrad_ring_bell(int *bell)
{
    __atomic_store_n(bell, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, bell, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Sleep until the bell is rung: 0; until a time (CLOCK_MONOTONIC, s; INFINITY for never): ETIMEDOUT;
   or until a signal was handled: EINTR. */
static inline int distgrad_sleep_by_bell(int *bell, double until_s)
{
    struct timespec until, *limit = NULL;
    if (until_s < INFINITY) {
        if (until_s < 0.0)
            until_s = 0.0;
        until.tv_sec = until_s < 1e15 ? (time_t)until_s : (time_t)1e15;
        until.tv_nsec = until_s < 1e15 ? (long)((until_s - (double)until.tv_sec) * 1e9) : 0;
        limit = &until;
    }
    while (!__atomic_load_n(bell, __ATOMIC_SEQ_CST)) {
        long done = syscall(SYS_futex, bell, FUTEX_WAIT_BITSET_PRIVATE, 0, limit, NULL, FUTEX_BITSET_MATCH_ANY);
        if (done != 0 && errno != EAGAIN)
            return errno;
    }
    return 0;
}

#endif
