"""What follows a try of a run that ended: done, another try, or the end, with the reason. Imports nothing heavy."""
