"""Defences of the reward services, each with a change that takes it away: `bench_defences` runs
them.

Invariant: a mutant breaks one defence, as an unlucky edit would (a call deleted, a limit widened, a
check that says yes); `old` stands once in its file. `tests` are those that should notice.
"""

from __future__ import annotations

from typing import NamedTuple

TABLE_S = 240.0  # the agreement table: computer algebra on two thousand pairs


class Mutant(NamedTuple):
    """Example: Mutant("umask", "rewards/sandbox/jail.py", "0o077", "0o022", ("...::test_x",))."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    timeout_s: float = 60.0  # of one test: those that hang are killed


def _mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """`tests` as "sandbox_walls::test_limits", several in a file joined by commas."""
    nodes = []
    for group in tests:
        module, _, names = group.partition("::")
        path = f"tests/rewards/test_{module}.py"
        nodes += [f"{path}::{one}" for one in names.split(",")] if names else [path]
    slow = any("test_agreement_table" in node for node in nodes)
    return Mutant(name, f"rewards/{file}", old, new, tuple(nodes), *((TABLE_S,) if slow else ()))


# What stands around programs -----------------------------------------------------------------

_ZYGOTE, _JAIL, _JOBS = "sandbox/zygote.py", "sandbox/jail.py", "sandbox/jobs.py"
_KINDS = {  # of namespaces: as /proc names them, and as `linux` does
    "user": "USER", "mnt": "NS", "pid": "PID", "net": "NET", "ipc": "IPC", "uts": "UTS",
    "cgroup": "CGROUP",
}


def _namespaces(side: str, call: str) -> list[Mutant]:
    return [
        _mutant(
            f"{side} {kind} namespace", _ZYGOTE, f"linux.{call}(NAMESPACES)",
            f"linux.{call}(NAMESPACES & ~linux.CLONE_NEW{flag})",
            f"sandbox_walls::test_namespace_is_its_own[{kind}]",
        )
        for kind, flag in _KINDS.items()
    ]


_ROOT = [
    _mutant(
        "pivot_root, not chroot", "sandbox/linux.py",
        '    _syscall("pivot_root", here, here)\n'
        '    _call("umount2", _libc.umount2(here, ctypes.c_int(MNT_DETACH)))\n',
        '    os.chroot(".")\n',
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "old root unmounted", "sandbox/linux.py",
        '    _call("umount2", _libc.umount2(here, ctypes.c_int(MNT_DETACH)))\n', "",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "mounts private", _ZYGOTE,
        '    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)\n', "",
        "sandbox_start::test_nothing_that_the_host_mounts_later_comes_through",
    ),
    _mutant(
        "minimal root", _ZYGOTE, 'DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")',
        'DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/full")',
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "root read-only", _ZYGOTE,
        "    linux.seal_mount(root, SEALED | linux.MOUNT_ATTR_NODEV)\n", "",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "library read-only", _ZYGOTE,
        "    linux.seal_mount(root + LIBRARY, SEALED | linux.MOUNT_ATTR_NODEV, below=True)\n", "",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "devices sealed", _ZYGOTE, "        linux.seal_mount(root + device, SEALED)\n", "",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "root nosuid", _ZYGOTE, "SEALED = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID",
        "SEALED = linux.MOUNT_ATTR_RDONLY", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "library nodev", _ZYGOTE, "root + LIBRARY, SEALED | linux.MOUNT_ATTR_NODEV, below=True",
        "root + LIBRARY, SEALED, below=True", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "site-packages hidden", _ZYGOTE,
        'if os.path.isdir(root + LIBRARY + "/site-packages"):', "if False:",
        "attacks::test_attack_is_contained[whole_tree]",
    ),
    _mutant(
        "host's paths forgotten", _ZYGOTE, "    _forget_host_paths(library)\n", "",
        "attacks::test_attack_is_contained[host_paths_in_the_interpreter]",
    ),
    _mutant(
        "host name", _ZYGOTE, '    linux.set_hostname("jail")\n', "",
        "attacks::test_attack_is_contained[hostname]",
    ),
    _mutant(
        "work folder nosuid", _JAIL, "linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC",
        "linux.MS_NODEV | linux.MS_NOEXEC", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "work folder nodev", _JAIL, "linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC",
        "linux.MS_NOSUID | linux.MS_NOEXEC", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "work folder noexec", _JAIL, "linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC",
        "linux.MS_NOSUID | linux.MS_NODEV", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "work folder's size", _JAIL, "size={limits.file_bytes},nr_inodes", "nr_inodes",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "work folder's files", _JAIL, ",nr_inodes={MAX_FILES}", "", "sandbox_walls::test_mounts"
    ),
    _mutant(
        "work folder fresh", _JAIL, "            _mount_work_folder(allowed)\n", "",
        "attacks::test_nothing_survives_a_program",
    ),
]


def _limit(name: str, old: str, new: str = "") -> Mutant:
    return _mutant(f"rlimit: {name}", _JAIL, old, new, "sandbox_walls::test_limits")


_LIMITS = [
    _limit("CPU", "        resource.RLIMIT_CPU: (cpu_s, cpu_s),\n"),
    _limit("address space", "        resource.RLIMIT_AS: (limits.memory_bytes,) * 2,\n"),
    _limit("file size", "        resource.RLIMIT_FSIZE: (limits.file_bytes,) * 2,\n"),
    _limit("open files", "        resource.RLIMIT_NOFILE: (limits.open_files,) * 2,\n"),
    _limit("core", "        resource.RLIMIT_CORE: (0, 0),\n"),
    _limit("locked memory", "        resource.RLIMIT_MEMLOCK: (0, 0),\n"),
    _limit("message queues", "        resource.RLIMIT_MSGQUEUE: (0, 0),\n"),
    _limit("processes", "(limits.processes + 1,) * 2", "(limits.processes + 1000,) * 2"),
    _limit("hard ones too", "(limits.memory_bytes,) * 2", "(limits.memory_bytes, 1 << 40)"),
]


def _call(name: str, x86: int, arm: int) -> Mutant:
    return _mutant(
        f"seccomp: {name}", "sandbox/seccomp.py", "\ncapget 125 90\n",
        f"\ncapget 125 90; {name} {x86} {arm}\n",
        "sandbox_walls::test_forbidden_calls,test_forbidden_calls_are_not_listed",
    )


_CALLS = [
    _mutant(
        "seccomp: whole filter", _JAIL, "            seccomp.install(walls.filter)\n", "",
        "sandbox_walls::test_no_way_to_gain_one",
    ),
    _call("ptrace", 101, 117), _call("mount", 165, 40),
    _call("unshare", 272, 97), 
    _call("keyctl", 250, 219), _call("io_uring_setup", 425, 425),
    _call("bpf", 321, 280), _call("userfaultfd", 323, 282),
    _call("memfd_create", 319, 279), _call("execve", 59, 221),
    _call("socket", 41, 198), _call("shmget", 29, 194),
    _call("seccomp", 317, 277), _call("fchownat", 260, 54), _call("pidfd_open", 434, 434),
    _mutant(
        "seccomp: prctl's arguments", "sandbox/seccomp.py", "0, (15, 16))", "0, (4, 15, 16))",
        "sandbox_walls::test_arguments_that_are_let_through",
    ),
    _mutant(
        "seccomp: others' limits", "sandbox/seccomp.py", "((302, 261), 0, (0,))",
        "((302, 261), 0, (0, 1))", "sandbox_walls::test_arguments_that_are_let_through",
    ),
    _mutant(
        "seccomp: typing into a terminal", "sandbox/seccomp.py", "(0x5401, 0x5413,",
        "(0x5401, 0x5412, 0x5413,", "sandbox_walls::test_arguments_that_are_let_through",
    ),
    _mutant(
        "seccomp: clone into namespaces", "sandbox/seccomp.py",
        "_step(_JUMP_BITS, NEW_NAMESPACES, 0, 1)", "_step(_JUMP_BITS, 0, 0, 1)",
        "sandbox_walls::test_arguments_that_are_let_through",
    ),
    _mutant(
        "seccomp: clone3", "sandbox/seccomp.py",
        "[_step(_RETURN, _ERRNO | errno.ENOSYS)]", "[_step(_RETURN, _ALLOW)]",
        "sandbox_walls::test_arguments_that_are_let_through",
    ),
    _mutant(
        "seccomp: other architectures", "sandbox/seccomp.py", "_step(_RETURN, _KILL)",
        "_step(_RETURN, _ALLOW)",
        "sandbox_start::test_filter_lets_the_listed_calls_through_and_no_other",
    ),
    _mutant(
        "seccomp: what is unknown", "sandbox/seccomp.py",
        "bodies.get(number, [_step(_RETURN, _ERRNO | errno.EPERM)])",
        "bodies.get(number, [_step(_RETURN, _ALLOW)])",
        "sandbox_walls::test_forbidden_calls",
    ),
]

_RIGHTS = [
    _mutant(
        "capabilities dropped", _JAIL, "            linux.drop_capabilities()\n", "",
        "sandbox_walls::test_no_capability",
    ),
    _mutant(
        "zygote's capabilities dropped", _ZYGOTE, "    linux.drop_capabilities()\n", "",
        "sandbox_walls::test_zygote_has_let_go_of_the_host",
    ),
    _mutant(
        "no new privileges", _JAIL, "            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)\n", "",
        "sandbox_walls::test_no_way_to_gain_one",
    ),
    _mutant(
        "nobody on the host", "sandbox/start.py",
        "_unused_ids() if os.geteuid() == 0 else (os.geteuid(), os.getegid())",
        "(os.geteuid(), os.getegid())", "sandbox_walls::test_is_nobody_on_the_host",
    ),
    _mutant(
        "root's groups left", _ZYGOTE, "        os.setgroups([])\n", "        pass\n",
        "sandbox_start::test_groups_of_root_stay_outside",
    ),
    _mutant("umask", _JAIL, "os.umask(0o077)", "os.umask(0o022)",
            "sandbox_walls::test_files_are_its_own"),
    _mutant("work folder private", _JAIL, ",mode=0700", ",mode=0777",
            "sandbox_walls::test_work_folder_is_private"),
    _mutant(
        "descriptors closed", _JAIL,
        "    os.closerange(program.CHANNEL + (len(files) > CHANNEL), HIGHEST_FD)\n", "",
        "sandbox_walls::test_descriptors",
    ),
    _mutant(
        "environment cleared", "sandbox/start.py", "env=ENVIRONMENT",
        "env=os.environ | ENVIRONMENT", "sandbox_walls::test_environment_is_empty",
    ),
    _mutant(
        "no site-packages' code", "sandbox/start.py", '"-s", "-S",', '"-s",',
        "sandbox_walls::test_interpreter_has_run_no_code_of_the_host",
    ),
    _mutant(
        "killed first for memory", _JAIL, '    _write_proc(proc, "oom_score_adj", "1000")\n', "",
        "sandbox_walls::test_killed_first_when_memory_runs_out",
    ),
    _mutant(
        "inputs sealed", _JOBS, "    fcntl.fcntl(file, _F_ADD_SEALS, _SEALS)\n", "",
        "sandbox_walls::test_what_it_is_given_cannot_be_written",
    ),
    _mutant(
        "no weaker jail", "sandbox/start.py",
        '            raise ConfigError(_refusal(report["error"], report["errno"]))\n',
        "            return start(False)\n",
        "sandbox_start::test_refusal_says_what_to_enable",
        "sandbox::test_refuses_to_start_without_namespaces",
    ),
    _mutant(
        "control group made", "sandbox/cgroups.py",
        "    made = [folder for folder, values in folders.items() if _make(folder, values)]\n",
        "    made = []\n", "sandbox_walls::test_control_group_of_either_version",
    ),
    _mutant(
        "control group entered", "sandbox/start.py", "            cgroup.add(process.pid)\n",
        "            pass\n", "sandbox_walls::test_control_group",
    ),
    _mutant(
        "control group's memory", "sandbox/executor.py",
        "ZYGOTE_BYTES + PROGRAMS * (limits.memory_bytes + limits.file_bytes)", "1 << 50",
        "sandbox_walls::test_control_group",
    ),
    _mutant(
        "control group's processes", "sandbox/executor.py",
        "8 + PROGRAMS * (limits.processes + 4)", "1 << 20", "sandbox_walls::test_control_group",
    ),
    _mutant(
        "control groups of the dead", "sandbox/cgroups.py",
        '        if not Path(f"/proc/{owner}").exists():\n            _remove(folder)\n', "",
        "sandbox_walls::test_control_groups_of_the_dead_are_removed",
    ),
]

_ENDS = [
    _mutant(
        "wall deadline", _JOBS,
        '                if left <= 0:\n                    return "timeout"\n', "",
        "sandbox::test_states[jailed]",
    ),
    _mutant(
        "wall deadline of calls", _JOBS, "        self.channel.settimeout(left)\n",
        "        self.channel.settimeout(None)\n",
        "sandbox::test_states[jailed]",
    ),
    _mutant(
        "CPU time of children", _JOBS,
        "if report.cpu_s >= self.limits.cpu_s * (CPU_SLACK if killed else 1):",
        "if killed and report.cpu_s >= self.limits.cpu_s * CPU_SLACK:",
        "sandbox::test_cpu_time_of_children_counts",
    ),
    _mutant(
        "CPU time of calls", "sandbox/executor.py",
        "        if job.cpu_s >= limits.cpu_s:\n"
        '            return Outcome("timeout", cpu_s=job.cpu_s)\n', "",
        "code_verifier::test_calls_and_their_children_count_as_cpu_time",
    ),
    _mutant(
        "output bound", _JOBS, "if len(self._stdout) > self.limits.output_bytes:", "if False:",
        "sandbox::test_states[jailed]",
    ),
    _mutant(
        "errors' bound", _JOBS, "        del self._stderr[:-ERROR_BYTES]\n", "",
        "sandbox::test_states[jailed]",
    ),
    _mutant(
        "message bound", _JOBS, "        if length > MESSAGE_BYTES:\n",
        "        if length > 1 << 40:\n",
        "sandbox_walls::test_a_message_too_large_to_be_one_is_not_waited_for",
    ),
    _mutant(
        "killed at the end", _ZYGOTE,
        "                    signal.pidfd_send_signal(ended.process, signal.SIGKILL)\n",
        "                    pass\n", "sandbox_walls::test_stop_ends_every_process",
    ),
    _mutant(
        "end awaited", _JOBS,
        "                while self._take_report():\n                    pass\n", "",
        "sandbox_walls::test_stop_ends_every_process",
    ),
    _mutant(
        "daemons killed without walls", _ZYGOTE,
        "            os.killpg(ended.pid, signal.SIGKILL)\n", "            pass\n",
        "sandbox::test_open_programs_leave_nothing",
    ),
    _mutant(
        "folders removed without walls", _ZYGOTE, "        _remove_folder(ended.folder)\n", "",
        "sandbox::test_open_programs_leave_nothing",
    ),
    _mutant(
        "gone with the process outside", _ZYGOTE,
        "    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)\n", "",
        "sandbox_walls::test_all_goes_with_the_process_that_waits_outside",
    ),
    _mutant(
        "gone with the owner", _ZYGOTE, "    if not message:\n        os._exit(0)\n",
        "    while not message:\n        select.select([], [], [])\n",
        "sandbox_start::test_zygote_ends_with_its_owner",
    ),
    _mutant(
        "lost zygote replaced", "sandbox/executor.py",
        "                self._start()\n                return attempt()\n",
        "                raise\n", "sandbox_walls::test_lost_zygote_is_replaced",
    ),
    _mutant(
        "copies of the zygote made as forks are", "sandbox/linux.py",
        "        _after_fork_child()\n", "",
        "sandbox::test_a_clone_is_a_fork_to_the_interpreter",
    ),
]

# What passes between a jail and the outside --------------------------------------------------

_CODEC = "sandbox/codec.py"
_WIRE = [
    _mutant(
        "codec: exact types", _CODEC, "    kind = type(value)\n    if depth",
        "    kind = type(value)\n"
        "    if kind not in (bool, float, complex):\n"
        "        kind = next((k for k in (*_BODY, *_ITEMS) if isinstance(value, k)), kind)\n"
        "    if depth",
        "sandbox_codec::test_other_types_are_refused",
    ),
    _mutant(
        "codec: no instance of a subclass", _CODEC, "            return convert(value)\n",
        "            return value\n", "sandbox_codec::test_plain_leaves_exact_types_and_is_bounded",
    ),
    _mutant(
        "codec: size", _CODEC, "    if len(out) > limit:\n", "    if len(out) > 1 << 40:\n",
        "sandbox_codec::test_depth_size_and_circles_are_bounded",
    ),
    _mutant(
        "codec: depth written", _CODEC,
        "    kind = type(value)\n    if depth > MAX_DEPTH:\n",
        "    kind = type(value)\n    if depth > 1 << 20:\n",
        "sandbox_codec::test_depth_size_and_circles_are_bounded",
    ),
    _mutant(
        "codec: depth made plain", _CODEC,
        'a deque, equal to no list, is left to be refused.\n    """\n    if depth > MAX_DEPTH:\n',
        'a deque, equal to no list, is left to be refused.\n    """\n    if depth > 1 << 20:\n',
        "sandbox_codec::test_plain_leaves_exact_types_and_is_bounded",
    ),
    _mutant(
        "codec: depth read", _CODEC,
        "-> tuple[Any, int]:\n    if depth > MAX_DEPTH:\n",
        "-> tuple[Any, int]:\n    if depth > 1 << 20:\n",
        "sandbox_codec::test_depth_size_and_circles_are_bounded",
    ),
    _mutant(
        "codec: announced counts", _CODEC,
        '    if count * (2 if tag == b"d" else 1) > len(data) - at:\n', "    if False:\n",
        "sandbox_codec::test_announced_counts_are_checked_before_memory_is_taken",
    ),
    _mutant(
        "codec: nothing after the value", _CODEC, "    if end != len(data):\n", "    if False:\n",
        "sandbox_codec::test_depth_size_and_circles_are_bounded",
    ),
    _mutant(
        "codec: no hashing", _CODEC, "    if not hashing:\n", "    if False:\n",
        "sandbox_codec::test_colliding_keys_cost_nothing_outside",
    ),
    _mutant(
        "replies read without hashing", _JOBS, "decode(message, hashing=False)", "decode(message)",
        "code_verifier::test_live_code_bench_shapes[counts]",
    ),
    _mutant(
        "replies checked outside", "sandbox/executor.py", "            read_value(reply)\n", "",
        "attacks_proxy::test_no_malformed_reply_reaches_the_test",
    ),
    _mutant(
        "replies are a value or an error", _JOBS,
        "    if not is_value and not (kinds == [str, str, str] and reply[0] == \"error\"):\n",
        "    if not kinds:\n", "attacks_proxy::test_no_malformed_reply_reaches_the_test",
    ),
    _mutant(
        "no exception ends a test's loop", "sandbox/program.py",
        'ends_loops = name in ("StopIteration", "StopAsyncIteration")', "ends_loops = False",
        "attacks_proxy::test_an_exception_that_would_end_the_test_arrives_as_another",
    ),
    _mutant(
        "no exception ends a test", "sandbox/program.py", "issubclass(kind, Exception)",
        "issubclass(kind, BaseException)",
        "attacks_proxy::test_an_exception_that_would_end_the_test_arrives_as_another",
    ),
    _mutant(
        "a candidate cannot choose to have no verdict", "sandbox/program.py",
        '"failed" if calls else "unsupported"', '"unsupported"',
        "attacks_proxy::test_a_value_too_large_to_be_passed_back_is_a_wrong_one",
    ),
    _mutant(
        "a candidate's exit is no pass", "sandbox/executor.py",
        "            ended = hostile.outcome()\n",
        '            ended = hostile.outcome()\n'
        '            if ended.state == "finished":\n                return "passed", ""\n',
        "attacks_proxy::test_value_is_refused[os_exit-check]",
    ),
    _mutant(
        "an exit code is no answer", "code_verifier.py",
        "right = same_output(outcome.stdout, expected, problem.tolerance)",
        'right = outcome.state == "finished"', "attacks::test_attack_is_contained[exit_zero]",
    ),
    _mutant(
        "a test that calls nothing", "sandbox/program.py",
        '    if not calls:\n        _end_check("unsupported", "test_calls_nothing")\n', "",
        "code_verifier::test_tests_that_cannot_judge_have_no_score",
    ),
    _mutant(
        "expected outputs stay outside", "code_verifier.py",
        "executor.script(code, given.encode(), limits, imports)",
        "executor.script(code, given.encode(), limits, (*imports, expected))",
        "attacks::test_no_answer_is_within_reach",
    ),
    _mutant(
        "programs pass by the zygote", _ZYGOTE, "    data = ancillary[0][2]\n",
        "    data = ancillary[0][2]\n"
        "    kept = os.pread(struct.unpack_from('2i', data)[1], 1 << 20, 0)\n"
        "    main.__dict__.setdefault('programs', []).append(kept)\n",
        "attacks::test_zygote_memory_holds_no_program",
    ),
    _mutant(
        "test's source stays in its jail", "sandbox/executor.py",
        '"entry_point": test["entry_point"]}', '"entry_point": test["entry_point"], **test}',
        "attacks_proxy::test_candidate_cannot_find_the_tests_source",
    ),
    _mutant(
        "test's jail without the candidate", "sandbox/executor.py", '{"mode": "check", **test}',
        '{"mode": "check", **test, "helpers": source}',
        "attacks_proxy::test_test_stays_in_its_own_jail",
    ),
    _mutant(
        "helpers from the prompt", "code_verifier.py", 'test = {"helpers": with_body(stub),',
        'test = {"helpers": f"{with_body(stub)}\\n{code}",',
        "code_verifier::test_helpers_come_from_the_prompt_never_from_the_completion",
    ),
]

