"""The version of fastlora, and what must not be installed beside it.

On the package index fastlora is `fastlora-kernels`: `fastlora` is another project there, whose module has the same import name.
"""

import re
from importlib import metadata

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here


def another() -> str | None:
    """Where a distribution named `fastlora` is installed, and what to type; None where there is none.

    It is the other project, or this one from when it had that name. One that only points to a checkout (an editable installation) does not
    count: it has no files that could be taken for this one's.
    """
    for other in metadata.distributions(name="fastlora"):
        if re.search(r"^fastlora(/|\.py,)", other.read_text("RECORD") or "", re.MULTILINE):
            return (
                f"a distribution named fastlora, version {other.version}, is installed in {other.locate_file('')}: it is another "
                "project, or this one from when it had that name, and its import name is the same. Uninstall both, `pip uninstall "
                "fastlora fastlora-kernels`, and install this one again: `pip install fastlora-kernels`, or `pip install .` in a checkout"
            )
    return None
