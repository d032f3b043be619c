"""SmartMoE: train Mixture-of-Experts models with a skew-aware plan and online expert placement."""

__version__ = "0.1.0"
