"""One YAML a run: every section, field, default and what it means.

Invariant: a field exists only if some code reads it (a test walks this schema). Cross-field rules
live in `checks.py`; reading files and overrides in `load.py`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    field_validator,
    model_validator,
)


def _no_bool(value: Any) -> Any:
    """`true` is not the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


def _usable_path(value: Path) -> Path:
    """`~` made out; text that no file system takes is refused before it is asked."""
    try:
        path = value.expanduser()
    except RuntimeError:
        raise ValueError("a path below a home folder that exists") from None
    if "\0" in str(path) or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ValueError("a path of at most 255 bytes a name")
    return path


def _text(pattern: str, expected: str) -> AfterValidator:
    """Text that matches the whole `pattern`; `expected` says so in words."""

    def check(value: str) -> str:
        if not (re.fullmatch(pattern, value) and value.isprintable()):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


# Numbers in quotes are taken for floats alone: YAML reads 1e-4, without a point, as text.
Int = Annotated[int, Strict()]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
NonNegativeFloat = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
Fraction = Annotated[NonNegativeFloat, Field(le=1)]
BelowOne = Annotated[NonNegativeFloat, Field(lt=1)]
Flag = Annotated[bool, Strict()]
UserPath = Annotated[Path, AfterValidator(_usable_path)]
FolderName = Annotated[
    str, _text(r"(?!\.\.?$)[^/]{1,60}", "a plain folder name of at most 60 characters")
]
SettingName = Annotated[
    str, _text(r"(?!mean_length$)[\w-][\w.-]*", "a name of letters, digits, '.', '_' and '-'")
]
HttpAddress = Annotated[str, _text(r"https?://[^\s/]+.*", "an address such as http://host:8080")]
JobsAddress = Annotated[
    str, _text(r"local|https?://[^\s/]+.*", "'local' or a Jobs address such as http://head:8265")
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ClusterConfig(Section):
    """Where the run lives."""

    address: JobsAddress = Field(
        default="local",
        description="'local' starts an embedded Ray for this run; else the Jobs address of a "
        "running cluster, e.g. http://head:8265.",
    )
    num_cpus: PositiveInt | None = Field(
        default=None,
        description="CPUs the embedded Ray may hand out (local only); default: all cores, "
        "at least 4.",
    )
    dashboard_port: Annotated[Int, Field(ge=0, le=65535)] = Field(
        default=0,
        description="Port of the embedded Ray's dashboard and Jobs API (local only); 0: any free.",
    )
    start_timeout_s: PositiveFloat = Field(
        default=300.0, description="Deadline for a stage's services (engines, learners) to come up."
    )


class TinyModelConfig(Section):
    """A Falcon-H1 built here, with multipliers in the pattern of the real ones."""

    hidden_size: PositiveInt = Field(default=128, description="Width.")
    num_layers: PositiveInt = Field(default=2, description="Hybrid layers.")
    num_heads: PositiveInt = Field(default=4, description="Attention heads.")
    num_kv_heads: PositiveInt = Field(default=2, description="Key/value heads.")
    head_dim: PositiveInt = Field(default=32, description="Attention head width.")
    intermediate_size: PositiveInt = Field(default=384, description="MLP width.")
    mamba_heads: PositiveInt = Field(default=8, description="Mamba-2 heads.")
    mamba_head_dim: PositiveInt = Field(default=32, description="Mamba-2 head width.")
    mamba_d_state: PositiveInt = Field(default=32, description="SSM state size.")
    mamba_n_groups: PositiveInt = Field(default=1, description="B/C groups of Mamba-2.")
    mamba_chunk_size: PositiveInt = Field(default=32, description="Chunk length of the scan.")
    mamba_rms_norm: Flag = Field(
        default=False, description="Grouped RMSNorm before the out projection."
    )
    tie_embeddings: Flag = Field(default=False, description="Share the embedding with the head.")
    max_position: PositiveInt = Field(default=512, description="Longest sequence, in tokens.")
    multiplier_scale: PositiveInt = Field(
        default=4,
        description="Multipliers are those of a Falcon-H1 this many times as wide: at the tiny "
        "width itself the closed form gives 35 for keys and 0.3 for the head, and no one learning "
        "rate suits both.",
    )


class LoraConfig(Section):
    """Low-rank adapters on a frozen model; engines and exports get them merged into it."""

    rank: PositiveInt = Field(default=16, description="Columns of an adapter.")
    alpha: PositiveFloat = Field(
        default=32.0, description="An adapter's product counts alpha / rank times."
    )
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Names of the adapted layers, such as [q_proj, in_proj]; default: every "
        "projection of attention and MLP, and the mixers' in_proj. Never conv1d or out_proj.",
    )