# Judging code --------------------------------------------------------------------------------

_CODE, _COMPARE, _TEXT = "code_verifier.py", "code_compare.py", "code_text.py"
_JUDGED = [
    _mutant(
        "padded digits are text", _COMPARE,
        "    if bool(_PADDED.match(ours)) != bool(_PADDED.match(theirs)):\n",
        "    if False:\n", "code_verifier::test_output_comparison",
    ),
    _mutant(
        "all tests or nothing", _CODE,
        "failures[0] if failures else PASSED", "PASSED if PASSED in reasons else failures[0]",
        "code_verifier::test_live_code_bench_shapes[primes]",
    ),
    _mutant(
        "accuracy is all tests", _CODE, "    accuracy = float(reason == PASSED)\n",
        "    accuracy = float(PASSED in reasons)\n", "code_verifier::test_fraction_of_tests",
    ),
    _mutant(
        "a share of the tests by setting alone", _CODE,
        '    if options.score == "all":\n        return Verdict(accuracy',
        '    if options.score == "none":\n        return Verdict(accuracy',
        "code_verifier::test_live_code_bench_shapes[primes]",
    ),
    _mutant(
        "tests of a group are the same", _CODE, "random.Random(key).sample",
        "random.Random().sample", "code_verifier::test_subset_of_tests",
    ),
    _mutant(
        "tests change with the prompt", _CODE, "random.Random(key).sample(tests, most)",
        "list(tests[:most])", "code_verifier::test_subset_of_tests",
    ),
    _mutant(
        "total wall time", _CODE, "wall_left = end - time.monotonic()",
        "wall_left = options.total_s", "code_verifier::test_total_time_is_bounded",
    ),
    _mutant(
        "total CPU time", _CODE, "            cpu_left -= outcome.cpu_s\n", "",
        "code_verifier::test_total_cpu_time_is_bounded",
    ),
    _mutant(
        "one test within the total", _CODE,
        "limits = _at_most(limits_of(options), options.total_s, options.total_s)",
        "limits = limits_of(options)", "code_verifier::test_total_time_is_bounded",
    ),
    _mutant(
        "length of a program", _CODE, "    if len(code) > MAX_CODE_CHARS:\n", "    if False:\n",
        "attacks::test_source_that_is_no_text",
    ),
    _mutant(
        "last block", _TEXT, "named = block if language in PYTHON else named",
        "named = named or (block if language in PYTHON else named)",
        "code_verifier::test_which_block_counts",
    ),
    _mutant(
        "closed blocks alone", _TEXT, "        opening, start = fence, fence.end() + 1\n",
        "        opening, start = fence, fence.end() + 1\n"
        "    if opening is not None:\n"
        "        yield _language(opening), _dedented(opening, text[start:])\n",
        "code_verifier::test_which_block_counts",
    ),
    _mutant(
        "no program from an unfinished thought", _TEXT,
        "    if opened > closed:\n        return None\n", "",
        "code_verifier::test_which_block_counts",
    ),
    _mutant(
        "no program from a thought", _TEXT,
        'max(closed + len("</think>") if closed >= 0 else 0, len(text) - TAIL_CHARS)',
        "max(0, len(text) - TAIL_CHARS)", "code_verifier::test_which_block_counts",
    ),
    _mutant(
        "a program from the end of a text alone", _TEXT, "TAIL_CHARS = 1 << 20",
        "TAIL_CHARS = 1 << 40", "attacks::test_huge_completion",
    ),
    _mutant(
        "bad code problems have no score", _CODE,
        '        return Verdict(None, {}, f"bad_ground_truth:{error}")\n',
        '        return _verdict(options.code, [], f"bad_ground_truth:{error}")\n',
        "code_verifier::test_bad_ground_truth_has_no_score",
    ),
    _mutant(
        "large arguments found at load", _CODE,
        "    return None if reach_the_function(problem) else TOO_LARGE\n", "    return None\n",
        "code_verifier::test_arguments_that_cannot_be_passed_are_found_at_load",
    ),
    _mutant(
        "replaced sandboxes counted", "sandbox/executor.py",
        "                self._num_replaced += 1\n", "",
        "code_verifier::test_a_replaced_sandbox_is_counted",
    ),
    _mutant(
        "repeated keys", _COMPARE,
        "{_key(key) for key, _ in claimed} == expected.keys()",
        "all(_key(key) in expected for key, _ in claimed)",
        "attacks_proxy::test_a_forged_dict_with_a_key_twice_is_not_the_expected_one",
    ),
    _mutant(
        "digits of a key", _COMPARE, "abs(key) < MAX_INT_KEY", "True",
        "code_verifier::test_value_comparison",
    ),
    _mutant(
        "digits of a number", _COMPARE,
        "    if max(len(ours), len(theirs)) > MAX_NUMBER_CHARS:\n        return False\n", "",
        "code_verifier::test_long_tokens_are_compared_as_text",
    ),
]

