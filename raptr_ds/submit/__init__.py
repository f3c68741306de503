"""Submitting runs to Slurm: checks on the login node, a copy of code and run file, and sbatch's command."""
