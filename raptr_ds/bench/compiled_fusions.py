"""megatron-core as its users have it, with its fused functions compiled: import this before the rest of raptr_ds.

For measuring megatron-core's own layers; parallel/megatron_core.py imports it otherwise.
"""

import megatron.core  # noqa: F401
