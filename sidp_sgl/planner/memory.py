"""How many KV tokens fit on a rank: the memory model that planner, tests and docs share. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankMemory:
    """One rank's device. All sizes in bytes; `mem_fraction_static` as SGLang's flag."""

    device_bytes: int
    mem_fraction_static: float
    replicated_bytes: int  # weights that every rank holds
    pooled_bytes: int = 0  # weights that the group pools, all ranks together
    owned_bytes: int | None = None  # of those, this rank's; None without pooling: all
    cache_bytes: int = 0  # slots
    staging_bytes: int = 0  # rows on their way to owners and back

    def weight_bytes(self) -> int:
        """What weights, slots and staging take on this rank."""
        owned = self.pooled_bytes if self.owned_bytes is None else self.owned_bytes
        return self.replicated_bytes + owned + self.cache_bytes + self.staging_bytes

    def kv_tokens(self, kv_bytes_per_token: int) -> int:
        """KV capacity in tokens as SGLang profiles it; 0 where the weights don't fit."""
        rest = self.device_bytes * self.mem_fraction_static - self.weight_bytes()
        return max(0, int(rest // kv_bytes_per_token))


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """Bytes of keys and values of one token over all layers of one rank."""
    return 2 * num_layers * num_kv_heads * head_dim * dtype_bytes
