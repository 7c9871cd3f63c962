"""SidpConfig: the flags of SiDP, their defaults and their validation. Imports nothing heavy."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from sidp_sgl.errors import SidpUsageError

FFN, LINEAR, ALL = POOLS = ("ffn", "linear", "all")
MODES = ("auto", "was", "cas")
PLACEMENTS = ("interleaved", "contiguous")
FULL, START, OFF = SELF_CHECKS = ("full", "start", "off")
RESIDENCIES = ("auto", "off")
AUTO, REPLICATED, SEQUENCE_PARALLEL = SAMPLINGS = ("auto", "replicated", "sequence-parallel")
OWN_DISPATCH = "sidp"  # value of --load-balance-method


def _flag(help_text: str, **argparse_options: Any) -> dict[str, Any]:
    return {"help": help_text, **argparse_options}


@dataclass(frozen=True)
class SidpConfig:
    """What `--sidp` and its flags say; the same names as keywords of `sgl.Engine`.

    `engine` is the name of one engine, made in the main process; its processes meet under it.
    """

    sidp: bool = field(
        default=False,
        metadata=_flag("Keep one copy of the pooled weights per data-parallel group (SiDP)."),
    )
    sidp_pool: str = field(
        default="ffn",
        metadata=_flag(
            "What is pooled: the FFNs, all big linears, or embedding and LM head too.",
            choices=POOLS,
        ),
    )
    sidp_mode: str = field(
        default="auto",
        metadata=_flag(
            "Execution mode of decode steps: was streams weights here, cas sends rows to the "
            "weights, auto takes the faster one for the batch size.",
            choices=MODES,
        ),
    )
    sidp_batch_threshold: int | str = field(
        default="auto",
        metadata=_flag(
            "Batch size from which mode auto streams weights "
            "(default: measured at start and while running).",
            metavar="{auto,N}",
        ),
    )
    sidp_placement: str = field(
        default="interleaved",
        metadata=_flag(
            "Owner of a block: whoever owns the fewest bytes so far, or contiguous runs.",
            choices=PLACEMENTS,
        ),
    )
    sidp_cache_slots: int | None = field(
        default=None,
        metadata=_flag(
            "Slots per rank, each for one fetched block (default: 3; 2 where layers have experts).",
            type=int,
            metavar="N",
        ),
    )
    sidp_link_gbps: float | None = field(
        default=None,
        metadata=_flag(
            "Pace every owner's link to X GB/s, shared by its readers "
            "(CPU transport; for tests and demos).",
            type=float,
            metavar="X",
        ),
    )
    sidp_colocate: bool = field(
        default=False,
        metadata=_flag(
            "All ranks on one GPU, each with an equal part of its memory (for development).",
            action="store_true",
        ),
    )
    sidp_self_check: str = field(
        default=FULL,
        metadata=_flag(
            "Compare what comes from other ranks with what its owner has: at start, and now and "
            "then while running (full), at start, or never (off).",
            choices=SELF_CHECKS,
        ),
    )
    sidp_residency: str = field(
        default="auto",
        metadata=_flag(
            "With --sidp-mode auto: KV memory that nobody needs keeps fetched blocks, so that "
            "steps need no other rank (auto), or never (off).",
            choices=RESIDENCIES,
        ),
    )
    sidp_sampling: str | None = field(
        default=None,
        metadata=_flag(
            "With tensor parallelism: each TP rank samples its share of the batch "
            "(sequence-parallel), or all of them the whole batch (replicated); auto shares where "
            "it can. Also without --sidp (default: auto with --sidp, else replicated).",
            choices=SAMPLINGS,
        ),
    )
    engine: str = ""
    own_dispatch: bool = True  # `--load-balance-method sidp`: the default with --sidp
    is_server: bool = False  # requests are those of many users, not of the program's own

    @classmethod
    def flags(cls) -> dict[str, dict[str, Any]]:
        """Field name → argparse options of every user-visible field."""
        return {f.name: {"default": f.default, **f.metadata} for f in fields(cls) if f.metadata}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "SidpConfig":
        """Validated config from keyword values; raises SidpUsageError in one line."""
        return cls(**values).validated()

    def validated(self) -> "SidpConfig":
        if not isinstance(self.sidp, bool):
            raise SidpUsageError(f"--sidp is a switch; got {self.sidp!r}: use True or False")
        for name, options in self.flags().items():
            choices, value = options.get("choices"), getattr(self, name)
            if choices and value not in choices and value is not options["default"]:
                raise SidpUsageError(
                    f"{flag_name(name)} {value!r} is unknown: choose one of {', '.join(choices)}"
                )
        slots = self.sidp_cache_slots
        if slots is not None and (not isinstance(slots, int) or isinstance(slots, bool)):
            raise SidpUsageError(f"--sidp-cache-slots {slots!r} is not a whole number")
        if slots is not None and slots < 1:
            raise SidpUsageError(f"--sidp-cache-slots {slots} is out of range: use 1 or more")
        gbps = self.sidp_link_gbps
        if gbps is not None and not (isinstance(gbps, int | float) and 0 < gbps < float("inf")):
            raise SidpUsageError(f"--sidp-link-gbps {gbps!r} is out of range: use more than 0")
        threshold = _threshold(self.sidp_batch_threshold)
        if threshold != "auto" and self.sidp_mode != "auto":
            raise SidpUsageError(
                f"--sidp-batch-threshold {threshold} has no effect with --sidp-mode "
                f"{self.sidp_mode}: leave one of them out"
            )
        if not self.sidp:
            changed = [
                name
                for name, options in self.flags().items()
                if getattr(self, name) != options["default"] and name != "sidp_sampling"
            ]
            if changed:
                raise SidpUsageError(
                    f"{flag_name(changed[0])} has no effect without --sidp: add it"
                )
        return replace(self, sidp_batch_threshold=threshold)

    @property
    def has_residency(self) -> bool:
        """Whether fetched blocks may stay; --sidp-mode was and cas are what they say."""
        return self.sidp_residency == "auto" and self.sidp_mode == "auto"

    @property
    def sampling(self) -> str | None:
        """AUTO or SEQUENCE_PARALLEL; None where SGLang samples as always."""
        asked = self.sidp_sampling or (AUTO if self.sidp else REPLICATED)
        return None if asked == REPLICATED else asked

    def of_engine(self, engine: str, load_balance_method: str, is_server: bool) -> "SidpConfig":
        """With what one engine adds: its name, who dispatches, and whose requests."""
        own_dispatch = load_balance_method in ("auto", OWN_DISPATCH)
        return replace(self, engine=engine, own_dispatch=own_dispatch, is_server=is_server)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _threshold(value: Any) -> int | str:
    """'auto' or a batch size, also as text."""
    if value == "auto":
        return "auto"
    text = "" if isinstance(value, bool) else str(value)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise SidpUsageError(
            f"--sidp-batch-threshold {value!r} is not a batch size: use auto, or 1 or more"
        )
    return int(text)


def flag_name(field_name: str) -> str:
    """'sidp_link_gbps' → '--sidp-link-gbps'."""
    return "--" + field_name.replace("_", "-")
