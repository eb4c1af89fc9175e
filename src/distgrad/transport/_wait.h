/* Time and flags for the poller. */
#ifndef DISTGRAD_WAIT_H
#define DISTGRAD_WAIT_H

#include <errno.h>
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

#endif
