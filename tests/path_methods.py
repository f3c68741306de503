"""Path methods as a run file's path section gives them, for tests that need no run."""

from typing import Any

from raptr_ds.config.path_sections import PATH_SECTIONS, RunSizes
from raptr_ds.paths import PathMethod, build_path_method
from raptr_ds.paths.balance import BalancedStages


def path_method(
    method: str,
    *,
    num_layers: int,
    num_steps: int,
    seed: int = 1,
    num_heads: int = 1,
    stages: BalancedStages | None = None,
    **keys: Any,
) -> PathMethod:
    """Return the method of a path section with these keys. Raises: ConfigError for the first rule that they break."""
    sizes = RunSizes(num_layers, num_steps, num_heads, num_stages=1 if stages is None else len(stages.num_layers))
    section = PATH_SECTIONS[method].model_validate(keys).checked(sizes)
    return build_path_method(section, sizes, seed, stages)