class ModelConfig(Section):
    """The policy that the run starts from."""

    path: UserPath | None = Field(
        default=None, description="Hugging Face folder of a hybrid model."
    )
    tiny: TinyModelConfig | None = Field(
        default=None,
        description="Build a tiny Falcon-H1 instead of loading one (exactly one of the two).",
    )
    system_prompt: str | None = Field(
        default=None,
        description="System turn put before every problem; None leaves it to the template.",
    )
    lora: LoraConfig | None = Field(
        default=None,
        description="Train adapters alone, in SFT and in GRPO, at zero_stage 0 to 2; left out: "
        "every parameter is trained.",
    )
    trust_remote_code: Flag = Field(
        default=False,
        description="Let a model folder run its own Python code; off unless asked for.",
    )


class GenerateDataConfig(Section):
    """Seeded arithmetic problems written as Parquet, disjoint by construction and checked."""

    sft_problems: PositiveInt = Field(default=20_000, description="Rows of the SFT split.")
    rl_problems: PositiveInt = Field(default=8_000, description="Rows of the RL split.")
    evaluation_problems: PositiveInt = Field(default=500, description="Rows of the held-out split.")
    min_operands: Annotated[Int, Field(ge=2)] = Field(default=4, description="Shortest expression.")
    max_operands: Annotated[Int, Field(ge=2)] = Field(default=6, description="Longest expression.")
    modulus: Annotated[Int, Field(ge=2)] = Field(
        default=10, description="Results are taken modulo this."
    )
    worked_fraction: Fraction = Field(
        default=0.35,
        description="Share of SFT traces that reason step by step; the rest answer at once, so "
        "that RL has something to select.",
    )
    unformatted_fraction: Fraction = Field(
        default=0.0,
        description="Share of SFT traces without a think block, for experiments on the format.",
    )
    code_fraction: Fraction = Field(
        default=0.0,
        description="Share of the SFT and RL rows that are one-line programs, judged by running "
        "them in the sandbox. Left out with a notice where the kernel refuses namespaces.",
    )
    code_careful_fraction: Fraction = Field(
        default=0.35,
        description="Share of the code traces that count brackets first and are right.",
    )
    code_steps: Annotated[Int, Field(ge=2)] = Field(
        default=3, description="Operators of every code problem."
    )
    evaluation_code_problems: PositiveInt = Field(
        default=100, description="Held-out code problems, where code_fraction is not 0."
    )


