"""The offline half: which plan to run on which cluster. Layer 1: numpy only, never torch."""
