# cython: auto_pickle=False, autotestdict=False
"""The thread behind a door: it says that this process runs, whatever Python does meanwhile."""

from libc.errno cimport EAGAIN, EINTR, EMFILE, ENFILE, errno
from posix.fcntl cimport O_RDONLY, open
from posix.unistd cimport close

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC

cdef extern from "<poll.h>" nogil:
    short POLLIN
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout_ms)

cdef extern from "<sys/socket.h>" nogil:
    int SOCK_CLOEXEC, SOCK_NONBLOCK, MSG_DONTWAIT, MSG_NOSIGNAL
    int accept4(int fd, void *address, void *length, int flags)
    Py_ssize_t send(int fd, const void *data, size_t nbytes, int flags)

cdef enum:
    MOST_DOORS = 4
    PAUSE_MS = 20             # where the system cannot let anybody in just now


def answer(list doors not None, int stop):
    """Give one byte to each who connects, and close; without the GIL, until told to stop.

    Parameters
    ----------
    doors
        Descriptors of listening sockets that do not block, at most 4.
    stop
        Descriptor that becomes readable when this shall end.
    """
    cdef pollfd watched[MOST_DOORS + 1]
    cdef int count = <int>len(doors), i
    cdef int spare = -1       # descriptor that is kept for when there is no other one
    cdef bint able
    if count > MOST_DOORS:
        raise ValueError(f"cannot answer at {count} doors: {MOST_DOORS} are allowed")
    for i in range(count + 1):
        watched[i].fd = stop if i == 0 else doors[i - 1]
        watched[i].events = POLLIN
        watched[i].revents = 0
    with nogil:
        reserve(&spare)
        while True:
            if poll(watched, count + 1, -1) < 0:
                if errno != EINTR:
                    poll(NULL, 0, PAUSE_MS)
                continue
            if watched[0].revents:
                break
            able = True
            for i in range(1, count + 1):
                if watched[i].revents:
                    able &= answer_one(watched[i].fd, &spare)
            if not able:          # who knocks stays at the door, which would wake this at once
                poll(watched, 1, PAUSE_MS)
        if spare >= 0:
            close(spare)


cdef void reserve(int *spare) noexcept nogil:
    if spare[0] < 0:
        spare[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)


cdef bint answer_one(int door, int *spare) noexcept nogil:
    """Answer who knocks; return False where the system does not let them in."""
    cdef char alive = 1
    cdef bint able
    cdef int fd = accept4(door, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
    if fd < 0 and (errno == EMFILE or errno == ENFILE) and spare[0] >= 0:
        close(spare[0])
        spare[0] = -1
        fd = accept4(door, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
    able = fd >= 0 or errno == EAGAIN
    if fd >= 0:
        send(fd, &alive, 1, MSG_NOSIGNAL | MSG_DONTWAIT)
        close(fd)
    reserve(spare)
    return able