class DataConfig(Section):
    """Problems: generated here, or the user's own Parquet/JSONL files."""

    generate: GenerateDataConfig | None = Field(
        default=None, description="Generate the tiny task's splits into the run folder."
    )
    sft: tuple[UserPath, ...] = Field(
        default=(), description="Files with messages + response (SFT traces)."
    )
    rl: tuple[UserPath, ...] = Field(
        default=(), description="Files with prompts and ground truth for GRPO."
    )
    evaluation: tuple[UserPath, ...] = Field(
        default=(), description="Held-out files, same columns as rl."
    )
    evaluation_code: tuple[UserPath, ...] = Field(
        default=(),
        description="Held-out code problems, reported apart: `evaluation_code` in result.json.",
    )
    id_column: str = Field(default="prompt_id", description="Column with a unique id per problem.")
    prompt_column: str = Field(
        default="messages", description="Column with chat messages, or with the user's text."
    )
    response_column: str = Field(default="response", description="Column with the SFT answer text.")
    ground_truth_column: str = Field(
        default="ground_truth", description="Column the verifier reads."
    )
    verifier_column: str = Field(
        default="verifier",
        description="Column naming the verifier; rows without it use default_verifier.",
    )
    default_verifier: str = Field(default="math", description="Verifier for rows that name none.")
    max_left_out: Fraction = Field(
        default=0.1,
        description="Rows that nothing can be asked or verified with are left out and counted; a "
        "larger share of a split than this ends the run before it starts.",
    )


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = Field(description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="After warm-up; linear and cosine end at final_lr_ratio x peak.",
    )
    warmup_steps: NonNegativeInt = Field(
        default=10, description="Linear warm-up, in optimizer steps."
    )
    final_lr_ratio: Fraction = Field(default=0.0, description="Last learning rate over the peak.")
    betas: tuple[BelowOne, BelowOne] = Field(default=(0.9, 0.95), description="AdamW betas.")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="AdamW weight decay.")
    gradient_clip: PositiveFloat = Field(default=1.0, description="Global gradient norm clip.")


class SFTConfig(Section):
    """Supervised fine-tuning on reasoning traces; loss on response tokens only."""

    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(learning_rate=1024e-6, schedule="linear", betas=(0.9, 0.999)),
        description="Optimizer; the defaults are the recipe's.",
    )
    steps: PositiveInt = Field(description="Optimizer steps.")
    batch_size: PositiveInt = Field(default=512, description="Traces a step, over all ranks.")
    max_length: PositiveInt = Field(
        default=36_864, description="Tokens; longer traces are trimmed on the right and counted."
    )


class KLConfig(Section):
    """Optional pull towards a frozen reference (the policy that GRPO starts from)."""

    coefficient: NonNegativeFloat = Field(default=0.0, description="0 loads no reference model.")
    estimator: Literal["k1", "k2", "k3"] = Field(default="k3", description="Schulman's estimators.")


class CorrectionConfig(Section):
    """Importance weight of the proximal policy against the engine's, for proximal: recompute."""

    kind: Literal["none", "tis", "mask"] = Field(
        default="none",
        description="tis: min(w, cap). mask (IcePop): token dropped outside [low, high].",
    )
    level: Literal["token", "sequence"] = Field(
        default="token", description="Where the weight is taken."
    )
    cap: PositiveFloat = Field(default=2.0, description="C of truncated importance sampling.")
    low: NonNegativeFloat = Field(default=0.5, description="Lower bound of the mask.")
    high: PositiveFloat = Field(default=5.0, description="Upper bound of the mask.")


