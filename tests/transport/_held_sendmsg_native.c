/* Preloaded into a test: holds the next sendmsg on a descriptor where the kernel would be
   copying, until it is let go. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <time.h>

static atomic_int awaited = -1;
static sem_t inside, released;

void hold(int fd)
{
    sem_init(&inside, 0, 0);
    sem_init(&released, 0, 0);
    atomic_store(&awaited, fd);
}

/* Return 0 once a thread is held, -1 if none was for a number of seconds. */
int wait_until_held(int seconds)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += seconds;
    return sem_timedwait(&inside, &until);
}

void let_go(void)
{
    sem_post(&released);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    static ssize_t (*real)(int, const struct msghdr *, int);
    int expected = fd;
    if (!real)
        real = (ssize_t (*)(int, const struct msghdr *, int))dlsym(RTLD_NEXT, "sendmsg");
    if (atomic_compare_exchange_strong(&awaited, &expected, -1)) {
        sem_post(&inside);
        sem_wait(&released);
    }
    return real(fd, message, flags);
}