# Services that are asked over HTTP -----------------------------------------------------------

_HTTP = [
    _mutant(
        "HTTP sandbox: bound of a reply", "sandbox/http_executor.py",
        "                if len(answered) > most:\n                    return None\n", "",
        "sandbox::test_http_output_cannot_choose_to_have_no_verdict",
    ),
    _mutant(
        "HTTP sandbox: no hashing", "sandbox/http_executor.py",
        "codec.decode(data, hashing=False)", "codec.decode(data)",
        "sandbox::test_http_services_in_turn",
    ),
    _mutant(
        "HTTP sandbox: a failing service is passed over", "sandbox/http_executor.py",
        'reply.get("status") in ("Success", "Failed")', '"status" in reply',
        "sandbox::test_http_service_that_fails_is_passed_over",
    ),
    _mutant(
        "HTTP sandbox: no plain function value", "sandbox/http_executor.py",
        "codec.encode(codec.plain(value)).hex()", "codec.encode(repr(value)).hex()",
        "sandbox::test_http_values_and_names_are_those_of_the_jail",
    ),
    _mutant(
        "HTTP: deadline", "http_post.py", "made.get(timeout=timeout_s)", "made.get()",
        "sandbox::test_a_http_service_that_trickles_costs_its_time_and_no_more",
    ),
    _mutant(
        "LLM judge: number of the call", "judge_dialogue.py", "secrets.token_hex(4)", '"00000000"',
        "judge_verifier::test_an_answer_cannot_leave_its_tags",
    ),
    _mutant(
        "LLM judge: turns broken up", "judge_dialogue.py",
        '_CONTROL.sub(lambda match: match.group() + " ", text)', "text",
        "judge_verifier::test_an_answer_cannot_leave_its_tags",
    ),
    _mutant(
        "LLM judge: last line alone", "judge_dialogue.py",
        're.fullmatch(rf"VERDICT-{nonce}: (CORRECT|INCORRECT)", last)',
        're.search(rf"VERDICT-{nonce}: (CORRECT|INCORRECT)", output)',
        "judge_verifier::test_only_the_last_line_is_a_verdict",
    ),
    _mutant(
        "LLM judge: a failure has no score", "judge_verifier.py",
        'Verdict(None, {}, f"judge_{failure.code}")', 'wrong(f"judge_{failure.code}")',
        "judge_verifier::test_a_failure_to_the_end_has_no_score",
    ),
]

