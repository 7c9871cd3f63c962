"""Sizes of the models whose steps are measured."""

from dataclasses import dataclass

LINK_BYTES_PER_SECOND = 400e9  # what NVLink 4 gives of its 450 GB/s


@dataclass(frozen=True)
class Decoder:
    """One decoder layer; bf16."""

    name: str
    hidden: int
    intermediate: int
    query: int  # width of all query heads
    key_value: int  # width of all key and value heads together
    num_layers: int

    @property
    def ffn_bytes(self) -> int:
        return 2 * 3 * self.hidden * self.intermediate


DECODERS = [
    Decoder("Qwen3-32B", 5120, 25600, 8192, 2048, 64),
    Decoder("Llama-3.1-70B", 8192, 28672, 8192, 2048, 80),
    Decoder("Qwen2.5-72B", 8192, 29568, 8192, 2048, 80),
]


def scaled(decoder: Decoder, scale: float) -> Decoder:
    """The same with `scale` of its widths, in multiples of 64."""

    def width(value: int) -> int:
        return max(64, int(value * scale) // 64 * 64)

    widths = decoder.hidden, decoder.intermediate, decoder.query, decoder.key_value
    return Decoder(decoder.name, *(width(value) for value in widths), decoder.num_layers)
