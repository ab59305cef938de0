"""Run by an interpreter of its own, with jax, jaxlib and libtpu (`make xla-compile`), and needs nothing else:

    python v3_compile.py PROGRAM.hlo CORES COMPILED.hlo

The program goes to the compiler of TPU v3 in libtpu, for a slice with so many cores; no TPU is there. One
line of JSON says what came out: seconds, and bytes of one core's memory, or the error.
"""

import json
import os
import sys
import time
from pathlib import Path

# Cores -> chips, of two cores each.
TOPOLOGIES = {8: "v3:2x2", 16: "v3:2x4", 32: "v3:4x4", 64: "v3:4x8"}


def main(program: Path, cores: int, compiled: Path) -> None:
    # As on a host of a TPU, whose metadata server would be asked otherwise; and several may work at once.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v3-8", TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0", JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip
    from jax.experimental import topologies
    from jaxlib import _jax
    from jaxlib import xla_client as xc

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[cores]).devices
    module = xc._xla.hlo_module_from_text(program.read_text())
    stable = xc._xla.mlir.hlo_to_stablehlo(module.as_serialized_hlo_module_proto())
    options = xc.CompileOptions()
    build = options.executable_build_options
    for part in (options, build):
        part.num_partitions, part.num_replicas = cores, 1
    build.use_spmd_partitioning, build.use_shardy_partitioner = True, False
    build.allow_spmd_sharding_propagation_to_output = [True]  # as torch_xla does
    started = time.monotonic()
    try:
        executable = devices[0].client.compile(stable, _jax.DeviceList(tuple(devices)), options)
    except _jax.XlaRuntimeError as error:
        print(json.dumps({"seconds": time.monotonic() - started, "error": str(error)}))
        return
    seconds = time.monotonic() - started
    printing = xc._xla.HloPrintOptions()
    printing.print_operand_shape = True
    compiled.write_text(executable.hlo_modules()[0].to_string(printing))
    memory = executable.get_compiled_memory_stats()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    print(json.dumps({"seconds": seconds, "memory": sizes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
