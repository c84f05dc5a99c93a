"""The doctor: what must hold on every host before a long run starts there, checked and measured.

Every rank takes part; rank 0 says what was found.
"""

import fcntl
import os
import platform
import shutil
import socket
import statistics
import struct
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from facetrain.command_line import say
from facetrain.config import Config, DataConfig
from facetrain.data.shards import open_shards
from facetrain.estimate.collectives import Collective, step_collectives
from facetrain.estimate.network import measure_network
from facetrain.lock import hold_folder
from facetrain.world import World, mixed_devices, start_world

_MAX_SKEW_S = 1.0
"""Clocks further apart make the logs of several hosts misleading."""
_SEEN_WITHIN_S = 10.0
"""Seconds that other hosts may take to see a new file; network file systems keep lists of names for a while."""
_CONNECT_WITHIN_S = 60.0
_MEASURE_S = 0.3
"""Seconds for which each collective is repeated."""
_IOCTL_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    text: str
    """What was found."""
    advice: str = ""
    """What to do; empty where all is well."""


def examine(config: Config, *, reads_shards: bool) -> None:
    """Look at this machine, or under a launcher at all of its machines, and print what was found.

    Args:
        config: The run that is planned: its folder, shards and sizes.
        reads_shards: Whether its shards are looked at.

    Raises:
        ValueError: Something isn't well, or the ranks can't reach each other.
    """
    findings = []
    with ExitStack() as stack:
        with _advice_on_interfaces():
            timeout_s = min(config.run.timeout_s, _CONNECT_WITHIN_S)
            world = stack.enter_context(start_world(config.run.device, timeout_s, refuse_mixed=False))
        for finding in _findings(config, world, reads_shards=reads_shards):
            findings.append(finding)
            say(f"{'FAIL' if finding.advice else 'ok  '}  {finding.name:14} {finding.text}")
            if finding.advice:
                say(f"{'':20} {finding.advice}")
    num_bad = sum(bool(finding.advice) for finding in findings)
    if num_bad:
        raise ValueError(f"{num_bad} of {len(findings)} checks failed; below each FAIL stands what to do")


@contextmanager
def _advice_on_interfaces() -> Iterator[None]:
    """Say what to do where ranks meet for the first time and can't reach each other."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"the ranks can't reach each other ({' '.join(str(error).split())[:300]}); {socket.gethostname()} uses"
            f" {' '.join(used_interface())}: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between"
            " the hosts, and let the firewall pass what comes from them"
        ) from None


def used_interface() -> tuple[str, str]:
    """Return name and address of the interface that gloo takes: GLOO_SOCKET_IFNAME, or that of the host's name."""
    names = [name for _, name in socket.if_nameindex()]
    wanted = os.environ.get("GLOO_SOCKET_IFNAME")
    if wanted is not None:
        return wanted, _address_of(wanted) if wanted in names else "missing"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "none", f"({socket.gethostname()} doesn't resolve)"
    return next((name for name in names if _address_of(name) == address), "unknown"), address


def _findings(config: Config, world: World, *, reads_shards: bool) -> Iterator[Finding]:
    hosts = world.all_gather_object(socket.gethostname())
    ranks = _ranks(world, hosts)
    yield ranks
    yield _software(world, hosts)
    yield _interfaces(world, hosts)
    if ranks.advice:  # they can exchange nothing on their devices
        return
    if world.world_size > 1:
        _exchange_first(world)
    yield _clocks(world, hosts)
    yield from _run_folder(world, hosts, Path(config.run.dir))
    if reads_shards:
        yield _shards(world, hosts, config.data)
    if world.world_size > 1:
        yield from _collectives(config, world)


def _ranks(world: World, hosts: Sequence[str]) -> Finding:
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    devices = world.all_gather_object(f"{world.device.type} ({name})")
    ranks_of = defaultdict(list)
    for rank, host in enumerate(hosts):
        ranks_of[host].append(rank)
    where = [f"{host}: ranks {ranks[0]}-{ranks[-1]} on {devices[ranks[0]]}" for host, ranks in ranks_of.items()]
    mixed = mixed_devices([(host, device.split()[0]) for host, device in zip(hosts, devices, strict=True)])
    advice = f"{mixed}: mend the driver there (nvidia-smi), or give --run.device cpu for all" if mixed else ""
    return Finding("ranks", f"{world.world_size} on {len(where)} hosts; {'; '.join(where)}", advice)


