"""What `make docs` runs in the .venv: the public modules as HTML in build/docs. Whatever cannot be rendered is an error, and so is a public name
without a docstring.
"""

import importlib
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import fastlora

PUBLIC = ("fastlora", "fastlora.functional", "fastlora.ops", "fastlora.adapters", "fastlora.train", "fastlora.sweep")
FOLDER = Path("build/docs")


def main() -> None:
    for name in PUBLIC:
        module = importlib.import_module(name)
        for member in getattr(module, "__all__", ()):
            vars(module)[member] = getattr(module, member)  # pdoc looks for nothing that a module's __getattr__ makes
            if not getattr(vars(module)[member], "__doc__", None):
                sys.exit(f"{name}.{member} has no docstring")
    warnings.simplefilter("error")
    pdoc.render.configure(docformat="google", footer_text=f"fastlora {fastlora.__version__}")
    pdoc.pdoc("fastlora", r"!fastlora\.", *PUBLIC[1:], output_directory=FOLDER)
    pages = {str(page.relative_to(FOLDER).with_suffix("")).replace("/", ".") for page in FOLDER.rglob("*.html")}
    if missing := {*PUBLIC} - pages:
        sys.exit(f"no pages were made of {', '.join(sorted(missing))}")
    print(f"{FOLDER / 'index.html'}: {', '.join(PUBLIC)}")


main()
