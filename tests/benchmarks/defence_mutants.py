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
        "    made = []\n", "sandbox_walls::test_control_group",
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
        "attacks_proxy::test_value_is_refused[loops-call]",
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
        "no random numbers shared", "sandbox/linux.py", "        _after_fork_child()\n", "",
        "sandbox::test_programs_do_not_share_random_numbers",
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
        "helpers from the prompt", "code_verifier.py", 'test = {"helpers": stub,',
        'test = {"helpers": f"{stub}\\n{code}",',
        "code_verifier::test_helpers_come_from_the_prompt_never_from_the_completion",
    ),
]

# Judging code --------------------------------------------------------------------------------

_CODE, _COMPARE, _TEXT = "code_verifier.py", "code_compare.py", "code_text.py"
_JUDGED = [
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
]