# Processes, workers and scores ---------------------------------------------------------------

_WORKER, _CHILD = "deadline_worker.py", "deadline_child.py"
_PROCESSES = [
    _mutant(
        "killed at the deadline", _WORKER,
        "        except TimeoutError:\n            self.close()\n",
        "        except TimeoutError:\n",
        "deadline_worker::test_killed_at_the_deadline_and_replaced",
    ),
    _mutant(
        "deadline of a reply", _WORKER,
        'receive_frame(self._channel, request["timeout_s"], REPLY_LIMIT_BYTES)',
        "receive_frame(self._channel, None, REPLY_LIMIT_BYTES)",
        "deadline_worker::test_killed_at_the_deadline_and_replaced",
    ),
    _mutant(
        "deadline of a request", _WORKER,
        'send_frame(self._channel, request, request["timeout_s"])',
        "send_frame(self._channel, request)",
        "deadline_worker::test_a_large_request_to_a_process_that_does_not_read_ends_in_time",
    ),
    _mutant(
        "memory of a verifier", _CHILD,
        "    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))\n", "",
        "deadline_worker::test_memory_limit_is_an_error_of_the_call",
    ),
    _mutant(
        "size of a reply", "frames.py",
        "    if limit_bytes is not None and length > limit_bytes:\n", "    if False:\n",
        "deadline_worker::test_an_oversized_reply_is_refused",
    ),
    _mutant(
        "a verifier's children killed", _WORKER,
        "        for pid in _descendants(self._process.pid):\n            _kill(pid)\n", "",
        "deadline_worker::test_children_die_too_daemons_included",
    ),
    _mutant(
        "a verifier's daemons adopted", _CHILD,
        "    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)\n", "",
        "deadline_worker::test_children_die_too_daemons_included",
    ),
    _mutant(
        "orphans end", _CHILD,
        '    signal.setitimer(signal.ITIMER_REAL, 2 * request["timeout_s"] + ORPHAN_GRACE_S)\n', "",
        "deadline_worker::test_it_ends_without_its_parent",
    ),
    _mutant(
        "an interrupted call leaves no answer", _WORKER,
        "            self.close()  # read this one's answer\n", "",
        "deadline_worker::test_an_interrupted_call_leaves_no_answer_behind",
    ),
    _mutant(
        "a slow import is no item's fault", _WORKER,
        '            raise FunctionFailed("ImportTimeout", f"{module}: {error}") from None\n',
        "            raise\n", "deadline_worker::test_a_module_that_hangs_is_no_items_fault",
    ),
    _mutant(
        "death by itself told from death from outside", _WORKER,
        "returncode is not None and -returncode not in FROM_OUTSIDE", "returncode is not None",
        "deadline_worker::test_death_by_itself_is_told_from_death_from_outside",
    ),
    _mutant(
        "tried again after a death", "judge.py", "        for attempt in (1, 2):\n",
        "        for attempt in (1,):\n",
        "registry_user_verifier::test_a_process_killed_from_outside_is_tried_again",
    ),
    _mutant(
        "a user's lost verifier gives no score", "judge.py",
        'Verdict(None, {}, "worker_lost")', 'wrong("worker_lost")',
        "registry_user_verifier::test_misbehaviour_is_a_reason_code",
    ),
    _mutant(
        "an error gives no score", "judge.py", 'Verdict(None, {}, f"verifier_error:{kind}")',
        'wrong(f"verifier_error:{kind}")',
        "registry_user_verifier::test_misbehaviour_is_a_reason_code",
    ),
    _mutant(
        "scores are finite", "registry.py",
        "    if score is not None and not np.isfinite(score):\n", "    if False:\n",
        "registry_user_verifier::test_misbehaviour_is_a_reason_code",
    ),
    _mutant(
        "a missing score stays out", "combine.py",
        "    if verdict.score is None:\n"
        "        return replace(verdict, parts=verdict.parts | parts)\n",
        "    verdict = replace(verdict, score=verdict.score or 0.0)\n",
        "combine::test_no_verdict_stays_without_a_score",
    ),
    _mutant(
        "accuracy kept under controls", "combine.py",
        'parts = {"accuracy": verdict.score} | verdict.parts | parts',
        'parts = verdict.parts | parts | {"accuracy": _score(config, verdict.score, parts)}',
        "combine::test_controls_keep_the_accuracy_in_the_parts",
    ),
]

