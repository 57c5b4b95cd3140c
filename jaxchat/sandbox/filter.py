"""System call filter (Linux seccomp) that a process installs on itself, irrevocably and without privileges.

The filter refuses with EPERM calls that start or access other processes, use the network, change mounts or namespaces,
keep memory beyond the process, raise limits, switch users, or change file attributes that Landlock does not protect
(mode, owner, times). It is a second defence behind bubblewrap, and the first without it. System call numbers come from
the kernel's tables (arch/x86/entry/syscalls, include/uapi/asm-generic/unistd.h).
"""

import ctypes
import errno
import os
import struct

# Name, number on x86-64 and number on AArch64 of each refused call; AArch64 lacks the older calls.
_REFUSED = """
    clone 56 220                 fork 57 -                    vfork 58 -                   clone3 435 435
    execve 59 221                execveat 322 281             kill 62 129                  tkill 200 130
    tgkill 234 131               rt_sigqueueinfo 129 138      rt_tgsigqueueinfo 297 240    pidfd_open 434 434
    pidfd_getfd 438 438          pidfd_send_signal 424 424    ptrace 101 117               process_vm_readv 310 270
    process_vm_writev 311 271    process_madvise 440 440      kcmp 312 272                 prctl 157 167
    prlimit64 302 261            setrlimit 160 164            setpriority 141 140          sched_setscheduler 144 119
    sched_setparam 142 118       sched_setattr 314 274        ioprio_set 251 30            personality 135 92
    seccomp 317 277              socket 41 198                socketpair 53 199            io_uring_setup 425 425
    io_uring_enter 426 426       io_uring_register 427 427    unshare 272 97               setns 308 268
    mount 165 40                 umount2 166 39               pivot_root 155 41            chroot 161 51
    open_tree 428 428            move_mount 429 429           fsopen 430 430               fsmount 432 432
    fspick 433 433               mount_setattr 442 442        bpf 321 280                  perf_event_open 298 241
    userfaultfd 323 282          add_key 248 217              request_key 249 218          keyctl 250 219
    name_to_handle_at 303 264    open_by_handle_at 304 265    memfd_create 319 279         memfd_secret 447 447
    shmget 29 194                msgget 68 186                semget 64 190                mq_open 240 180
    chmod 90 -                   fchmod 91 52                 fchmodat 268 53              fchmodat2 452 452
    chown 92 -                   fchown 93 55                 lchown 94 -                  fchownat 260 54
    utime 132 -                  utimes 235 -                 futimesat 261 -              utimensat 280 88
    setxattr 188 5               lsetxattr 189 6              fsetxattr 190 7              setxattrat 463 463
    removexattr 197 14           lremovexattr 198 15          fremovexattr 199 16          removexattrat 466 466
    truncate 76 45               sched_setaffinity 203 122    migrate_pages 256 238        move_pages 279 239
    inotify_init 253 -           inotify_init1 294 26         fanotify_init 300 262        file_setattr 469 469
    setuid 105 146               setgid 106 144               setreuid 113 145             setregid 114 143
    setgroups 116 159            setresuid 117 147            setresgid 119 149            setfsuid 122 151
    setfsgid 123 152
"""
_SET_OWNER = (8, 15)  # F_SETOWN and F_SETOWN_EX of fcntl could signal any process of the same user.
# Column in the table above, AUDIT_ARCH_* constant and number of fcntl.
_MACHINES = {"x86_64": (0, 0xC000003E, 72), "aarch64": (1, 0xC00000B7, 25)}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_X32 = 0x40000000  # Bit in the call numbers of the x32 ABI.
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refused_calls(machine: str) -> dict[str, int]:
    """Numbers of the refused system calls by name, for a machine such as "x86_64"."""
    words, column = _REFUSED.split(), _MACHINES[machine][0]
    rows = zip(words[::3], zip(words[1::3], words[2::3]))
    return {name: int(numbers[column]) for name, numbers in rows if numbers[column] != "-"}


def close() -> None:
    """Installs the filter on this process, unless the machine or the kernel does not support it; `run.py` probes it."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        return
    _, architecture, fcntl = _MACHINES[machine]
    numbers = sorted(refused_calls(machine).values())
    refuse = (_RETURN, 0, 0, _REFUSE | errno.EPERM)
    # BPF instructions: operation, jump if true, jump if false, operand.
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    code += [(_AT_LEAST, 0, 1, _X32), refuse]
    for number in numbers:
        code += [(_EQUAL, 0, 1, number), refuse]
    code += [(_EQUAL, 0, 5, fcntl), (_LOAD, 0, 0, 24)]  # Offset of the second argument.
    for command in _SET_OWNER:
        code += [(_EQUAL, 0, 1, command), refuse]
    code.append((_RETURN, 0, 0, _ALLOW))
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in code))
    program = _Program(len(code), ctypes.cast(buffer, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)
