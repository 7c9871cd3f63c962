"""One sentence for each of the paper's figures: what would explain what the model does not."""

REASONS = {
    "5": (
        "the ratios agree; 1.0 M tokens instead of 2.1 M is what the model has at a memory "
        "fraction of 0.6, and what else was in memory is not told."
    ),
    "6–8": (
        "at best splits a larger TP frees the same memory, and steps of a fast engine grow with "
        "the batch, so that more KV gains little: 1.3 to 1.5 would need a fixed part in every "
        "step, a baseline that may not choose its split, or a TP that is slower than in the model."
    ),
    "10": (
        "3.4 at DP8 is about what it costs when all seven readers meet at one owner in every layer "
        "(7 blocks of 0.53 of a layer's compute); here each owner skips its own layers, gets ahead "
        "and so breaks this up in any order, while shifting with d − 1 slots costs 17 to 33 %; 2.5 "
        "at DP4 is more than three blocks (1.65), unless copies lose rate where they meet."
    ),
    "11": (
        "agrees with our engine's constants, and not with 50 ms per step, which makes steps in CaS "
        "and WaS alike: the assumption that serves Fig. 12 contradicts this figure."
    ),
    "12": (
        "reached at equal splits with 50 ms per step, which a larger batch shares; against the "
        "best split of replicas neither column reaches it."
    ),
    "13": (
        "batches that fit at S = 4K do not hide 123 ms of fetches, so that streaming loses with a "
        "fast engine; with 50 ms per step WaS agrees, but CaS adds little, for an owner that "
        "computes for eight ranks of an H20 is faster than streaming up to batches of 16 or so."
    ),
    "15": (
        "the share depends on how long a job is beside its tail: about 0.9 and more where the room "
        "is filled ten times (table below)."
    ),
}
