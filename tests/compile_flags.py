"""XLA's flags for programs that are compiled in a third of the time, with its optimisations off."""

from importlib.metadata import version

# A flag that XLA does not know ends the process: this one is gone in jaxlib 0.11.2.
NO_EMITTERS = "--xla_cpu_use_fusion_emitters=false "
HAS_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)

QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    f"{NO_EMITTERS if HAS_EMITTERS else ''}--xla_cpu_parallel_codegen_split_count=1"
)
