"""The system calls that a jailed program may make: a seccomp filter as a BPF program.

Invariant: what is not listed fails with EPERM, so a new kernel brings no new door. No program can
be executed, no socket opened (socketpairs serve asyncio), no namespace, key, memory file or
io_uring made, nothing traced; `clone`, `prctl`, `prlimit64` and `ioctl` are let through for a few
arguments only. The filter is made once and installed in each program.

The table gives each call's number on x86_64 and aarch64, "-" where there is none.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from rewards.sandbox import linux

ALLOWED = """
read 0 63; write 1 64; open 2 -; close 3 57; stat 4 -; fstat 5 80; lstat 6 -; poll 7 -;
lseek 8 62; mmap 9 222; mprotect 10 226; munmap 11 215; brk 12 214; rt_sigaction 13 134;
rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigpending 127 136; rt_sigtimedwait 128 137;
rt_sigsuspend 130 133; sigaltstack 131 132; pread64 17 67; pwrite64 18 68; readv 19 65;
writev 20 66; preadv 295 69; pwritev 296 70; access 21 -; pipe 22 -; pipe2 293 59;
select 23 -; pselect6 270 72; ppoll 271 73; sched_yield 24 124; mremap 25 216; msync 26 227;
mincore 27 232; madvise 28 233; dup 32 23; dup2 33 -; dup3 292 24; pause 34 -;
nanosleep 35 101; clock_nanosleep 230 115; clock_gettime 228 113; clock_getres 229 114;
getitimer 36 102; setitimer 38 103; alarm 37 -; getpid 39 172; gettid 186 178;
getppid 110 173; sendfile 40 71; socketpair 53 199; sendto 44 206; recvfrom 45 207;
sendmsg 46 211; recvmsg 47 212; shutdown 48 210; getsockname 51 204; getpeername 52 205;
getsockopt 55 209; fork 57 -; vfork 58 -; wait4 61 260; waitid 247 95; exit 60 93;
exit_group 231 94; kill 62 129; tgkill 234 131; uname 63 160; fcntl 72 25; flock 73 32;
fsync 74 82; fdatasync 75 83; truncate 76 45; ftruncate 77 46; getdents64 217 61;
getcwd 79 17; chdir 80 49; fchdir 81 50; rename 82 -; renameat 264 38; renameat2 316 276;
mkdir 83 -; mkdirat 258 34; rmdir 84 -; creat 85 -; link 86 -; linkat 265 37; unlink 87 -;
unlinkat 263 35; symlink 88 -; symlinkat 266 36; readlink 89 -; readlinkat 267 78; chmod 90 -;
fchmod 91 52; fchmodat 268 53; utimensat 280 88; umask 95 166; gettimeofday 96 169;
time 201 -; getrlimit 97 163; setrlimit 160 164; getrusage 98 165; sysinfo 99 179;
times 100 153; getuid 102 174; geteuid 107 175; getgid 104 176; getegid 108 177;
getgroups 115 158; getresuid 118 148; getresgid 120 150; setpgid 109 154; getpgid 121 155;
getpgrp 111 -; setsid 112 157; getsid 124 156; getpriority 140 141; sched_getaffinity 204 123;
sched_getparam 143 121; sched_getscheduler 145 120; sched_get_priority_max 146 125;
sched_get_priority_min 147 126; arch_prctl 158 -; futex 202 98; set_tid_address 218 96;
set_robust_list 273 99; get_robust_list 274 100; rseq 334 293; restart_syscall 219 128;
fadvise64 221 223; fallocate 285 47; epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -;
epoll_pwait 281 22; eventfd2 290 19; openat 257 56; newfstatat 262 79; statx 332 291;
faccessat 269 48; faccessat2 439 439; statfs 137 43; fstatfs 138 44; getrandom 318 278;
membarrier 324 283; getcpu 309 168; close_range 436 436; copy_file_range 326 285;
capget 125 90
"""

# Allowed for some arguments only: numbers as above, index of the argument, values let through.
SELECTED = {
    "prctl": ((157, 167), 0, (15, 16)),  # PR_SET_NAME, PR_GET_NAME
    "prlimit64": ((302, 261), 0, (0,)),  # the caller's own limits
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
}
CLONE = (56, 220)  # threads and processes, but no namespaces
CLONE3 = (435, 435)  # its flags are behind a pointer: libc falls back to clone
NEW_NAMESPACES = (
    linux.CLONE_NEWNS | linux.CLONE_NEWCGROUP | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUSER | linux.CLONE_NEWPID | linux.CLONE_NEWNET
)

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
# BPF opcodes: jumps if equal, if not below (unsigned), if any bit is set, and always
_LOAD, _JUMP_EQUAL, _JUMP_NOT_BELOW, _JUMP_BITS, _JUMP = 0x20, 0x15, 0x35, 0x45, 0x05
_RETURN = 0x06
_LONGEST_JUMP = 255  # of one with a condition
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def prepare(program: bytes) -> ctypes.Structure:
    """The filter as the kernel takes it."""
    return _Program(len(program) // 8, program)


def install(prepared: ctypes.Structure) -> None:
    """Bind this process and all its children to the filter; needs no_new_privs."""
    linux.prctl(linux.PR_SET_SECCOMP, linux.SECCOMP_MODE_FILTER, ctypes.byref(prepared))


def build_filter(machine: str) -> bytes:
    """The filter for this machine as an array of struct sock_filter."""
    column, architecture = _ARCHITECTURES[machine]
    code = [
        _step(_LOAD, _ARCHITECTURE_AT),
        _step(_JUMP_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_AT),
    ]
    return b"".join(code + _search(_ranges(column)))


def _ranges(column: int) -> list[tuple[int, list[bytes]]]:
    """(first number, what to do) of each range of numbers, ascending, the first from 0."""
    bodies = {number: [_step(_RETURN, _ALLOW)] for number in allowed_numbers(column)}
    for numbers, argument, values in SELECTED.values():
        bodies[numbers[column]] = _if_argument(argument, values)
    bodies[CLONE[column]] = [
        _step(_LOAD, _ARGUMENTS_AT),
        _step(_JUMP_BITS, NEW_NAMESPACES, 0, 1),
        _step(_RETURN, _ERRNO | errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]
    bodies[CLONE3[column]] = [_step(_RETURN, _ERRNO | errno.ENOSYS)]
    ranges: list[tuple[int, list[bytes]]] = []
    for number in range(max(bodies) + 2):
        body = bodies.get(number, [_step(_RETURN, _ERRNO | errno.EPERM)])
        if not ranges or ranges[-1][1] != body:
            ranges.append((number, body))
    return ranges


def _search(ranges: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """By halves: the kernel tries the filter on every number when it is installed, so its depth is
    what installing costs."""
    if len(ranges) == 1:
        return ranges[0][1]
    half = len(ranges) // 2
    first, below, above = ranges[half][0], _search(ranges[:half]), _search(ranges[half:])
    if len(below) <= _LONGEST_JUMP:
        return [_step(_JUMP_NOT_BELOW, first, len(below), 0), *below, *above]
    return [_step(_JUMP_NOT_BELOW, first, 0, 1), _step(_JUMP, len(below)), *below, *above]


def allowed_numbers(column: int) -> list[int]:
    rows = [entry.split() for entry in ALLOWED.replace("\n", " ").split(";")]
    return [int(row[1 + column]) for row in rows if row[1 + column] != "-"]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _if_argument(index: int, values: tuple[int, ...]) -> list[bytes]:
    """Allowed when the low half of the argument is one of `values`: the kernel reads no more."""
    body = [_step(_LOAD, _ARGUMENTS_AT + 8 * index)]
    for value in values:
        body += [_step(_JUMP_EQUAL, value, 0, 1), _step(_RETURN, _ALLOW)]
    return [*body, _step(_RETURN, _ERRNO | errno.EPERM)]
