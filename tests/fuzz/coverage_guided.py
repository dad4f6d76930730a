"""Coverage-guided fuzzing with atheris: `python -m tests.fuzz.coverage_guided protocol -runs=1000000 tests/fuzz/corpus`.

Not a test module: atheris takes the process over. `test_coverage_guided` runs it for a moment.
"""

from __future__ import annotations

import sys


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["cake_core"]):
        from tests.fuzz import targets
    target = targets.TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
