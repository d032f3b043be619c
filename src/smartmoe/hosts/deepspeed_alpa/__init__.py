"""The DeepSpeed MoE benchmark of Alpa's artifact (OSDI'22) on today's DeepSpeed, with two back ends for the MoE layer:
DeepSpeed's own and SmartMoE's.

`suites`, `report` and `launch` never import torch; the other modules are one rank's part of a run.
"""