def _software(world: World, hosts: Sequence[str]) -> Finding:
    packages = ("facetrain", "torch", "deepspeed", "numpy", "webdataset")
    text = ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    text += f", CUDA {torch.version.cuda or 'none'}"
    return _same_everywhere("software", world, hosts, text, "install the same constraints.txt on every host")


def _interfaces(world: World, hosts: Sequence[str]) -> Finding:
    used = world.all_gather_object(used_interface())
    alone = any(address.startswith("127.") for _, address in used) and len(set(hosts)) > 1
    text = "; ".join(dict.fromkeys(f"{host}: {' '.join(u)}" for host, u in zip(hosts, used, strict=True)))
    advice = "127.* reaches nobody else: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or mend /etc/hosts there"
    return Finding("interface", text, advice if alone else "")


def _exchange_first(world: World) -> None:
    """Let the devices meet: NCCL connects here, and where it can't, its watchdog may end the process without a word."""
    backend = "NCCL" if world.device.type == "cuda" else "GLOO"
    say(
        f"{'':20} a first exchange by {backend}; if nothing follows within {world.timeout_s:g} s, set"
        f" {backend}_SOCKET_IFNAME to the interface between the hosts"
    )
    with _advice_on_interfaces():
        world.all_reduce_sum_(torch.zeros(1, device=world.device)).tolist()  # over all ranks; waits for the device


def _clocks(world: World, hosts: Sequence[str]) -> Finding:
    readings = []
    for _ in range(9):
        # Over all ranks: they leave it together but for the latency of the network.
        world.all_reduce_sum_(torch.zeros(1, device=world.device)).tolist()
        readings.append(time.time())
    of_ranks = world.all_gather_object(readings)
    skews_s = [statistics.median(t - t0 for t, t0 in zip(ts, of_ranks[0], strict=True)) for ts in of_ranks]
    worst = max(range(world.world_size), key=lambda rank: abs(skews_s[rank]))
    text = f"at most {abs(skews_s[worst]) * 1e3:.2f} ms from rank 0's, on {hosts[worst]}"
    advice = f"let chrony or ntpd set the clock of {hosts[worst]}"
    return Finding("clocks", text, advice if abs(skews_s[worst]) > _MAX_SKEW_S else "")


def _run_folder(world: World, hosts: Sequence[str], run_dir: Path) -> Iterator[Finding]:
    """Whether all ranks write to one folder, and whether a lock there keeps all of them out."""

    def make_probe() -> tuple[Path, str]:
        parent = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
        probe = parent / f".facetrain-doctor-{uuid.uuid4().hex}"
        try:
            probe.mkdir()
        except OSError as error:
            return probe, str(error)
        return probe, ""

    probe, error = world.on_main(make_probe)
    if error:
        yield Finding("run folder", f"{probe.parent} on {hosts[0]}: {error}", "give a run.dir that you may write to")
        return
    with suppress(OSError):
        (probe / f"rank-{world.rank}").touch()
    world.all_gather_object(None)  # over all ranks: everyone has written
    missing = world.all_gather_object(_wait_for_files(probe, world.world_size))
    blind = sorted({host for host, m in zip(hosts, missing, strict=True) if m})
    yield Finding(
        "run folder",
        f"{probe.parent}: {'not the same folder on ' + ', '.join(blind) if blind else 'seen by all ranks'}",
        f"put run.dir ({run_dir}) on a file system that all hosts mount and may write to" if blind else "",
    )
    with ExitStack() as held:
        world.on_main(lambda: held.enter_context(hold_folder(probe)))
        is_kept_out = world.is_main or bool(missing[world.rank]) or not _can_hold(probe)
        let_in = sorted(
            {host for host, out in zip(hosts, world.all_gather_object(is_kept_out), strict=True) if not out}
        )
    yield Finding(
        "lock",
        f"{probe.parent}: {'none on ' + ', '.join(let_in) if let_in else 'keeps a second job out'}",
        "mount it with locks over all hosts (Lustre: -o flock), or never start two jobs on one run.dir"
        if let_in
        else "",
    )
    world.on_main(lambda: shutil.rmtree(probe, ignore_errors=True))