_POOL = [
    _mutant(
        "back-pressure", "pool.py", "w.in_flight < QUEUE_PER_WORKER", "w.in_flight < 1000",
        "reward_pool::test_back_pressure_and_scaling",
    ),
    _mutant(
        "a lost worker's items again", "pool.py", "        for attempt in (1, 2):\n",
        "        for attempt in (1,):\n", "reward_pool::test_a_killed_worker_loses_nothing",
    ),
    _mutant(
        "lost twice has no score", "pool.py", 'Verdict(None, {}, "worker_lost")',
        'Verdict(0.0, {}, "worker_lost")',
        "reward_pool::test_lost_twice_has_no_score_and_the_pool_goes_on",
    ),
    _mutant(
        "lost workers counted", "pool.py", "        self._stats.workers_lost[reason] += 1\n", "",
        "reward_pool::test_a_killed_worker_loses_nothing",
    ),
    _mutant(
        "lost workers replaced", "pool.py",
        "        if not worker.leaving:\n            await self._add_worker()\n", "",
        "reward_pool::test_a_killed_worker_loses_nothing",
    ),
    _mutant(
        "verdicts that came are not made again", "pool.py",
        "worker.handle.score.remote(prompts, completions, done)",
        "worker.handle.score.remote(prompts, completions, 0)",
        "reward_pool::test_verdicts_stream_back_and_survive_their_worker",
    ),
    _mutant(
        "a stuck worker is given up", "pool.py", "asyncio.timeout(deadline)",
        "asyncio.timeout(None)", "reward_pool::test_a_stuck_worker_is_replaced",
    ),
    _mutant(
        "too few completions", "pool.py",
        "if batch is None or done + len(batch.verdicts) > count:", "if batch is None:\n"
        "                        return\n"
        "                    if done + len(batch.verdicts) > count:",
        "reward_pool::test_another_number_of_completions_is_an_error",
    ),
    _mutant(
        "too many completions at once", "pool.py",
        "if batch is None or done + len(batch.verdicts) > count:", "if batch is None:",
        "reward_pool::test_another_number_of_completions_is_an_error",
    ),
    _mutant(
        "too many completions later", "pool.py",
        "                if await self._next(batches, slowest, 1, engine) is not None:\n"
        "                    raise _wrong_count(slowest, count)\n", "",
        "reward_pool::test_another_number_of_completions_is_an_error",
    ),
    _mutant(
        "lost completions are the rollouts' loss", "pool.py",
        "        except ObjectLostError as error:\n"
        '            raise RolloutLost(engine, f"its completions are gone: {error}") from error\n',
        "        except ObjectLostError:\n            return None\n",
        "reward_pool::test_lost_completions_are_the_rollouts_loss",
    ),
    _mutant(
        "a pool without its sandbox does not start", "reward_worker.py",
        "            ensure_sandbox(self._config)\n", "",
        "reward_pool::test_a_machine_that_cannot_judge_code_says_so_at_the_start",
    ),
]

