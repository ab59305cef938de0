"""A page of conf/cluster: the devices that a plan is made for."""

from typing import Annotated

from pydantic import BaseModel, Field

Flops = dict[str, Annotated[float, Field(gt=0)]]


class ClusterConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    """Rates are what programs reach, not what data sheets print; of one device, in one direction."""

    devices: int = Field(ge=1, le=2**17)
    devices_per_node: int = Field(ge=1)
    memory_bytes: int = Field(gt=0)
    # Taken by the driver, by the buffers of collectives and by holes between tensors.
    reserved_bytes: int = Field(ge=0)
    flops_per_second: Flops  # by precision (fp64, fp32, bf16), in large matrix products
    peak_flops_per_second: Flops  # of the data sheet; MFU is a share of it, as in training
    memory_bytes_per_second: float = Field(gt=0)
    node_bytes_per_second: float = Field(gt=0)  # to the other devices of the node
    network_bytes_per_second: float = Field(gt=0)  # to other nodes
    node_latency_seconds: float = Field(ge=0)
    network_latency_seconds: float = Field(ge=0)
    operation_seconds: float = Field(ge=0)  # of the host for each operation, which the device cannot undercut
    price_per_device_hour: float | None = Field(None, ge=0)  # any currency; null = unknown
