"""Where a rank stands: pure arithmetic on sizes, no process group."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Sizes of the mesh; ranks count tensor fastest, then data, then pipeline (DeepSpeed's and Megatron's order)."""

    tensor: int
    pipeline: int
    data: int

    @classmethod
    def of(cls, world_size: int, tensor: int, pipeline: int) -> "Topology":
        """Return the mesh of `world_size` ranks, a multiple of tensor * pipeline."""
        assert world_size % (tensor * pipeline) == 0, (world_size, tensor, pipeline)
        return cls(tensor, pipeline, world_size // (tensor * pipeline))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Return (pipeline, data, tensor) coordinates of `rank`."""
        tensor = rank % self.tensor
        data = rank // self.tensor % self.data
        return rank // (self.tensor * self.data), data, tensor
