"""`python -m slmops.demo`: what `make demo` runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slmops.demo.run import PROFILES, run
from slmops.errors import SlmopsError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m slmops.demo", description=__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="full", help="full: SmolLM2-135M; smoke: a tiny model")
    parser.add_argument("--work-dir", type=Path, default=Path(".work/demo"), help="everything is written below it")
    arguments = parser.parse_args()
    try:
        run(arguments.profile, arguments.work_dir / arguments.profile)
    except SlmopsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
