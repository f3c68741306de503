"""A shuffled order that needs no memory: a bijection of range(n), computed for one index at a time."""

from raptr_ds.rng import stream_key

NUM_ROUNDS = 6
WORD = (1 << 64) - 1


def _mix(value: int) -> int:
    """Scramble 64 bits: the finalizer of SplitMix64 (Steele et al. 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & WORD
    return value ^ (value >> 31)


class Permutation:
    """A bijection of range(size), a pure function of (seed, epoch, purpose).

    A Feistel network over the next even number of bits, walked along its cycle until it falls inside the range again
    (Black and Rogaway 2002): less than four rounds of the network on average, whatever the size.
    """

    def __init__(self, size: int, seed: int, epoch: int, purpose: str) -> None:
        """Derive the round keys; size >= 1."""
        assert size >= 1, size
        self.size = size
        self._half = (max(size - 1, 1).bit_length() + 1) // 2
        self._mask = (1 << self._half) - 1
        self._keys = [stream_key(seed, "permutation", purpose, epoch, number) for number in range(NUM_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return where `index` goes; 0 <= index < size."""
        assert 0 <= index < self.size, (index, self.size)
        value = self._network(index)
        while value >= self.size:
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key & WORD) & self._mask)
        return left << self._half | right
