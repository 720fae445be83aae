"""The `h1r` command.

Exit codes: 0 done, 1 the run failed, 2 a mistake in what was asked, 130 stopped.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from h1r_rl.errors import RunFailed, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train hybrid Transformer-Mamba reasoning models: SFT, GRPO, evaluation on a Ray cluster.",
)

RunFile = Annotated[Path, typer.Argument(help="The run's YAML, e.g. cluster/runs/tiny-cpu.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, e.g. grpo.steps=3 name=trial.")
]
VERIFY_COLUMNS = "Columns id, prompt, completion, verifier, ground_truth."
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an unfinished run; finished stages are kept.")
]


@app.command()
def run(run_file: RunFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Run all stages: data and model, SFT, GRPO, evaluation after each."""
    _execute(run_file, overrides, resume, only=None)


@app.command()
def sft(run_file: RunFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Run the SFT stage alone (data and base model are prepared if they are not there)."""
    _execute(run_file, overrides, resume, only="sft")


@app.command()
def grpo(run_file: RunFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Run the GRPO stage alone, from the run's SFT model (or its base, without an SFT section)."""
    _execute(run_file, overrides, resume, only="grpo")


@app.command("eval")
def evaluate(run_file: RunFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Evaluate every model that the run has so far."""
    _execute(run_file, overrides, resume, only="evaluate")


@app.command()
def check(run_file: RunFile, overrides: Overrides = None) -> None:
    """Validate a run without starting anything: keys, files, rows, lengths, sampling, sizes."""
    from cluster.check_data import check_files, check_rows
    from cluster.check_machine import check_machine
    from h1r_rl.config.load import load_run

    config = load_run(run_file, overrides or ())
    check_files(config)
    check_machine(config)
    for line in check_rows(config):
        typer.echo(line)
    typer.echo(f"{run_file}: no mistake found")


@app.command()
def verify(
    source: Annotated[Path, typer.Argument(metavar="IN.parquet", help=VERIFY_COLUMNS)],
    target: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="Where the rows go.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of the reward section, e.g. reward.timeout_s=2."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Reward workers; default: one a core.")
    ] = None,
) -> None:
    """Score the completions of a file: the same rows with score, reason and seconds."""
    from cluster.verify import verify_file
    from h1r_rl.config.load import load_reward

    verify_file(source, target, load_reward(overrides or ()), workers)


Dtype = Literal["float32", "bfloat16"]


@app.command()
def selftest(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder of a hybrid model.")],
    dtype: Annotated[Dtype, typer.Option(help="Engine weights, as rollout.dtype.")] = "float32",
    ssm_dtype: Annotated[
        Dtype, typer.Option(help="The engine's SSM state, as rollout.mamba_ssm_cache_dtype.")
    ] = "float32",
    autocast: Annotated[
        Literal["none", "bfloat16"] | None,
        typer.Option(help="As learner.autocast; default: bfloat16 beside a bfloat16 engine."),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each side.")] = 1,
    gpu_memory: Annotated[
        float, typer.Option(help="Share of the GPU that the engine takes beside the learner.")
    ] = 0.4,
    gap_limit: Annotated[
        float | None,
        typer.Option(help="Mean |difference| of log-probabilities allowed; default: by dtypes."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the token ids that are asked.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the folder run its own code.")
    ] = False,
) -> None:
    """Check that engine and learner may be trusted with a model: seven lines, pass or fail.

    Starts one engine and sends it weights as a run does. packing leak: no document of a packed row
    moves another. export round trip: what is written is what is held, and loads again. scan/decode
    floor: engine and learner give the same log-probabilities. tensor values: both compute with the
    same state-space tensors. multipliers alive: none is lost on either side. identical-weights
    reload: pushing the same weights changes nothing. stale prefix: after an update no cached state
    of old weights answers.

    Exit code 0: no line failed; 1: one did (docs/selftest.md says what it means); 2: not a model
    that can be checked.
    """
    from cluster.selftest import Options, run

    run(
        Options(
            folder=model,
            dtype=dtype,
            ssm_dtype=ssm_dtype,
            autocast=autocast,
            device=device,
            threads=threads,
            gpu_memory=gpu_memory,
            gap_limit=gap_limit,
            seed=seed,
            trust_remote_code=trust_remote_code,
        ),
        typer.echo,
    )


@app.command()
def settings(
    section: Annotated[str, typer.Argument(help="Such as grpo or grpo.optimizer.")] = "",
) -> None:
    """Explain every setting of a run file: its default and what it means."""
    from rich.console import Console

    from cluster.settings_table import settings_table

    Console().print(settings_table(section))


RunPath = Annotated[Path, typer.Argument(help="A live run: its folder, or its YAML.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the outcome.")]


@app.command()
def scale(
    run_path: RunPath,
    rollout_actors: Annotated[int | None, typer.Option(min=1, help="Engines to have.")] = None,
    reward_workers: Annotated[int | None, typer.Option(min=1, help="Workers to have.")] = None,
    wait: Wait = 60.0,
) -> None:
    """More or fewer rollout actors and reward workers in a run that is going on.

    In a run with rollout.autoscale: within its bounds; the number stands for its cool_down, then
    the measurements have the word again.
    """
    from cluster.scale import Request

    _ask(run_path, Request(rollout_actors, reward_workers), wait)


@app.command()
def restart(
    run_path: RunPath,
    rollout_actors: Annotated[bool, typer.Option(help="All engines.")] = False,
    learner: Annotated[bool, typer.Option(help="All learner ranks.")] = False,
    wait: Wait = 60.0,
) -> None:
    """Restart one service of a run that is going on, while the others hold or go on."""
    from cluster.scale import Request

    _ask(run_path, Request(restart_rollouts=rollout_actors, restart_learner=learner), wait)


def _ask(run_path: Path, request: Any, wait: float) -> None:
    from cluster.scale import request_of
    from h1r_rl.config.load import load_run
    from h1r_rl.errors import ConfigError

    if not str(request):
        raise ConfigError("nothing is asked for; see the command's --help")
    folder = load_run(run_path).folder if run_path.is_file() else run_path
    outcome, text = request_of(folder, request, wait)
    if outcome == "refused":
        raise ConfigError(text)
    if outcome == "failed":
        raise RunFailed(text)
    if outcome == "waiting":
        text = f"left for the run: it takes {request} up after its present step or stage"
    typer.echo(f"{outcome}: {text}")


def _execute(run_file: Path, overrides: list[str] | None, resume: bool, only: str | None) -> None:
    from cluster.pipeline import execute
    from h1r_rl.config.load import load_run

    execute(load_run(run_file, overrides or ()), resume=resume, only=only)


def main() -> None:
    """Console entry point: mistakes and failures end in one line, not in a traceback."""
    # Also where a shell started us with SIGINT ignored, or a scheduler sends SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"run failed: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:  # typer's own way out of Ctrl-C, which says nothing
        if end.code == 130:
            print("stopped", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