_TRUTHS = [
    _mutant(
        "ground truths under a deadline", "ground_truth.py",
        '            return "ground_truth_timeout"\n', "            return None\n",
        "math_verifier::test_a_hostile_ground_truth_costs_its_own_row",
    ),
    _mutant(
        "ground truths that cannot be read", "math_verifier.py",
        "        if not is_number(form) and not _is_readable(form):\n", "        if False:\n",
        "math_verifier::test_ground_truths_checked_at_load",
    ),
    _mutant(
        "length of a ground truth", "math_verifier.py",
        "        if len(form) > MAX_ANSWER_CHARS:\n", "        if False:\n",
        "math_verifier::test_ground_truths_checked_at_load",
    ),
    _mutant(
        "unknown verifiers refused at load", "ground_truth.py",
        "    if verifier.built_in:\n", "    if True:\n",
        "math_verifier::test_an_unknown_verifier_is_an_error_of_the_data_set",
    ),
    Mutant(
        "bad ground truths are quarantined", "h1r_rl/data/sources.py",
        "reason = reason if problem is None else next(verdicts)", "next(verdicts, None)",
        ("tests/h1r_rl/test_sources.py::test_bad_rows_are_quarantined_with_reasons",),
    ),
]

# Answers in text -----------------------------------------------------------------------------

