"""What SGLang calls, in every process it starts."""

import os

from sidp_sgl.scheduler.lifecycle.liveness import ENGINE, give_up, tie


def register() -> None:
    """Entry point of group `sglang.srt.plugins`.

    SGLang logs an exception and goes on without the plugin; a process of an engine with --sidp
    must not.
    """
    try:
        from sidp_sgl import runtime

        runtime.register()
    except Exception as error:
        if engine := os.environ.get(ENGINE):
            give_up(engine, None, error)
        raise


def activate_cpu_platform() -> str | None:
    """Entry point of group `sglang.srt.platforms`: class path of the CPU platform, or None.

    It is asked for early in the import of SGLang, which takes long: from here on a process of an
    engine with --sidp ends with its main process.
    """
    if engine := os.environ.get(ENGINE):
        tie(engine)
    from sidp_sgl.sglang_hooks.cpu.platform import activate

    return activate()