class AlgorithmConfig(Section):
    """The policy-gradient objective. Presets set these by name."""

    advantage: Literal["grpo", "dr_grpo", "rloo"] = Field(
        default="grpo", description="(r - mean)/std; r - mean; r - mean of the others."
    )
    advantage_std: Literal["group", "batch"] = Field(
        default="group", description="Which std divides, for advantage: grpo."
    )
    policy_loss: Literal["clip", "dual_clip", "gspo", "cispo"] = Field(
        default="clip", description="Surrogate."
    )
    clip_low: NonNegativeFloat = Field(
        default=0.2, description="Lower clip distance; gspo: 3e-4, cispo: 1 (no lower bound)."
    )
    clip_high: NonNegativeFloat = Field(
        default=0.28, description="Upper clip distance; gspo: 4e-4, cispo: 4."
    )
    dual_clip: Annotated[PositiveFloat, Field(gt=1)] = Field(
        default=3.0, description="c of dual clip, for A < 0."
    )
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        default="token_mean",
        description="Mean over the batch's tokens; mean over answers of their token mean; sum over "
        "tokens / (answers x max_response_tokens).",
    )
    proximal: Literal["behaviour", "recompute"] = Field(
        default="behaviour",
        description="behaviour: the ratio is against the engine's logprobs. recompute: against the "
        "learner's own first forward, with `correction` as a further weight; with one optimizer "
        "step a batch that ratio is 1 and its clip bounds cut nothing.",
    )
    correction: CorrectionConfig = Field(
        default=CorrectionConfig(), description="Only for recompute."
    )
    kl: KLConfig = Field(default=KLConfig(), description="Reference KL term.")
    positive_ce: NonNegativeFloat = Field(
        default=0.0, description="Weight of cross-entropy on correct samples' tokens."
    )
    overlong_filtering: Flag = Field(
        default=False,
        description="Samples that met the length limit stay out of the loss and of mean and std.",
    )

    @model_validator(mode="before")
    @classmethod
    def _bounds_of_the_loss(cls, raw: Any) -> Any:
        """A ratio of whole answers and one that is only a weight are clipped elsewhere."""
        bounds = {"gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}.get(
            str(raw.get("policy_loss")) if isinstance(raw, dict) else ""
        )
        return {"clip_low": bounds[0], "clip_high": bounds[1]} | raw if bounds else raw


class TripwiresConfig(Section):
    """Alarms: logged warnings and `tripwire/*` metrics; docs/tripwires has a page for each."""

    window: PositiveInt = Field(default=5, description="Steps that shares and entropy average.")
    logprob_gap_stale_stop: PositiveFloat = Field(
        default=0.5,
        description="Mean |log pi_learner - log mu| on tokens of answers that older weights had a "
        "part in above which the run stops; training moves these apart too.",
    )
    entropy_fall: Fraction = Field(
        default=0.1, description="Warn below this share of the first steps' entropy."
    )
    entropy_rise: PositiveFloat = Field(
        default=3.0, description="Warn above this multiple of the first steps' entropy."
    )
    zero_signal_share: Fraction = Field(
        default=0.8, description="Warn above this share of groups whose rewards do not differ."
    )
    truncation_share: Fraction = Field(
        default=0.25, description="Warn above this share of answers cut by the length limit."
    )
    grad_norm_jump: PositiveFloat = Field(
        default=10.0, description="Warn above this multiple of the last steps' median norm."
    )


class GRPOConfig(Section):
    """Reinforcement learning with verifiable rewards."""

    preset: Literal["grpo", "dr-grpo", "dapo", "gspo", "cispo", "falcon-h1r"] | None = Field(
        default=None, description="Named set of algorithm settings; explicit ones win."
    )
    algorithm: AlgorithmConfig = Field(default=AlgorithmConfig(), description="Objective.")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(learning_rate=2e-6),
        description="Optimizer; defaults are the recipe's.",
    )
    steps: PositiveInt = Field(description="Optimizer steps.")
    prompts_per_step: PositiveInt = Field(default=128, description="Groups a step.")
    samples_per_prompt: Annotated[Int, Field(ge=2)] = Field(
        default=16, description="Group size; one sample has no baseline to be measured against."
    )
    max_staleness: NonNegativeInt = Field(
        default=1,
        description="A group is trained at most this many weight versions after its admission; 0 "
        "is synchronous and exactly on-policy.",
    )
    max_backfill: NonNegativeInt = Field(
        default=8,
        description="Extra prompts admitted for one step in place of groups without signal, in "
        "multiples of prompts_per_step.",
    )
    generation_cache: NonNegativeInt = Field(
        default=0,
        description="Groups generated beyond what the steps need and kept for later ones; costs "
        "ceil(generation_cache / prompts_per_step) versions of staleness on top of max_staleness.",
    )
    log_samples_every: PositiveInt = Field(
        default=10, description="Steps between logged sample tables."
    )
    logprob_gap_warn: PositiveFloat | None = Field(
        default=None,
        description="Mean |log pi_learner - log mu| on answers sampled by the current weights "
        "alone above which a warning is logged; default: by the engine's dtypes, from measurement.",
    )
    logprob_gap_stop: PositiveFloat | None = Field(
        default=None,
        description="The same above which the run stops: engine and learner no longer hold the "
        "same model. Default: by the engine's dtypes, from measurement.",
    )
    tripwires: TripwiresConfig = Field(
        default=TripwiresConfig(), description=TripwiresConfig.__doc__
    )