_TABLE = "math_verifier::test_agreement_table"
_FOUND = "math_verifier::test_where_the_answer_is_found"
_HOSTILE = "math_hostile::test_it_ends_in_time_and_the_next_item_is_served"
_ANSWERS = "answer_text.py"
_MATH = [
    _mutant(
        "math: length of an answer", "math_verifier.py",
        '        return wrong("answer_too_long")\n', "        pass\n",
        "math_verifier::test_an_answer_longer_than_any_is_wrong_unread",
    ),
    _mutant(
        "math: length of a box", _ANSWERS,
        "min(len(text), opening.end() + MAX_ANSWER_CHARS)", "len(text)",
        f"{_HOSTILE}[open boxes before 20 MB]",
    ),
    _mutant(
        "math: number of boxes", _ANSWERS, "MAX_BOXES = 64", "MAX_BOXES = 1 << 30",
        f"{_HOSTILE}[millions of open boxes]",
    ),
    _mutant(
        "math: the end of a text alone", _ANSWERS, "TAIL_CHARS = 4_000", "TAIL_CHARS = 1 << 40",
        _FOUND,
    ),
    _mutant(
        "math: digits of a number", "exact_answer.py", "MAX_NUMBER_CHARS = 60",
        "MAX_NUMBER_CHARS = 1 << 20", "math_verifier::test_no_large_number_is_made_to_compare",
    ),
    _mutant(
        "math: size of an exponent", "exact_answer.py", r"10\^\{?([+-]?\d{1,2})\}?",
        r"10\^\{?([+-]?\d+)\}?", "math_verifier::test_no_large_number_is_made_to_compare",
    ),
    _mutant(
        "math: algebra in the killable process", "registry.py",
        'Verifier("rewards.math_verifier", quick="quick")',
        'Verifier("rewards.math_verifier", place="worker")',
        "math_hostile::test_the_deadline_has_a_reason_of_its_own",
    ),
    _mutant(
        "math: no box of a thought with an answer behind it", _ANSWERS,
        "    return last_boxed(stated) or _answer_line(end_of_answer(text))\n",
        "    return last_boxed(stated) or _answer_line(end_of_answer(text)) or last_boxed(text)\n",
        _FOUND,
    ),
    _mutant(
        "math: no denied answer", _ANSWERS,
        "        if is_denied(tail, anchor.start()):\n", "        if False:\n", _FOUND,
    ),
    _mutant(
        "math: no doubted answer", _ANSWERS,
        "bool(_DENIED.search(before) or _DOUBTED.search(before))", "bool(_DENIED.search(before))",
        _FOUND,
    ),
    _mutant(
        "math: a reason that takes back stays", _ANSWERS,
        "    if reason is not None and not _WEAKENED.search(reason.group()):\n",
        "    if reason is not None:\n", _FOUND,
    ),
    _mutant(
        "math: two boxes are two values", _ANSWERS,
        "            if close > start_after or not _JOINT.fullmatch(gap):\n",
        "            if True:\n",
        "math_verifier::test_naming_two_values_is_not_naming_one",
    ),
    _mutant(
        "math: the last of several boxes", _ANSWERS,
        "            if close > start_after or not _JOINT.fullmatch(gap):\n",
        "            if False:\n",
        _FOUND,
    ),
    _mutant(
        "math: nothing undone", "algebra.py", "return not refuses(answer, truth) and ", "return ",
        "math_verifier::test_restating_the_problem_is_not_solving_it",
    ),
    _mutant(
        "math: no hedges", "commitment.py",
        "        if match.group() not in expected and not by_cases:\n",
        "        if False:\n", _TABLE,
    ),
    _mutant(
        "math: relations", "commitment.py",
        "        if pattern.search(answer) and not pattern.search(truth):\n            if name",
        "        if False:\n            if name", _TABLE,
    ),
    _mutant(
        "math: primes and dots", "commitment.py",
        "hedges(answer, truth) or _marks(answer) != _marks(truth)", "hedges(answer, truth)", _TABLE,
    ),
    _mutant(
        "math: equations left unsolved", "algebra.py",
        "    if not all(_is_solved(equation) for equation in found):\n        return None\n", "",
        "math_verifier::test_what_the_question_asks_for_is_a_name",
    ),
    _mutant(
        "math: inequalities left unsolved", "algebra.py",
        "    if _is_unsolved(found[0]) and not _is_unsolved(gold[0]):\n        return False\n", "",
        _TABLE,
    ),
    _mutant(
        "math: sets are no tuples", "algebra.py",
        '    if {_delimiter(value), _delimiter(other)} == {"set", "tuple"}:\n',
        "    if False:\n", _TABLE,
    ),
    _mutant(
        "math: names have an order beside a tuple", "algebra.py",
        "    value, other = _as_tuples(value, expected.value)\n",
        "    other = expected.value\n", _TABLE,
    ),
    _mutant(
        "math: ratios", "algebra.py",
        "    if in_proportion is not None:\n        return in_proportion\n", "", _TABLE,
    ),
    _mutant(
        "math: times of day", "ratio.py",
        "    if _CLOCK.fullmatch(said) and _CLOCK.fullmatch(meant):\n", "    if False:\n", _TABLE,
    ),
    _mutant(
        "math: nothing equals a division by zero", "algebra.py", " or _is_undefined(gold[0])", "",
        _TABLE,
    ),
    _mutant(
        "math: claims in words", "units.py",
        "    if _another_claim(answer, truth):\n        return False\n", "", _TABLE,
    ),
    _mutant(
        "math: unions of intervals", "algebra.py",
        '    return _BESIDE.sub(r"\\1\\\\cup \\2", text)\n', "    return text\n", _TABLE,
    ),
    _mutant(
        "math: conditions", "condition.py",
        "    return bool(_meanings(said) & _meanings(meant))\n", "    return True\n", _TABLE,
    ),
    _mutant(
        "math: units", "algebra.py",
        "    if not same_kind(found, expected):\n        return False\n", "", _TABLE,
    ),
    _mutant(
        "math: percentages", "exact_answer.py",
        "    if percent == true_percent:\n", "    if False:\n",
        "math_verifier::test_between_percentages_there_is_no_hundred",
    ),
    _mutant(
        "math: bases", "exact_answer.py", "    if base or true_base:\n", "    if False:\n", _TABLE,
    ),
    _mutant(
        "math: names are no products", "exact_answer.py",
        "    if _are_names(answer) and _are_names(truth):\n", "    if False:\n", _TABLE,
    ),
    _mutant(
        "math: few digits are no rounding", "exact_answer.py", "MIN_ROUNDED_DIGITS = 6",
        "MIN_ROUNDED_DIGITS = 1",
        "math_verifier::test_exact_comparison_never_contradicts_the_table",
    ),
]

