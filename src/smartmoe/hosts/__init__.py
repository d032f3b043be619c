"""SmartMoE's layer inside other training systems. Layer 6: entries, each in a folder of its own."""