class AutoscaleConfig(Section):
    """Engines added and removed by themselves in the GRPO stage, one at a time between two steps:
    one is added where the learner waits for groups, one leaves where engines idle."""

    min: PositiveInt = Field(default=1, description="Fewest engines.")
    max: PositiveInt = Field(description="Most engines.")
    dead_band: Fraction = Field(
        default=0.1,
        description="Nothing changes unless the learner's waiting share of a step and the engines' "
        "idle share (of those that would be left, for one to leave) are further apart than this.",
    )
    patience: PositiveInt = Field(
        default=5,
        description="Steps in a row that must ask for the same change; with slots for several "
        "steps one step more for each further one, as groups come in waves of so many.",
    )
    cool_down: NonNegativeInt = Field(
        default=10,
        description="Steps after the start and after a change, asked for or not, that do not "
        "count.",
    )


class RolloutConfig(Section):
    """vLLM engines, one Ray actor each."""

    actors: PositiveInt = Field(default=1, description="Engines.")
    autoscale: AutoscaleConfig | None = Field(
        default=None,
        description="Bounds between which engines come and go by the measured bubble, from "
        "`actors` at the start; left out: `actors` until `h1r scale` asks for another number.",
    )
    tensor_parallel: PositiveInt = Field(
        default=1, description="GPUs an engine; must divide the heads."
    )
    num_cpus: PositiveFloat = Field(default=1.0, description="Ray CPUs an actor reserves.")
    num_gpus: NonNegativeFloat = Field(default=0.0, description="Ray GPUs an actor reserves.")
    threads: PositiveInt = Field(
        default=1, description="CPU threads of an engine (CPU engines only)."
    )
    temperature: PositiveFloat = Field(
        default=1.0, description="Sampling temperature of RL rollouts."
    )
    top_p: Fraction = Field(
        default=1.0,
        description="Must be 1: truncated sampling makes the importance ratio undefined.",
    )
    max_response_tokens: PositiveInt = Field(description="Length limit of one answer.")
    max_num_seqs: PositiveInt = Field(default=256, description="Concurrent sequences an engine.")
    max_model_len: PositiveInt = Field(description="Prompt + response, in tokens.")
    kv_cache_gib: PositiveFloat | None = Field(
        default=None,
        description="KV and Mamba state memory (CPU engines); GPUs use gpu_memory_utilization.",
    )
    gpu_memory_utilization: Annotated[PositiveFloat, Field(le=1)] = Field(
        default=0.9, description="Share of GPU memory an engine takes."
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Engine weights.")
    mamba_ssm_cache_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="SSM state; bfloat16 widens the gap between engine and learner.",
    )
    prefix_caching: Flag = Field(
        default=True,
        description="Reuse of prompt prefixes; entries are salted with the weight version. On CPU "
        "engines groups of 8 behind 1,024 prompt tokens were 2.5 to 3.2 times as fast with it "
        "in three measurements, behind 32 tokens 0.92 to 1.07 times.",
    )
    enforce_eager: Flag = Field(default=False, description="No compilation or CUDA graphs.")
    running_state: Literal["keep", "recompute"] = Field(
        default="keep",
        description="At a weight update running requests keep their KV/SSM state, or are prefilled "
        "again under the new weights (which lost six times the tokens at short contexts).",
    )
    request_seeds: Flag = Field(
        default=False,
        description="A sampling seed for every request, of (run seed, prompt, pass, sample). vLLM "
        "then samples request by request in Python, which is slow.",
    )
    request_timeout_s: PositiveFloat = Field(
        default=600.0,
        description="An engine that owes samples and makes no token for this long is lost.",
    )
    drain_timeout_s: PositiveFloat = Field(
        default=120.0,
        description="What an engine that leaves may take to finish its samples; the rest is "
        "issued again elsewhere.",
    )
    max_replacements: NonNegativeInt = Field(
        default=8,
        description="Engines started in place of lost ones, in all; then the run goes on with "
        "those that are left.",
    )


