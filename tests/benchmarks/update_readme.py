"""README.md's tables, made from the committed results.

    python tests/benchmarks/update_readme.py [RUN_FOLDER]

With a run folder its result, with the commit and the machine that made it, and its curve are taken
up first.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from h1r_rl.evaluation.report import markdown_table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
DEMO = RESULTS / "demo.json"
CURVE = ROOT / "docs" / "grpo.png"


def take_up(folder: Path) -> None:
    from results_file import origin_of_runs

    result = json.loads((folder / "result.json").read_text()) | {"model": "runs/tiny-cpu/model"}
    result |= origin_of_runs([folder])
    DEMO.write_text(json.dumps(result, indent=1) + "\n")
    shutil.copy2(folder / "grpo.png", CURVE)


def demo_section() -> str:
    if not DEMO.exists():
        return ""
    result = json.loads(DEMO.read_text())
    stages = ", ".join(f"{name} {value:.1f}" for name, value in result["minutes"].items())
    commit = f" at commit `{result['commit'][:10]}`" if "commit" in result else ""
    return (
        f"Held-out accuracy in % (± standard error) of one run of the demo{commit}, on two virtual "
        "CPU cores: "
        f"{sum(result['minutes'].values()):.1f} minutes after set-up ({stages}):\n\n"
        f"{markdown_table(result)}\n\n"
        "![reward, accuracy, response length and entropy over the GRPO steps](docs/grpo.png)"
    )


def benchmark_section() -> str:
    lines = ["| benchmark | metric | value | target | | note |", "|---|---|---|---|---|---|"]
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        for row in result.get("metrics", ()):
            verdict = {True: "met", False: "**missed**", None: ""}[row["meets"]]
            value = f"{row['value']:g} {row['unit']}"
            cells = (result["benchmark"], f"`{row['name']}`", value, row["target"], verdict)
            lines.append("| " + " | ".join([*cells, row["note"].replace("|", "/")]) + " |")
    return "\n".join(lines)


def updated(readme: str) -> str:
    for name, text in (("result", demo_section()), ("benchmarks", benchmark_section())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return readme


def main(arguments: list[str]) -> None:
    for folder in arguments:
        take_up(Path(folder))
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
