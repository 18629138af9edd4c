"""The studies, one line each: `python -m diffusers_gm.studies`."""

import argparse
import ast
from pathlib import Path


def commands() -> dict[str, str]:
    """The modules of this package that are commands, and the first line of what each says of itself."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__"' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def main() -> None:
    listed = commands()
    width = max(map(len, listed))
    argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=f"Measurements behind the claims of the README. python -m {__package__}.NAME --help says more.",
        epilog="\n".join(f"  {name:{width}}  {line}" for name, line in listed.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(["--help"])


if __name__ == "__main__":
    main()
