r"""What a value may be called: one symbol, one quantity (`\angle A`, `[ABC]`, `\text{Area}`), or
one function of something (`f(2)`, `P(X = 2)`). `x + y`, `2x` and `x(x - 4)` are expressions.

Invariant: text alone; what may be either counts as an expression.
"""

from __future__ import annotations

import re

_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|kappa|lambda|mu|nu|xi"
    r"|rho|sigma|tau|phi|varphi|chi|psi|omega|ell|Gamma|Delta|Theta|Lambda|Phi|Psi|Omega)(?![a-z])"
)
_DRESS = r"\\(?:overline|vec|overrightarrow|hat|bar|mathbf|mathcal|tilde|boldsymbol)"
_TEXT = r"\\(?:text|mathrm|textrm|textbf|textit|mbox|operatorname)\s*\{[^{}\d]{1,80}\}"
_SUBSCRIPT = r"(?:_(?:\{(?:[^{}=]|\{[^{}]{0,20}\}){1,30}\}|\w|\\[a-z]+))?"
_PRIMES = r"(?:'{1,3}|\^\s*\\?\*)?"
_ATOM = rf"(?:[A-Za-z]|{_GREEK}|{_DRESS}\s*(?:\{{\w{{1,4}}\}}|[A-Za-z])){_SUBSCRIPT}{_PRIMES}"
_POINTS = r"(?:[A-Z]'?){2,5}"
_WORD = r"(?:[A-Z][a-z]{2,}|(?![a-d]+\b|[w-z]+\b)[a-z]{4,})(?:\s[A-Za-z]+){0,4}"
_ARGUMENT = r"\((?:[^()]|\([^()]{0,40}\)){1,80}\)"
_FUNCTION = re.compile(rf"(?P<name>{_ATOM})(?:\^\s*\{{(?:-1|\(\w\))\}})?\s*(?P<of>{_ARGUMENT})")
_OPERATOR = (
    r"\\(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|Pr|deg|dim|arg|Re|Im|det|operatorname\s*"
    rf"\{{[A-Za-z]{{1,12}}\}})(?![a-z])\s*(?:{_ARGUMENT}|\{{?(?:\\angle\s*)?(?:{_POINTS}|{_ATOM})\}}?)"
)
_NAME = re.compile(
    "|".join(
        (
            _ATOM,
            _POINTS,
            _WORD,
            _OPERATOR,
            rf"{_TEXT}(?:\s*\(?(?:\\triangle\s*)?(?:{_POINTS}|{_ATOM})\)?)?{_SUBSCRIPT}",
            rf"(?:m|{_TEXT})?\s*\\(?:measured)?angle\s*(?:{_POINTS}|{_ATOM}|\d)",
            rf"\\(?:widehat|arc|overset\{{\\frown\}})\s*\{{{_POINTS}\}}|\[(?:\\triangle\s*)?{_POINTS}\]",
            rf"\\triangle\s*{_POINTS}|\\Delta\s*{_ATOM}|(?:E|\\mathbb\s*\{{?E\}}?)\s*\[[^\[\]]{{1,30}}\]",
            rf"\({_ATOM}\s*\\circ\s*{_ATOM}\){_ARGUMENT}",
            rf"\|(?:{_POINTS}|[A-Z]|{_DRESS}\s*\{{?\w{{1,3}}\}}?)\||\\\|[^|]{{1,20}}\\\|",
            r"\\frac\{d\w\}\{d\w\}",
            rf"\({_ATOM}(?:\s*,\s*{_ATOM}){{1,5}}\)",
            rf"(?:{_POINTS}|{_ATOM})(?:\s*:\s*(?:{_POINTS}|{_ATOM})){{1,5}}",
            rf"{_ATOM}\s*\\(?:cap|cup|setminus)\s*{_ATOM}",
            rf"\\begin\{{[pb]matrix\}}(?:\s*{_ATOM}\s*(?:\\\\|&)?){{1,9}}\\end\{{[pb]matrix\}}",
        )
    )
)
_FUNCTION_LETTERS = re.compile(r"[f-hpqA-Z\\]")
_PLAIN_ARGUMENT = re.compile(
    r"\(\s*(?:[A-Z][^()]*|[-+]?[\d.]+|[A-Za-z](?:\s*,\s*[A-Za-z]){0,3})\s*\)"
)


def is_name(text: str) -> bool:
    """Does the whole text name one quantity?"""
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])", "", text).strip()
    if _NAME.fullmatch(text):
        return True
    function = _FUNCTION.fullmatch(text)
    if function is None or function.group("name") in function.group("of"):
        return False  # x(x-4) is a product
    letter, argument = function.group("name"), function.group("of")
    return bool(_FUNCTION_LETTERS.match(letter) or _PLAIN_ARGUMENT.fullmatch(argument))