def _wait_for_files(probe: Path, world_size: int) -> int:
    """Return how many ranks' files can't be seen after a while."""
    give_up_at = time.monotonic() + _SEEN_WITHIN_S
    while True:
        missing = sum(not (probe / f"rank-{rank}").exists() for rank in range(world_size))
        if not missing or not probe.is_dir() or time.monotonic() > give_up_at:
            return missing
        time.sleep(0.1)


def _can_hold(probe: Path) -> bool:
    try:
        with hold_folder(probe):
            return True
    except ValueError:
        return False


def _shards(world: World, hosts: Sequence[str], config: DataConfig) -> Finding:
    try:
        shards = open_shards(config)
        manifest = shards.manifest
        text = (
            f"{shards.place}: {manifest.images} images of {manifest.identities}, sha256 {manifest.content_sha256[:12]}"
        )
    except (ValueError, OSError) as error:
        text = f"unusable: {error}"
    finding = _same_everywhere("shards", world, hosts, text, "copy the shards of one host to all, or share them")
    if not finding.advice and text.startswith("unusable"):
        return Finding("shards", text, "see data.shards")
    return finding


def _collectives(config: Config, world: World) -> Iterator[Finding]:
    """What a step of this config exchanges, each size once; the slowest rank's time counts."""
    seconds = _seconds_of(Collective("", "", "all-reduce", 4, 1), world)
    yield Finding("latency", f"{seconds * 1e6:.0f} us for an all-reduce of 4 bytes")
    network = measure_network(config.model, config.data)
    needed = {
        (collective.operation, collective.payload_bytes): collective
        for collective in step_collectives(config, network, world.world_size)
        if collective.operation != "reduce-scatter" and collective.payload_bytes >= world.world_size
    }
    for (operation, payload_bytes), collective in sorted(needed.items()):
        seconds = _seconds_of(collective, world)
        gb_per_s = collective.sent_bytes(world.world_size) / seconds / 1e9
        speed = f"{payload_bytes:,} bytes in {seconds * 1e3:.2f} ms, {gb_per_s:.3f} GB/s from each rank"
        yield Finding(operation, f"{speed} ({collective.part})")


def _seconds_of(collective: Collective, world: World) -> float:
    """Return the seconds of one call, the mean of several, on the slowest rank."""
    call: Callable[[Tensor], Tensor]
    if collective.operation == "all-reduce":
        x = torch.zeros(max(1, collective.payload_bytes // 4), device=world.device)
        call = world.all_reduce_sum_
    else:
        x = torch.zeros(collective.payload_bytes // world.world_size, dtype=torch.uint8, device=world.device)
        call = world.all_gather

    def seconds_of(times: int) -> float:
        began_at = time.perf_counter()
        for _ in range(times):
            result = call(x)
        result.view(-1)[0].item()  # waits for a device
        here = torch.tensor([(time.perf_counter() - began_at) / times], dtype=torch.float64, device=world.device)
        return float(world.all_reduce_max_(here))  # over all ranks: every rank ends with the slowest

    seconds_of(1)  # connections are made by the first
    return seconds_of(max(1, min(1000, int(_MEASURE_S / seconds_of(1)))))


def _same_everywhere(name: str, world: World, hosts: Sequence[str], text: str, advice: str) -> Finding:
    """Compare what each rank found with rank 0, and name who differs."""
    texts = world.all_gather_object(text)
    odd = dict.fromkeys(f"{host}: {t}" for host, t in zip(hosts, texts, strict=True) if t != texts[0])
    return Finding(name, "; ".join([f"{hosts[0]}: {texts[0]}", *odd]), advice) if odd else Finding(name, texts[0])


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode())
        try:
            answer = fcntl.ioctl(any_socket, _IOCTL_ADDRESS_OF_INTERFACE, request)
        except OSError:
            return "none"
    return socket.inet_ntoa(answer[20:24])