class HttpSandboxConfig(Section):
    """Programs run by services elsewhere."""

    http: HttpAddress | Annotated[tuple[HttpAddress, ...], Field(min_length=1)] = Field(
        description="Address, or several used in turn, of SandboxFusion-compatible services, such "
        "as http://host:8080; /run_code is added."
    )

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.http,) if isinstance(self.http, str) else self.http


class CodeConfig(Section):
    """The code verifier: what passes, and what one program may use."""

    score: Literal["all", "fraction"] = Field(
        default="all", description="1 only when every test passes, or the share of tests that pass."
    )
    max_tests: PositiveInt | None = Field(
        default=None,
        description="Judge by a random subset of at most this many tests, one per problem.",
    )
    cpu_s: PositiveFloat = Field(
        default=4.0, description="CPU time of a process, in whole seconds."
    )
    wall_s: PositiveFloat = Field(default=8.0, description="Wall time of one test.")
    total_s: PositiveFloat = Field(
        default=30.0,
        description="Wall time, and CPU time, of one completion's tests in all: a test has what "
        "is left where that is less than its own.",
    )
    memory_mib: PositiveInt = Field(
        default=512,
        description="Address space of a process; times processes, where cgroups are missing.",
    )
    output_mib: PositiveInt = Field(default=4, description="Standard output of one test.")
    file_mib: PositiveInt = Field(default=16, description="All files that a program writes.")
    processes: NonNegativeInt = Field(
        default=16, description="Processes and threads beside the first (Linux 5.14 and later)."
    )


JUDGE_TEMPLATE = """\
Question:
{question}

Reference answer:
{ground_truth}

Answer to grade:
{answer}

Does the answer to grade give the reference answer's result?"""


class JudgeConfig(Section):
    """A language model that judges answers, over an OpenAI-compatible interface."""

    url: str = Field(
        description="Base address such as http://host:8000/v1; /chat/completions is added."
    )
    model: str = Field(description="The model's name there.")
    key_env: str | None = Field(
        default=None, description="Environment variable that holds the key, where one is needed."
    )
    deadline_s: PositiveFloat = Field(default=60.0, description="One verdict with its retries.")
    attempt_s: PositiveFloat = Field(default=30.0, description="One request.")
    retries: NonNegativeInt = Field(
        default=3, description="Further attempts where the service fails or its verdict is unclear."
    )
    backoff_s: NonNegativeFloat = Field(
        default=1.0, description="Pause before the first of them, doubled before each next one."
    )
    max_tokens: PositiveInt = Field(default=1024, description="What the judge may write.")
    template: str = Field(
        default=JUDGE_TEMPLATE,
        description="The question put to the judge, with {question}, {ground_truth} and {answer}; "
        "how it has to answer is added.",
    )

    @property
    def endpoint(self) -> str:
        return self.url.rstrip("/") + "/chat/completions"

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"expected an address such as http://host:8000/v1, found '{url}'")
        return url

    @field_validator("template")
    @classmethod
    def _has_its_fields(cls, template: str) -> str:
        expected = {"question", "ground_truth", "answer"}
        try:
            found = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ValueError(f"{error}; write {{{{ and }}}} for braces") from None
        if found != expected:
            raise ValueError(
                f"expected the fields {', '.join(sorted(expected))}, found "
                f"{', '.join(sorted(found)) or 'none'}; write {{{{ and }}}} for braces"
            )
        return template


