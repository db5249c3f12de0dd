"""Find words and forms that CONTRIBUTING.md asks not to use: ``python tests/prose.py`` prints each place and fails.

Docstrings, comments and strings of Python files are read, and every line of Markdown but for code.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIPPED = ("CHANGELOG.md", "docs/models.md", "tests/prose.py", "bench/results/")  # what was printed then
INSTEAD = {  # what is written -> what to write
    r"hangs? on|bears? on|hung on": "depends on, affects",
    r"of which|of whom": "name the noun again",
    r"whatever|whoever": "any, each",
    r"likewise|alike": "also, the same",
    r"but for": "except for",
    r"nobody|nobody's": "name the person: the user, a caller",
    r"as ever|amiss|ere|thence|hence|wherein": "plain words",
    r"the least that is not less": "the smallest that is at least",
    r"is told|are told|was told|were told|told in": "is given, is reported",
    r"leaf through|looked at": "browse, inspected, used",
}
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{words})\b)" for i, words in enumerate(INSTEAD)), re.IGNORECASE)
NOT_A_VERB = {"what", "whether", "which", "of", "whose", "see", "as", "none", "how", "where"}


def words_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line within the text, the word, and what to write instead."""
    for found in PATTERN.finditer(text):
        yield text.count("\n", 0, found.start()), found[0], [*INSTEAD.values()][int(found.lastgroup[1:])]


def of_python(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, word and advice for a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
            for line, word, advice in words_in(token.string):
                yield token.start[0] + line, word, advice
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = (ast.get_docstring(node) or "").split(" ")[0]
            if first.lower() in NOT_A_VERB:
                yield node.lineno, first, f"begin the docstring of {node.name} with a verb: Return, Raise, Write"


def of_markdown(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, word and advice for a Markdown file, outside of code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", lambda code: re.sub(r"[^\n]", " ", code[0]), source, flags=re.DOTALL)
    for line, word, advice in words_in(text):
        yield line + 1, word, advice


def main() -> int:
    """Print every place and return their number, at most 1."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    given = sys.argv[1:]
    count = 0
    for name in sorted(listed.stdout.split()):
        if name.startswith(SKIPPED) or not (ROOT / name).is_file() or (given and not name.startswith(tuple(given))):
            continue
        source = (ROOT / name).read_text(encoding="utf-8")
        for line, word, advice in (of_python if name.endswith(".py") else of_markdown)(source):
            print(f"{name}:{line}: {word!r}: {advice}")
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main())
