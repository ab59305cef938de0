"""What a host offers to XLA, and which host of a slice it is: from the environment, the PCI bus and the
metadata server of Google's cloud. XLA itself is not needed to find out."""

import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openmoe.launcher.errors import ConfigError

PORT = 29500
# A host of a v3 slice has 4 chips of 2 cores; each core is a device of its own.
CHIPS_PER_HOST, CORES_PER_CHIP = 4, 2
CORES_PER_HOST = CHIPS_PER_HOST * CORES_PER_CHIP
V3_CORES = (8, 32, 64, 128, 256, 512, 1024, 2048)
# torch counts devices in eight bits: with 128 of them in one process the backward pass dies.
MOST_VIRTUAL_DEVICES = 127
_SERVER = "metadata.google.internal"
_METADATA_SECONDS = 10.0
_GOOGLE, _TPU_V2_V3 = "0x1ae0", "0x0027"


@dataclass(frozen=True)
class Slice:
    """A TPU v3 with all its hosts."""

    cores: int

    @property
    def name(self) -> str:
        return f"v3-{self.cores}"

    @property
    def hosts(self) -> int:
        return self.cores // CORES_PER_HOST

    def describe(self) -> str:
        chips = self.cores // CORES_PER_CHIP
        hosts = "1 host" if self.hosts == 1 else f"{self.hosts} hosts"
        return f"{self.name}: {hosts}, {chips} chips, {self.cores} cores"


