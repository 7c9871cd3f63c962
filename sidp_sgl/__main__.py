"""`python -m sidp_sgl MODULE ...`: a module of SGLang that reads its flags before it loads plugins.

SGLang's server and `sgl.Engine` load plugins by themselves; some of its tools parse their command
line first, `sglang.benchmark.offline_throughput` among them, and would not know `--sidp`.
"""

import runpy
import sys


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: python -m sidp_sgl MODULE [its flags, and those of SiDP]", file=sys.stderr)
        sys.exit(2)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
