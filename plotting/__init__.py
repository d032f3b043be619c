"""Figures 8-13 from logs: the published ones of the paper and the ones measured here.

Rows come from `load.py`, axes from `fig8.py` .. `fig13.py`, pages from `report.py`. Nothing here imports smartmoe or
torch: the files of a run directory are the whole interface between systems and plots (formats: logs/README.md).
"""