# The first word of a letter's name in Unicode.
Script = Literal[
    "ARABIC", "ARMENIAN", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "ETHIOPIC", "GEORGIAN",
    "GREEK", "HANGUL", "HEBREW", "HIRAGANA", "KATAKANA", "LATIN", "TAMIL", "TELUGU", "THAI",
]  # fmt: skip


class RewardConfig(Section):
    """Verifier workers."""

    workers: PositiveInt = Field(default=1, description="Ray actors, one killable process each.")
    num_cpus: NonNegativeFloat = Field(
        default=0.5,
        description="Ray CPUs a worker reserves: half of one, as it mostly waits for rollouts; 1 "
        "where verdicts are the bottleneck (code with many tests).",
    )
    timeout_s: PositiveFloat = Field(default=5.0, description="Deadline of one verdict.")
    memory_mib: PositiveInt = Field(
        default=1024, description="Address-space limit of a verifier process."
    )
    format_weight: NonNegativeFloat = Field(
        default=0.0, description="Penalty for output outside <think>...</think> answer."
    )
    overlong_cache_tokens: NonNegativeInt = Field(
        default=0, description="L_c of DAPO's soft overlong punishment; 0 is off."
    )
    overlong_weight: NonNegativeFloat = Field(default=1.0, description="Weight of that punishment.")
    language_scripts: tuple[Script, ...] = Field(
        default=(),
        description="Scripts that an answer's prose is expected in, such as [LATIN]; mathematics "
        "and code are left out. Empty: languages may mix.",
    )
    language_tolerance: BelowOne = Field(
        default=0.02, description="Share of letters in other scripts that costs nothing."
    )
    language_weight: NonNegativeFloat = Field(
        default=0.1, description="Penalty for an answer wholly in other scripts; a share, a share."
    )
    sandbox: Literal["namespaces", "none-i-trust-this-code"] | HttpSandboxConfig = Field(
        default="namespaces",
        description="Where model-written code runs: in namespaces of its own on this machine; "
        "{http: URL} for a service; or with limits but no walls, for trusted code only.",
    )
    code: CodeConfig = Field(default=CodeConfig(), description=CodeConfig.__doc__)
    judge: JudgeConfig | None = Field(
        default=None, description="The model behind the verifier `judge`."
    )
    pruned: Literal["zero", "none"] = Field(
        default="zero",
        description="Score of an answer that a confidence rule ended: 0, or no score.",
    )
    control: Literal["none", "shuffled", "format_only", "constant"] = Field(
        default="none",
        description="Control experiments: scores shuffled over the batch, format as the only "
        "reward, or a constant.",
    )


