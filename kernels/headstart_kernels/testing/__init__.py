"""What an implementation is held to: oracles here, `ptx` emulates machine code, `aot` reads it."""

from headstart_kernels.testing.oracle import (
    STEP_ROUNDINGS,
    X0_ROUNDINGS,
    Oracle,
    assert_bits,
    assert_within,
    exact_normal,
    image_words,
    numpy_normal,
    philox_words,
    random_latents,
    random_table,
    step_oracle,
)

__all__ = [
    "STEP_ROUNDINGS",
    "X0_ROUNDINGS",
    "Oracle",
    "assert_bits",
    "assert_within",
    "exact_normal",
    "image_words",
    "numpy_normal",
    "philox_words",
    "random_latents",
    "random_table",
    "step_oracle",
]
