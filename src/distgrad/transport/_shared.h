/* Shared memory between two processes: ordered loads and stores, and descriptors that travel. */
#ifndef DISTGRAD_SHARED_H
#define DISTGRAD_SHARED_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define DISTGRAD_TMPFS 0x01021994

static inline uint64_t distgrad_load64(const volatile uint64_t *at)
{
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

static inline void distgrad_store64(volatile uint64_t *at, uint64_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}

static inline uint32_t distgrad_load32(const volatile uint32_t *at)
{
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

static inline void distgrad_store32(volatile uint32_t *at, uint32_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}

/* Put `value` where `expected` is; whether it was. */
static inline int distgrad_swap32(volatile uint32_t *at, uint32_t expected, uint32_t value)
{
    return __atomic_compare_exchange_n(at, &expected, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

static inline void distgrad_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline void distgrad_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Map a memory file of a peer for reading and writing. It must be sealed against shrinking, or
   the peer could make every access fatal, and live on tmpfs, where pages are always to be had.
   Returns NULL if anything is amiss. */
static inline void *distgrad_map(int fd, uint64_t least, uint64_t most, uint64_t *nbytes)
{
    struct stat status;
    struct statfs system;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)) !=
                         (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return NULL;
    if (seals & F_SEAL_WRITE)
        return NULL;
    if (fstatfs(fd, &system) < 0 || system.f_type != DISTGRAD_TMPFS)
        return NULL;
    if (fstat(fd, &status) < 0 || (uint64_t)status.st_size < least ||
        (uint64_t)status.st_size > most || status.st_size % 4096)
        return NULL;
    *nbytes = (uint64_t)status.st_size;
    void *data = mmap(NULL, *nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return data == MAP_FAILED ? NULL : data;
}

/* Give pages to memory of a memory file, so that running out of memory is an error here and not
   a signal later. Returns 0, or -1 if there is no memory; a kernel before 5.14 cannot tell. */
static inline int distgrad_populate(char *data, uint64_t nbytes)
{
    if (madvise(data, nbytes, MADV_POPULATE_WRITE) == 0 || errno == EINVAL)
        return 0;
    return -1;
}

/* After a fork: make shared memory private to this process, with the content it has now. */
static inline int distgrad_detach(char *data, uint64_t nbytes)
{
    void *own = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (own == MAP_FAILED)
        return -1;
    memcpy(own, data, nbytes);
    if (mremap(own, nbytes, nbytes, MREMAP_MAYMOVE | MREMAP_FIXED, data) == MAP_FAILED) {
        munmap(own, nbytes);
        return -1;
    }
    return 0;
}

/* Copy past the caches, for blocks that are larger than they are: the destination is not read
   first, and what is in the caches stays there. */
static inline void distgrad_copy_past_caches(char *to, const char *from, size_t nbytes)
{
#if defined(__SSE2__)
    size_t ragged = (size_t)-(uintptr_t)to & 63;
    if (ragged > nbytes)
        ragged = nbytes;
    memcpy(to, from, ragged);
    to += ragged, from += ragged, nbytes -= ragged;
    for (; nbytes >= 64; to += 64, from += 64, nbytes -= 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)from);
        __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)(to + 16), b);
        _mm_stream_si128((__m128i *)(to + 32), c);
        _mm_stream_si128((__m128i *)(to + 48), d);
    }
    _mm_sfence(); /* before whatever tells the other side */
#endif
    memcpy(to, from, nbytes);
}

/* Send one byte, with a descriptor if `passed` is one. Returns 0 or -errno. */
static inline int distgrad_signal(int fd, char byte, int passed)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec piece = {&byte, 1};
    struct msghdr message;
    memset(&message, 0, sizeof message);
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    if (passed >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = &control;
        message.msg_controllen = sizeof control.space;
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&control.header), &passed, sizeof(int));
    }
    return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* Receive bytes, and at most one descriptor with them (else -1). Returns as recvmsg, or -errno;
   -EPROTO if there were more descriptors, or none could be taken in. */
static inline ssize_t distgrad_hear(int fd, char *data, size_t nbytes, int *passed)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec piece = {data, nbytes};
    struct msghdr message;
    struct cmsghdr *found;
    ssize_t result;
    *passed = -1;
    memset(&message, 0, sizeof message);
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = &control;
    message.msg_controllen = CMSG_LEN(sizeof(int)); /* room for one */
    result = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (result < 0)
        return -errno;
    found = CMSG_FIRSTHDR(&message);
    if (found && found->cmsg_level == SOL_SOCKET && found->cmsg_type == SCM_RIGHTS &&
        found->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(passed, CMSG_DATA(found), sizeof(int));
    if (message.msg_flags & MSG_CTRUNC) {
        if (*passed >= 0)
            close(*passed);
        *passed = -1;
        return -EPROTO;
    }
    return result;
}

#endif
