r"""Words inside a formula: `\text{...}` under each of its names.

Invariant: a group holds no braces, so that looking for all of them is linear in the text.
"""

from __future__ import annotations

import re

GROUP = re.compile(r"\\(?:text|mathrm|textrm|textbf|textit|mathbf|mbox)\s*\{([^{}]*)\}")
