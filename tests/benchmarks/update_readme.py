"""Write the closing table of a finished run into README.md (argument: its run folder)."""

import json
import sys
from pathlib import Path

from h1r_rl.evaluation.report import markdown_table

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- result:begin -->", "<!-- result:end -->"


def main(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    minutes = sum(result["minutes"].values())
    caption = (
        f"Held-out accuracy in % (± standard error) of one run of `make demo` on two shared CPU "
        f"cores, {minutes:.1f} minutes after set-up:"
    )
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    table = markdown_table(result)
    readme.write_text(f"{before}{BEGIN}\n{caption}\n\n{table}\n{END}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
