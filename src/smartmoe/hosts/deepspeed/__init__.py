"""Training with DeepSpeed's engine and DeepSpeed's own MoE layer, on the model, data and weights of the other systems.

`limits` never imports torch: it says before anything starts what this host cannot do. `engine`, `moe` and `text` are also
used by the benchmark in `smartmoe.hosts.deepspeed_alpa`.
"""
