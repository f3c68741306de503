"""What a run needs before it starts: memory, time, the best layout, by formulas and a simulator."""
