"""Let atheris look for bytes that break a parser: `python -m tests.fuzz --seconds 60`, or `make fuzz`.

Each target runs in a process of its own, since the fuzzer ends the one that it runs in. Bytes that break it are written
to the folder `.fuzz`, and their target, run again, begins with them.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["goodstanding"]):
    from tests.fuzzing import SEEDS, TARGETS

_FOLDER = Path(__file__).parent.parent / ".fuzz"


def main() -> int:
    """Run every target in turn, or one; gives 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together, or for the one")
    options = parser.parse_args()
    if options.target is not None:
        _fuzz(options.target, options.seconds)
    failed = []
    for target in TARGETS:
        words = [sys.executable, "-m", "tests.fuzz", target, "--seconds", str(max(1, options.seconds // len(TARGETS)))]
        if subprocess.run(words, check=False).returncode:
            failed.append(target)
    print(f"found something in: {', '.join(failed)}" if failed else "nothing found")
    return 1 if failed else 0


def _fuzz(target: str, seconds: int) -> None:
    corpus = _FOLDER / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[target]):
        (corpus / f"seed-{number}").write_bytes(seed)
    bounds = (f"-max_total_time={seconds}", "-max_len=10000", "-timeout=5", "-rss_limit_mb=1024")
    atheris.Setup(
        [target, str(corpus), f"-artifact_prefix={corpus}/", *bounds, "-print_final_stats=1", "-verbosity=0"],
        TARGETS[target],
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