def slice_of(source: str, name: str) -> Slice:
    """`source` is where the name stands, for the error. Raises ConfigError."""
    known = {Slice(cores).name: Slice(cores) for cores in V3_CORES}
    if name not in known:
        raise ConfigError(f"{source}={name[:80]}: allowed {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Host:
    """One host of a run and the environment of its process."""

    rank: int
    addresses: tuple[str, ...]  # of all hosts of the run, by rank
    port: int
    text: str  # what a user reads about it
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def hosts(self) -> int:
        return len(self.addresses)


def find_host(environment: Mapping[str, str], devices: int | None, chips: int) -> Host:
    """This host, with `devices` of its devices (None: all); `chips` of a TPU are plugged in.

    Raises ConfigError with the variable or option, its value and what is allowed.
    """
    if "WORLD_SIZE" in environment:
        raise ConfigError(
            f"WORLD_SIZE={environment['WORLD_SIZE'][:80]}: allowed unset; xla_spawn starts the one process "
            "of its host by itself, and finds the other hosts"
        )
    kind = environment.get("PJRT_DEVICE") or ("TPU" if chips else "CPU")
    match kind:
        case "CPU":
            return _virtual_devices(environment, devices)
        case "TPU" if chips:
            return _tpu_host(environment, devices, chips)
        case "TPU":
            raise ConfigError("PJRT_DEVICE=TPU: no TPU chip on the PCI bus here; allowed CPU, or unset")
    raise ConfigError(f"PJRT_DEVICE={kind[:80]}: allowed TPU or CPU")


def count_chips(pci: Path = Path("/sys/bus/pci/devices")) -> int:
    """TPU chips of this machine."""
    found = 0
    for vendor in pci.glob("*/vendor"):
        if vendor.read_text().strip() == _GOOGLE:
            found += (vendor.parent / "device").read_text().strip() == _TPU_V2_V3
    return found


def _virtual_devices(environment: Mapping[str, str], devices: int | None) -> Host:
    named, value = "--devices", str(devices)
    if devices is None:
        named, value = "CPU_NUM_DEVICES", environment.get("CPU_NUM_DEVICES") or "1"
    count = _number(named, value, 1, MOST_VIRTUAL_DEVICES)
    text = f"no TPU: {count} virtual device{'s' if count > 1 else ''} of the CPU"
    return Host(0, ("localhost",), PORT, text, {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(count)})


def _tpu_host(environment: Mapping[str, str], devices: int | None, chips: int) -> Host:
    source, accelerator, rank, addresses = _neighbours(environment)
    whole = slice_of(source, accelerator)
    if len(addresses) != whole.hosts:
        raise ConfigError(
            f"{source}={accelerator}: has {whole.hosts} hosts of {CORES_PER_HOST} cores, but "
            f"{len(addresses)} are named: {', '.join(addresses)[:200]}"
        )
    if visible := environment.get("TPU_VISIBLE_CHIPS"):
        chips = len(visible.split(","))
    variables = {"PJRT_DEVICE": "TPU"}
    here = chips * CORES_PER_CHIP
    if whole.hosts > 1:
        if chips != CHIPS_PER_HOST:
            raise ConfigError(f"{accelerator}: this host shows {chips} chips; allowed {CHIPS_PER_HOST}")
        if devices not in (None, here):
            raise ConfigError(f"--devices={devices}: allowed {here}, all of each host of a {accelerator}")
    elif devices == CORES_PER_CHIP < here:
        variables |= {
            "TPU_VISIBLE_CHIPS": "0",
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_BOUNDS": "1,1,1",
        }
        here = devices
    elif devices not in (None, here):
        one_chip = f" or {CORES_PER_CHIP} (one chip)" if here > CORES_PER_CHIP else ""
        raise ConfigError(f"--devices={devices}: allowed {here}, the cores of this TPU{one_chip}")
    text = f"{whole.describe()}; {here} of them here"
    if whole.hosts > 1:
        text = f"{whole.describe()}; host {rank} ({addresses[rank]}) has {here}"
    port = _number("MASTER_PORT", environment.get("MASTER_PORT") or str(PORT), 1, 65535)
    return Host(rank, addresses, port, text, variables)


def _neighbours(environment: Mapping[str, str]) -> tuple[str, str, int, tuple[str, ...]]:
    """(where the accelerator type stands, that type, this host's number, all addresses)."""
    hosts_key = next(
        (key for key in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES") if environment.get(key)), ""
    )
    # torch_xla and libtpu look at the environment alone where this is set
    if environment.get("TPU_SKIP_MDS_QUERY") or hosts_key:
        accelerator = environment.get("TPU_ACCELERATOR_TYPE")
        if not accelerator:
            because = hosts_key or "TPU_SKIP_MDS_QUERY"
            raise ConfigError(
                f"TPU_ACCELERATOR_TYPE: missing, but {because} is set; allowed v3-8, v3-32, ..."
            )
        named = environment.get(hosts_key, "localhost")
        addresses = tuple(_without_port(each.strip()) for each in named.split(","))
        id_source, rank = _worker_id(environment, alone=len(addresses) == 1)
        source, hosts_source = "TPU_ACCELERATOR_TYPE", hosts_key
    else:
        server = environment.get("GCE_METADATA_HOST") or environment.get("GCE_METADATA_IP") or _SERVER
        described = dict(re.findall(r"^(\w+): *'?([^'\n]*)'?$", _attribute(server, "tpu-env"), re.MULTILINE))
        source, accelerator = f"{server}: ACCELERATOR_TYPE", described.get("ACCELERATOR_TYPE", "")
        endpoints = _attribute(server, "worker-network-endpoints").strip().split(",")
        addresses = tuple(endpoint.split(":")[-1] for endpoint in endpoints)
        id_source = f"{server}: agent-worker-number"
        rank = described.get("WORKER_ID") or _attribute(server, "agent-worker-number").strip()
        hosts_source = f"{server}: worker-network-endpoints"
    if len(set(addresses)) != len(addresses) or not all(addresses):
        raise ConfigError(
            f"{hosts_source}={','.join(addresses)[:200]}: allowed the hosts of the slice, each once; XLA has "
            "one process on each"
        )
    return source, accelerator, _number(id_source, rank, 0, len(addresses) - 1), addresses


def _worker_id(environment: Mapping[str, str], alone: bool) -> tuple[str, str]:
    given = {key: environment[key] for key in ("TPU_WORKER_ID", "CLOUD_TPU_TASK_ID") if environment.get(key)}
    if len(set(given.values())) > 1:
        raise ConfigError(
            f"TPU_WORKER_ID={given['TPU_WORKER_ID'][:80]}: allowed CLOUD_TPU_TASK_ID="
            f"{given['CLOUD_TPU_TASK_ID'][:80]}, or one of the two"
        )
    if not given and not alone:
        raise ConfigError("TPU_WORKER_ID: missing, but several hosts are named; allowed this host's number")
    return next(iter(given.items()), ("TPU_WORKER_ID", "0"))


def _without_port(address: str) -> str:
    return address.rpartition(":")[0] if re.fullmatch(r"[^:]*:\d+", address) else address


def _attribute(server: str, name: str) -> str:
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    # The server is on the same machine: never by a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_METADATA_SECONDS) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError) as error:
        what = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else str(error)
        raise ConfigError(
            f"metadata server {server}: gives no {name} ({what[:120]}); where there is none, set "
            "TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and TPU_ACCELERATOR_TYPE"
        ) from None


def _number(source: str, text: str, least: int, most: int) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if not least <= number <= most:
        raise ConfigError(f"{source}={text[:80]}: allowed a number from {least} to {most}")
    return number
