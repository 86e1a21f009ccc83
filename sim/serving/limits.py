"""What one rank may hold and do at once, and how long a simulation may last."""

from dataclasses import dataclass

from placer.core.errors import UsageError

__all__ = ["NS_PER_S", "Limits", "checked_number", "checked_whole"]

NS_PER_S = 1_000_000_000
MOST = 2**40
MOST_SECONDS = 1e8


def checked_whole(field: str, value: object, least: int = 1) -> None:
    """Raises UsageError where `value` is no whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MOST:
        raise UsageError(f"{field} is {value!r}; give a whole number, {least} or more")


def checked_number(field: str, value: object, *, zero: bool = False) -> None:
    """Raises UsageError where `value` is no finite number above 0 (`zero`: or 0), or is beyond what a clock holds."""
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not (0 <= value <= MOST_SECONDS and (zero or value > 0)):  # type: ignore[operator]
        raise UsageError(f"{field} is {value!r}; give a number {'from' if zero else 'above'} 0 to {MOST_SECONDS:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of every rank of a pool.

    tokens_per_rank     new tokens of one rank in one iteration (its share of chunked prefill and decode)
    requests_per_rank   requests a rank runs at once
    block_tokens        tokens in one KV block       blocks_per_rank   KV blocks of one rank
    horizon_s           simulated seconds after which everything stops
    """

    tokens_per_rank: int = 2048
    requests_per_rank: int = 256
    block_tokens: int = 64
    blocks_per_rank: int = 4096
    horizon_s: float = 3600.0

    def __post_init__(self) -> None:
        for field in ("tokens_per_rank", "requests_per_rank", "block_tokens", "blocks_per_rank"):
            checked_whole(f"limits.{field}", getattr(self, field))
        checked_number("limits.horizon_s", self.horizon_s)

    @property
    def horizon_ns(self) -> int:
        """The horizon on the simulator's clock."""
        return max(1, round(self.horizon_s * NS_PER_S))

    def blocks(self, tokens: int) -> int:
        """KV blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)
