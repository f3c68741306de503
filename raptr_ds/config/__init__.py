"""The run file: sections, derived values, rules, loading with overrides."""
