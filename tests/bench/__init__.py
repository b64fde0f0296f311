"""Measurements of speed and memory, run on demand; each prints ratios that hold on any machine."""
