"""FastMoE's plugin for Megatron-LM 2 and 3 is not here: it patches modules that today's Megatron-LM no longer has."""

raise ImportError(
    "fmoe.megatron (fmoefy) patches Megatron-LM 2 and 3 and is not part of this package. For today's Megatron-LM run its own "
    "training loop with `-m smartmoe.hosts.megatron.pretrain_gpt` (README, From Megatron-LM); in a model of your own put "
    "fmoe.FMoETransformerMLP in place of its MLP"
)
