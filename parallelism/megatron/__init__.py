"""Everything that imports megatron-core: model, step, optimizer, process groups, patches.

megatron-core warns five times at import that Transformer Engine and apex are absent. eurotrain needs neither,
so the modules that say so are imported once, here, with those lines (and only those) held back.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer  # noqa: F401
