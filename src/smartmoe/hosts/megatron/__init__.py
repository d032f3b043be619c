"""SmartMoE's layer, online placement and run directory inside Megatron-LM's training loop (megatron-core 0.19)."""
