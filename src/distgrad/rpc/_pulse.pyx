# cython: auto_pickle=False, autotestdict=False
"""The thread behind a door: it says that this process runs, whatever Python does meanwhile."""

from libc.errno cimport EINTR, EMFILE, ENFILE, errno
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
    cdef int count = <int>len(doors), i, spare
    if count > MOST_DOORS:
        raise ValueError(f"cannot answer at {count} doors: {MOST_DOORS} are allowed")
    watched[0].fd, watched[0].events = stop, POLLIN
    for i in range(count):
        watched[i + 1].fd, watched[i + 1].events = doors[i], POLLIN
    spare = reserve()
    with nogil:
        while poll(watched, count + 1, -1) >= 0 or errno == EINTR:
            if watched[0].revents:
                break
            for i in range(1, count + 1):
                if watched[i].revents:
                    spare = answer_one(watched[i].fd, spare)
    close(spare)


cdef int reserve() noexcept nogil:
    return open("/dev/null", O_RDONLY | O_CLOEXEC)


cdef int answer_one(int door, int spare) noexcept nogil:
    """Answer who knocks; return the descriptor kept for when there is no other one."""
    cdef char alive = 1
    cdef int fd = accept4(door, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
    if fd < 0 and (errno == EMFILE or errno == ENFILE) and spare >= 0:
        close(spare)
        fd = accept4(door, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)
        spare = -1
    if fd >= 0:
        send(fd, &alive, 1, MSG_NOSIGNAL | MSG_DONTWAIT)
        close(fd)
    return spare if spare >= 0 else reserve()