class LearnerConfig(Section):
    """DeepSpeed ranks, one Ray actor each."""

    ranks: PositiveInt = Field(default=1, description="Data-parallel ranks.")
    num_cpus: PositiveFloat = Field(default=1.0, description="Ray CPUs a rank reserves.")
    num_gpus: NonNegativeFloat = Field(default=0.0, description="Ray GPUs a rank reserves.")
    threads: PositiveInt = Field(
        default=1, description="CPU threads of a rank (CPU learners only)."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(default=0, description="DeepSpeed ZeRO stage.")
    offload_optimizer: Flag = Field(
        default=False, description="Optimizer state in host memory (ZeRO 1-3)."
    )
    autocast: Literal["none", "bfloat16"] = Field(
        default="none", description="Compute dtype over float32 parameters (torch autocast)."
    )
    micro_batch_tokens: PositiveInt = Field(
        default=8192, description="Token budget of one forward pass."
    )
    gradient_checkpointing: Flag = Field(default=False, description="Recompute layers in backward.")
    logprob_chunk_tokens: PositiveInt = Field(
        default=1024, description="Tokens whose logits exist at once in the loss."
    )


class WeightsConfig(Section):
    """Weight broadcast from learner rank 0 to the engines."""

    backend: Literal["gloo", "nccl"] = Field(
        default="gloo", description="gloo on CPUs, nccl on CUDA."
    )
    bucket_mib: PositiveInt = Field(
        default=64,
        description="Parameters travel packed; so much of them is on its way at once, in buckets "
        "of a quarter of it.",
    )
    deadline_s: PositiveFloat = Field(
        default=120.0, description="One transfer; late members are dirty."
    )


class EvaluationSetting(Section):
    """One way of sampling the held-out problems."""

    name: SettingName = Field(description="Key in result.json, e.g. greedy, t0.6, t1.")
    temperature: NonNegativeFloat = Field(description="0 is greedy.")
    top_p: Annotated[PositiveFloat, Field(le=1)] = Field(default=1.0, description="Nucleus.")
    samples: PositiveInt = Field(default=1, description="Answers a problem.")
    pass_at: PositiveInt | None = Field(default=None, description="Also report pass@k for this k.")


class EvaluationConfig(Section):
    """Held-out accuracy after each stage."""

    settings: Annotated[tuple[EvaluationSetting, ...], Field(min_length=1)] = Field(
        default=(
            EvaluationSetting(name="greedy", temperature=0.0),
            EvaluationSetting(name="t0.6", temperature=0.6, top_p=0.95, samples=4),
            EvaluationSetting(name="t1", temperature=1.0, samples=8, pass_at=8),
        ),
        description="Settings; a base before SFT, or built here, is measured with the first only.",
    )
    limit: PositiveInt | None = Field(default=None, description="Use only the first problems.")
    max_response_tokens: PositiveInt | None = Field(
        default=None, description="Default: the rollouts' limit."
    )


class TrackingConfig(Section):
    """MLflow."""

    uri: Annotated[str, Field(min_length=1)] = Field(
        default="sqlite:///mlflow.db", description="Tracking store."
    )
    experiment: Annotated[str, Field(min_length=1)] = Field(
        default="h1r", description="Experiment name."
    )


class RunConfig(Section):
    """A whole run."""

    name: FolderName = Field(description="Name of the run; its folder is <output>/<name>.")
    seed: Annotated[NonNegativeInt, Field(lt=2**31)] = Field(
        default=0, description="Data, initial weights, prompt order and sampling."
    )
    output: UserPath = Field(default=Path("runs"), description="Parent of the run folder.")
    model: ModelConfig = Field(description=ModelConfig.__doc__)
    data: DataConfig = Field(description=DataConfig.__doc__)
    cluster: ClusterConfig = Field(default=ClusterConfig(), description=ClusterConfig.__doc__)
    sft: SFTConfig | None = Field(default=None, description="Left out: no SFT stage.")
    grpo: GRPOConfig | None = Field(default=None, description="Left out: no GRPO stage.")
    rollout: RolloutConfig = Field(description=RolloutConfig.__doc__)
    reward: RewardConfig = Field(default=RewardConfig(), description=RewardConfig.__doc__)
    learner: LearnerConfig = Field(default=LearnerConfig(), description=LearnerConfig.__doc__)
    weights: WeightsConfig = Field(default=WeightsConfig(), description=WeightsConfig.__doc__)
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description=EvaluationConfig.__doc__
    )
    tracking: TrackingConfig = Field(default=TrackingConfig(), description=TrackingConfig.__doc__)

    def evaluation_settings(self, model: str) -> tuple[EvaluationSetting, ...]:
        """Of "base", "sft" or "grpo". A base before SFT, or with random weights, ends no answer:
        every sample would run to the last token, and one setting says enough."""
        untaught = model == "base" and (self.sft is not None or self.model.tiny is not None)
        return self.evaluation.settings[:1] if untaught else self.evaluation.settings

    @property
    def folder(self) -> Path:
        return self.output / self.name
