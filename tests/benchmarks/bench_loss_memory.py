"""Peak memory of the loss at 48k tokens and 130k words, and of the scan at 48k tokens.

Every figure is the growth of a process of its own over what it held before: the kernel's high-water
mark of resident memory (VmHWM), so libraries' buffers count too.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import torch

from h1r_rl.config.schema import LearnerConfig
from h1r_rl.hybrid.scan import chunked_scan
from h1r_rl.hybrid.token_logprobs import token_logprobs

sys.path.insert(0, str(Path(__file__).parent))
from results_file import metric, write_results  # noqa: E402

TOKENS, WORDS, WIDTH = 49_152, 130_048, 256
CHUNK = LearnerConfig().logprob_chunk_tokens
FEW_TOKENS = 1_024  # products in bfloat16 take minutes on a CPU without instructions for it
SCAN_TOKENS = (8_192, 49_152)
MIB = 2**20


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def growth(make, run) -> int:
    """Bytes by which the high-water mark of `run(*make())` passes the memory held before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    before = status("VmRSS")
    run(*make())
    return status("VmHWM") - before


def loss_inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, requires_grad=True)
    return hidden, torch.randint(0, WORDS, (tokens,)), weight


def chunked_loss(hidden, targets, weight, dtype=None) -> None:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logprobs, _ = token_logprobs(
            hidden, targets, weight, logit_multiplier=0.02, temperature=0.85, chunk_tokens=CHUNK
        )
    logprobs.sum().backward()


def naive_loss(hidden, targets, weight) -> None:
    """Every logit at once, as a plain cross-entropy does."""
    logits = hidden @ weight.T * (0.02 / 0.85)
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()


def scan_inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    heads, dim, state = 8, 64, 64
    shapes = [(tokens, heads, dim), (tokens, heads), (tokens, 1, state), (tokens, 1, state)]
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def scan(x, dt, B, C) -> None:
    heads = x.shape[1]
    A, D = -torch.rand(heads), torch.ones(heads)
    y = chunked_scan(x, torch.nn.functional.softplus(dt), A, B, C, D, (len(x),))
    y.square().mean().backward()


def measured(what: str, tokens: int) -> int:
    """In this process, after a small run has loaded what libraries load at first use."""
    torch.set_num_threads(2)
    runs = {
        "chunked": (loss_inputs, chunked_loss),
        "autocast": (loss_inputs, lambda *given: chunked_loss(*given, dtype=torch.bfloat16)),
        "naive": (loss_inputs, naive_loss),
        "scan": (scan_inputs, scan),
    }
    make, run = runs[what]
    if what == "scan":
        run(*make(256))
    else:
        weight = torch.randn(64, WIDTH, requires_grad=True)
        run(torch.randn(8, WIDTH, requires_grad=True), torch.arange(8), weight)
    return growth(lambda: make(tokens), run)


def peak(what: str, tokens: int) -> int:
    command = [sys.executable, __file__, what, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> None:
    inputs = (WORDS + TOKENS) * WIDTH * 4
    bound = 2 * inputs + 2 * CHUNK * WORDS * 4
    found = peak("chunked", TOKENS)
    half = peak("autocast", FEW_TOKENS)
    half_bound = 2 * (WORDS + FEW_TOKENS) * WIDTH * 4 + 2 * CHUNK * WORDS * 4
    small, large = peak("naive", 2048), peak("naive", 4096)
    naive = large + (large - small) / 2048 * (TOKENS - 4096)
    short, long = (peak("scan", tokens) for tokens in SCAN_TOKENS)
    linearity = long / (SCAN_TOKENS[1] / SCAN_TOKENS[0] * short)
    shape = f"{TOKENS} x {WORDS}, hidden {WIDTH}, chunk {CHUNK}, float32"
    write_results(
        "loss_memory",
        [
            metric("loss_peak_ratio", found / bound, "ratio", "<= 1.1", found <= 1.1 * bound,
                   f"{shape}: {found / MIB:.0f} MiB over {bound / MIB:.0f}"),
            metric("loss_peak_ratio_autocast", half / half_bound, "ratio", "reported", None,
                   f"{FEW_TOKENS} tokens, float32 parameters, bfloat16 products"),
            metric("naive_loss_peak", naive / 2**30, "GiB", "reported", None,
                   f"extrapolated from {small / MIB:.0f} MiB at 2,048 and {large / MIB:.0f} at "
                   f"4,096 tokens; chunked: {found / 2**30:.2f} measured"),
            metric("scan_memory_linearity", linearity, "ratio", "<= 1.1", linearity <= 1.1,
                   f"forward and backward: {long / MIB:.0f} MiB at {SCAN_TOKENS[1]} tokens, "
                   f"{short / MIB:.0f} at {SCAN_TOKENS[0]}; 8 heads x 64, state 64"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measured(sys.argv[1], int(sys.argv[2])))
    else:
        main()