_LETTER = "choice_verifier::test_no_commitment_is_no_answer"
_CHOICE = [
    _mutant(
        "choice: one letter", "chosen_letter.py",
        "return None if _SECOND_LETTER.match(text, match.end()) else match.group(1)",
        "return match.group(1)", _LETTER,
    ),
    _mutant(
        "choice: one letter in a box", "chosen_letter.py",
        '_SECOND_LETTER.match(rest.lstrip(".):")) or ', "", _LETTER,
    ),
    _mutant(
        "choice: none taken back", "chosen_letter.py", " or _TAKEN_BACK.search(rest)", "", _LETTER,
    ),
    _mutant(
        "choice: several options", "chosen_letter.py", "return None if several else _alone",
        "return _alone", _LETTER,
    ),
    _mutant(
        "choice: none denied", _ANSWERS,
        "bool(_DENIED.search(before) or _DOUBTED.search(before))", "bool(_DOUBTED.search(before))",
        _LETTER,
    ),
    _mutant(
        "choice: none rejected", "chosen_letter.py",
        " and not _REJECTED.match(end, m.end())", "", "choice_verifier::test_letters_found",
    ),
    _mutant(
        "choice: none doubted", "chosen_letter.py", "not is_denied(text, match.start()) and ", "",
        _LETTER,
    ),
    _mutant(
        "choice: none asked", "chosen_letter.py", " and not _ASKED.match(text, match.end())", "",
        _LETTER,
    ),
    _mutant(
        "choice: a box goes before the text", "chosen_letter.py",
        '    if "\\\\boxed" in end:\n        return None\n', "", _LETTER,
    ),
    _mutant(
        "choice: operators are kept", "choice_verifier.py",
        "character in _KEPT or not unicodedata", "not unicodedata", "choice_verifier",
    ),
]

MUTANTS = [
    *_namespaces("zygote's", "unshare"),
    *_namespaces("program's", "clone"),
    *_ROOT,
    *_LIMITS,
    *_CALLS,
    *_RIGHTS,
    *_ENDS,
    *_WIRE,
    *_JUDGED,
    *_HTTP,
    *_PROCESSES,
    *_POOL,
    *_TRUTHS,
    *_MATH,
    *_CHOICE,
]
