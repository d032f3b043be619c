"""FasterMoE's switches. Its schedule is smartmoe.dispatch.overlapped."""
