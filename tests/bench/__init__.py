"""Measurements of speed and memory, run on demand; each gives ratios that hold on any machine.

Each module is a command that makes its workload, measures, prints what it found, keeps it as `results/NAME.json` and
renders `RESULTS.md` and its pictures from all that is kept there.
"""
