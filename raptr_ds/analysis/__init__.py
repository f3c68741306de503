"""Analysis of finished or running runs; reads their metrics only."""
